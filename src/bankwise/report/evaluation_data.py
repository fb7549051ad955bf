"""Reading `report.json`, what an evaluation found: checked once, with one clear `DataError` for what is damaged.

The report has six columns that always stand in the same order, whether they were run or not; baselines without
training have a table of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bankwise.config.evaluation import SUITES
from bankwise.errors import DataError
from bankwise.evaluation.comparison import COLUMNS, FORMAT
from bankwise.evaluation.measures import NOT_COMPATIBLE
from bankwise.report.evaluation_details import Details, Scan, read_details, read_scan
from bankwise.report.json_node import Node

DENSE = ("dense", "companion", "dense_narrow")
"""Columns whose models use all their channels, so that there is no routing to measure."""

CWE_METRICS = ("nll", "auc")
"""What the common-words task is followed by where its official score is at the floor."""

ALL_SOURCES = "all sources"
"""Task of the held-out measures over all sources together."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model that was evaluated."""

    name: str
    label: str
    model: str
    sha256: str
    is_baseline: bool
    active_fraction: float | None
    ffn_bytes_fraction: float | None
    """Share of the dense FFN's weight bytes that one token reads."""
    parameters: int | None
    seconds: float | None
    tokens: int | None
    """Tokens that it was trained on."""
    description: str
    """Of a baseline: its rule."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """Paired difference to the reference, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of one model. None: the number does not exist."""

    value: float | None
    n: int
    standard_error: float | None
    delta: Delta | None
    recovery: float | None
    recovery_above_chance: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure: one metric of one task, for all models."""

    section: str
    task: str
    metric: str
    length: int | None
    variant: str
    unit: str
    better: str
    recovery: str
    chance: float | None
    group: str
    is_headline: bool
    note: str
    scores: Mapping[str, Score]
    """By column name; a model that was not measured is missing."""

    @property
    def is_substitute(self) -> bool:
        """Whether the task only resembles RULER's, because the original's files or size were not used."""
        return self.section in ("ruler", "cwe") and ("@" in self.task or NOT_COMPATIBLE.lower() in self.note.lower())

    @property
    def is_agreement(self) -> bool:
        """Whether the metric compares a model's predictions with the dense model's."""
        return self.section == "perplexity" and (self.metric.startswith("kl") or "agreement" in self.metric)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A whole `report.json`."""

    columns: Mapping[str, Column]
    rows: Sequence[Row]
    details: Mapping[str, Details]
    scan: Scan | None
    reference: str
    """Name of the column that differences and recoveries are taken against; it may not have been run."""
    provenance: Mapping[str, Any]

    @property
    def baselines(self) -> list[Column]:
        """The columns beside the fixed six, in the file's order."""
        return [column for name, column in self.columns.items() if name not in COLUMNS]

    @property
    def has_reference(self) -> bool:
        return self.reference in self.columns

    def label(self, name: str) -> str:
        return COLUMNS.get(name) or self.columns[name].label

    @property
    def cwe_rows(self) -> list[Row]:
        """NLL and AUC of the official common-words task."""
        return [row for row in self.section("cwe") if row.metric in CWE_METRICS and not row.is_substitute]

    def section(self, *names: str) -> list[Row]:
        return [row for row in self.rows if row.section in names]

    def can_measure(self, row: Row, column: str) -> bool:
        """Whether the model of a column could have the measure: no agreement of a model with itself, no routing of a
        model that has none."""
        if row.section == "routing":
            return column in COLUMNS and column not in DENSE
        return not (row.is_agreement and column == "dense")

    def is_at_chance(self, row: Row) -> bool:
        """Whether the dense model does not beat a random answer by more than two standard errors.

        Such a task says nothing about what sparsity costs. The reference stands in where dense was not measured.
        """
        score = row.scores.get("dense") or row.scores.get(self.reference)
        if row.chance is None or score is None or score.value is None or row.better != "higher":
            return False
        return score.value - row.chance <= 2 * (score.standard_error or 0.0)


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in `path`; damage raises `DataError` with the field's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; write it again with `bankwise eval`") from error
    return check_evaluation(value, str(path))


def check_evaluation(value: Any, source: str) -> Evaluation:
    """Return what the dict of a `report.json` holds; `source` names it in errors."""
    root = Node(value, source)
    if root["format"].value != FORMAT:
        raise root["format"].error(f"{FORMAT!r}")
    columns = _columns(root["columns"])
    rows = [_row(node, columns) for node in root["measures"].items()]
    seen: set[tuple[str, str, str, int | None, str]] = set()
    for i, row in enumerate(rows):
        key = (row.section, row.task, row.metric, row.length, row.variant)
        if key in seen:
            raise DataError(f"{source}: measures[{i}] repeats {key}; each measure may stand in the file once")
        seen.add(key)
    if root["reference"].text() not in {*COLUMNS, *columns}:
        raise root["reference"].error(f"the name of a column ({', '.join(COLUMNS)})")
    if not isinstance(root["provenance"].value, dict) or not root["provenance"].value:
        raise DataError(
            f"{source} has no provenance (command, revision, models, versions, seeds); no report is written, because "
            "nobody could reproduce it"
        )
    return Evaluation(
        columns=columns,
        rows=rows,
        details={name: read_details(node) for name, node in root["details"].fields() if _known(name, node, columns)},
        scan=read_scan(root["scan"]),
        reference=root["reference"].text(),
        provenance=root["provenance"].object(),
    )


def _columns(node: Node) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for item in node.items():
        column = Column(
            name=item["name"].text(),
            label=item["label"].text(),
            model=item["model"].text(""),
            sha256=item["sha256"].text(""),
            is_baseline=item["is_baseline"].flag(),
            active_fraction=item["active_fraction"].number_or_null(),
            ffn_bytes_fraction=item["ffn_bytes_fraction"].number_or_null(),
            parameters=item["parameters"].integer_or_null(),
            seconds=item["seconds"].number_or_null(),
            tokens=item["tokens"].integer_or_null(),
            description=item["description"].text(""),
        )
        if column.name in columns:
            raise item["name"].error("a name of its own: two columns share it")
        if not column.is_baseline and column.name not in COLUMNS:
            raise item["name"].error(f"one of {', '.join(COLUMNS)}, and the column is not marked as a baseline")
        columns[column.name] = column
    if not columns:
        raise node.error("a list with at least one column")
    return columns


def _row(node: Node, columns: Mapping[str, Column]) -> Row:
    if node["section"].value not in SUITES:
        raise node["section"].error(f"one of {', '.join(SUITES)}")
    for field, allowed in (("better", ("higher", "lower", "")), ("recovery", ("ratio", "inverse", ""))):
        if node[field].value not in allowed:
            raise node[field].error(f"one of {', '.join(map(repr, allowed))}")
    return Row(
        section=node["section"].text(),
        task=node["task"].text(),
        metric=node["metric"].text(),
        length=node["length"].integer_or_null(),
        variant=node["variant"].text(""),
        unit=node["unit"].text(""),
        better=node["better"].text(),
        recovery=node["recovery"].text(),
        chance=node["chance"].number_or_null(),
        group=node["group"].text(""),
        is_headline=node["is_headline"].flag(),
        note=node["note"].text(""),
        scores={name: _score(cell) for name, cell in node["columns"].fields() if _known(name, cell, columns)},
    )


def _score(node: Node) -> Score:
    return Score(
        value=node["value"].number_or_null(),
        n=node["n"].integer(),
        standard_error=node["standard_error"].number_or_null(),
        delta=None if node["delta"].is_null else _delta(node["delta"]),
        recovery=node["recovery"].number_or_null(),
        recovery_above_chance=node["recovery_above_chance"].number_or_null(),
    )


def _delta(node: Node) -> Delta | None:
    """The difference; None where one of its numbers does not exist."""
    value, low, high = (node[name].number_or_null() for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    return Delta(value=value, low=low, high=high, n=node["n"].integer())


def _known(name: str, node: Node, columns: Mapping[str, Column]) -> bool:
    if name not in columns:
        raise node.error(f"expected: the file has no column {name!r} ({', '.join(columns)})")
    return True
