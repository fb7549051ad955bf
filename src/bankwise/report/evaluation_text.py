"""The headline numbers of an evaluation as plain text, for the terminal."""

from typing import Any

from bankwise.report.evaluation_tables import number_format
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN
from bankwise.report.table import Table


def evaluation_table(report: dict[str, Any]) -> str:
    """One line per headline measure, one column per model that was measured, each value with its standard error."""
    columns = report["columns"]
    lines = [
        (_name(row), *(_cell(row["unit"], row["columns"].get(column["name"])) for column in columns), _count(row))
        for row in report["measures"]
        if row["is_headline"]
    ]
    header = ("", *(column["label"] for column in columns), "n")
    return Table(title="Evaluation", header=header, rows=lines).text()


def _name(row: dict[str, Any]) -> str:
    place = [row["section"], row["task"], *([str(row["length"])] if row["length"] else [])]
    name = " ".join([*place, *([row["variant"]] if row["variant"] else []), row["metric"]])
    return f"{name} ({row['unit']})" if row["unit"] else name


def _cell(unit: str, cell: dict[str, Any] | None) -> str:
    if cell is None:
        return NOT_RUN
    if cell["value"] is None:
        return NOT_APPLICABLE
    show = number_format(unit, cell["value"])
    return show(cell["value"]) + ("" if cell["standard_error"] is None else f" ± {show(cell['standard_error'])}")


def _count(row: dict[str, Any]) -> str:
    counts = {cell["n"] for cell in row["columns"].values()}
    return ", ".join(map(str, sorted(counts)))
