"""From the measures of several models to one table of numbers: the dict that `report.json` holds.

Every value stands with its number of items, standard error, paired difference to the reference column and recovery.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bankwise.evaluation.measures import Measure, paired_delta, recovery, recovery_above_chance

FORMAT = "bankwise-report/1"
COLUMNS = {
    "dense": "dense",
    "companion": "dense companion",
    "dense_narrow": "Dense-4x",
    "untrained": "post-hoc",
    "sparse": "sparse",
    "repaired": "repaired",
}
"""The columns of every table, in this order, and how they are called there."""


@dataclass(kw_only=True)
class ColumnScores:
    """What was measured of one model, and how the model is described."""

    name: str
    """Key of `COLUMNS`, or the name of a baseline."""
    about: dict[str, Any]
    """Model, hash, active fraction, FFN bytes, parameters, tokens, seconds."""
    measures: list[Measure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """JSON values by suite."""


def compare(columns: Sequence[ColumnScores], provenance: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The report of several columns; differences are taken to the companion, or to dense where it was not run."""
    by_name = {column.name: column for column in columns}
    reference = "companion" if "companion" in by_name else "dense"
    found = {name: {measure.key: measure for measure in column.measures} for name, column in by_name.items()}
    keys = list(dict.fromkeys(key for measures in found.values() for key in measures))
    rows = []
    for key in keys:
        present = {name: measures[key] for name, measures in found.items() if key in measures}
        other = present.get(reference)
        first = next(iter(present.values()))
        rows.append(
            {name: getattr(first, name) for name in
             ("section", "task", "metric", "length", "variant", "unit", "better", "recovery", "chance", "group",
              "is_headline", "note")}
            | {"columns": {name: _cell(measure, other if name != reference else None, seed)
                           for name, measure in present.items()}}
        )  # fmt: skip
    report = {
        "format": FORMAT,
        "columns": [
            {"name": column.name, "label": COLUMNS.get(column.name, column.name),
             "is_baseline": column.name not in COLUMNS} | column.about
            for column in columns
        ],
        "reference": reference,
        "measures": rows,
        "details": {column.name: column.details for column in columns},
        "provenance": provenance,
    }  # fmt: skip
    return _finite(report)


def _cell(measure: Measure, reference: Measure | None, seed: int) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "value": measure.value, "n": measure.n, "standard_error": measure.standard_error(seed), "delta": None,
        "recovery": None, "recovery_above_chance": None,
    }  # fmt: skip
    if reference is not None:
        delta = paired_delta(measure, reference, seed)
        if delta is not None:
            cell["delta"] = {"value": delta.value, "low": delta.low, "high": delta.high, "n": delta.n}
        cell["recovery"] = recovery(measure.value, reference.value, measure.recovery)
        cell["recovery_above_chance"] = recovery_above_chance(measure, reference, seed)
    return cell


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
