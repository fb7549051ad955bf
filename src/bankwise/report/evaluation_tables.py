"""Tables of measures and of group means, in the same six columns.

A cell holds the value with its standard error and, smaller, n, the paired difference to the reference with its 95 %
interval, and the recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bankwise.report.evaluation_data import COLUMNS, Delta, Evaluation, Row
from bankwise.report.evaluation_details import Number
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN, count
from bankwise.report.means import Group, group_mean, groups
from bankwise.report.table import Cell, Table

HEADER = ("", *COLUMNS.values())
_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def how_to_read(evaluation: Evaluation) -> str:
    """What a cell says; stands once, above the tables."""
    return (
        "Each cell: value ± standard error; below it n (items), Δ: the difference to the column "
        f"{evaluation.label(evaluation.reference)} on the items of both, in the row's unit, with its 95 % interval, "
        "and recovery: the share of the reference's quality that is kept. ↑: higher is better, ↓: lower is better. "
        f'"{NOT_RUN}": the model or the suite was not run; "{NOT_APPLICABLE}": the number does not exist.'
    )


def measures_table(
    evaluation: Evaluation, title: str, rows: Iterable[Row], note: str = "", *, is_full: bool = False
) -> Table:
    """One row per measure. Full: with recovery above chance."""
    lines = [
        [row_name(evaluation, row), *(measure_cell(evaluation, row, name, is_full=is_full) for name in COLUMNS)]
        for row in rows
    ]
    return Table(title=title, header=HEADER, rows=lines, note=note)


def measure_cell(evaluation: Evaluation, row: Row, column: str, *, is_full: bool = False) -> Cell:
    score = row.scores.get(column)
    if score is None:
        is_absent = column not in evaluation.columns or evaluation.can_measure(row, column)
        return Cell(text=NOT_RUN if is_absent else NOT_APPLICABLE)
    is_grey = evaluation.is_at_chance(row)
    if score.value is None:
        return Cell(text=NOT_APPLICABLE, small=(f"n {count(score.n)}",), is_grey=is_grey)
    show = number_format(row.unit, score.value)
    small = count_and_change(evaluation, column, score.n, score.delta, number_format(row.unit, score.value, sign="+"))
    if column != evaluation.reference and row.recovery and evaluation.has_reference:
        small.append(f"recovery {recovery(score.recovery)}")
        if is_full and row.chance is not None:
            small.append(f"above chance {recovery(score.recovery_above_chance)}")
    error = NOT_APPLICABLE if score.standard_error is None else show(score.standard_error)
    return Cell(text=f"{show(score.value)} ± {error}", small=tuple(small), is_grey=is_grey)


def count_and_change(
    evaluation: Evaluation, column: str, n: int, delta: Delta | None, signed: Callable[[float], str]
) -> list[str]:
    """The lines of a cell that give n and the difference to the reference with its interval."""
    if column == evaluation.reference:
        return [f"n {count(n)}", "reference"]
    if delta is None:
        return [f"n {count(n)}"]
    pairs = f", {count(delta.n)} pairs" if delta.n != n else ""
    return [f"n {count(n)}, Δ {signed(delta.value)}", f"[{signed(delta.low)}, {signed(delta.high)}]{pairs}"]


def number_format(unit: str, value: float, sign: str = "") -> Callable[[float], str]:
    """How a value, its error and its differences are printed: the value's size sets the decimals of all of them."""
    if abs(value) >= 1e6:
        return lambda number: f"{number:{sign}.4g}"
    decimals = (
        2 if unit == "%" else next(d for d, limit in ((4, 10), (3, 100), (2, 1000), (1, 1e6)) if abs(value) < limit)
    )
    return lambda number: f"{number:{sign}.{decimals}f}"


def recovery(value: Number) -> str:
    return NOT_APPLICABLE if value is None else f"{value:.1f} %"


def group_means_table(evaluation: Evaluation) -> Table:
    """Mean recovery of each group of benchmarks."""
    return Table(
        title="Mean recovery by group",
        header=HEADER,
        rows=[
            [group_name(group), *(group_cell(evaluation, group, name) for name in COLUMNS)]
            for group in groups(evaluation)
        ],
        note=(
            "Mean of the recoveries of the group's tasks, each by its headline metric; ±: standard error, from the "
            "paired intervals of the tasks, to first order and with the tasks read as independent. Tasks at chance are "
            "left out: the dense model is within two standard errors of a random answer there, so they measure nothing."
        ),
    )


def group_name(group: Group) -> Cell:
    total = len(group.rows) + len(group.at_chance)
    small = [f"mean recovery, {len(group.rows)} of {_tasks(total)}"]
    if group.at_chance:
        small.append(f"at chance, left out: {', '.join(row.task for row in group.at_chance)}")
    return Cell(text=group.name, small=tuple(small))


def group_cell(evaluation: Evaluation, group: Group, column: str) -> Cell:
    if not any(column in row.scores for row in (*group.rows, *group.at_chance)):
        return Cell(text=NOT_RUN)
    if column == evaluation.reference:
        return Cell(text="reference", small=(_tasks(len(group.rows)),))
    found = group_mean(evaluation, group, column)
    if found is None:
        return Cell(text=NOT_APPLICABLE)
    error = NOT_APPLICABLE if found.standard_error is None else f"{found.standard_error:.1f}"
    return Cell(text=f"{found.value:.1f} % ± {error}", small=(_tasks(found.k), f"Δ {found.value - 100:+.1f}"))


def _tasks(number: int) -> str:
    return f"{number} task" if number == 1 else f"{number} tasks"


def row_name(evaluation: Evaluation, row: Row) -> Cell:
    unit = f" ({row.unit})" if row.unit else ""
    small = [f"{row.metric}{unit}{_ARROWS[row.better]}"]
    if row.length is not None:
        small.append(f"{count(row.length)} tokens")
    if row.variant:
        small.append(row.variant)
    is_grey = evaluation.is_at_chance(row)
    if row.chance is not None:
        small.append(
            f"chance {number_format(row.unit, row.chance)(row.chance)}{', dense is at chance' if is_grey else ''}"
        )
    if row.note:
        small.append(row.note)
    return Cell(text=row.task, small=tuple(small), is_grey=is_grey)


def row_title(row: Row) -> str:
    """The row's name in one line, for a terminal."""
    unit = f" ({row.unit})" if row.unit else ""
    length = f", {count(row.length)} tokens" if row.length is not None else ""
    variant = f", {row.variant}" if row.variant else ""
    return f"{row.task}: {row.metric}{unit}{_ARROWS[row.better]}{length}{variant}"
