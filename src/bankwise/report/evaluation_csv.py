"""`report.csv`: every measure of every column in one tidy table, at full precision."""

from __future__ import annotations

import csv
import io

from bankwise.report.evaluation_data import COLUMNS, Evaluation, Row, Score
from bankwise.report.formats import NOT_RUN

FIELDS = (
    "section", "task", "metric", "length", "variant", "unit", "column", "value", "n", "standard_error", "delta",
    "delta_low", "delta_high", "recovery", "recovery_above_chance", "chance", "note",
)  # fmt: skip


def csv_report(evaluation: Evaluation) -> str:
    """One line per measure and column. A column that was not run has empty numbers and says so in its note."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    names = (*COLUMNS, *(column.name for column in evaluation.baselines))
    writer.writerows(_line(row, name, row.scores.get(name)) for row in evaluation.rows for name in names)
    return text.getvalue()


def _line(row: Row, column: str, score: Score | None) -> dict[str, str | float | None]:
    line: dict[str, str | float | None] = {
        "section": row.section, "task": row.task, "metric": row.metric, "length": row.length, "variant": row.variant,
        "unit": row.unit, "column": column, "chance": row.chance, "note": row.note,
    }  # fmt: skip
    if score is None:
        return line | {"note": f"{row.note}; {NOT_RUN}" if row.note else NOT_RUN}
    delta = score.delta
    return line | {
        "value": score.value,
        "n": score.n,
        "standard_error": score.standard_error,
        "delta": delta.value if delta else None,
        "delta_low": delta.low if delta else None,
        "delta_high": delta.high if delta else None,
        "recovery": score.recovery,
        "recovery_above_chance": score.recovery_above_chance,
    }
