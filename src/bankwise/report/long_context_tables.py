"""Tables of section C beside the measures: means over RULER's tasks, and what common-words answers consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bankwise.report.evaluation_data import COLUMNS, Evaluation, Row
from bankwise.report.evaluation_details import AnswerClasses, RulerSummary
from bankwise.report.evaluation_tables import HEADER, count_and_change, recovery
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN, count, share_or_gap
from bankwise.report.means import score_mean
from bankwise.report.table import Cell, Table

_ALL_TASKS = 13
"""Tasks of the whole RULER suite."""

NamedRow = tuple[Cell, Callable[[str], Cell]]
"""A row's name, and its cell for the name of a column."""


def ruler_means_table(evaluation: Evaluation, *, is_compatible: bool) -> Table:
    """Mean over the tasks of each length and permutation, with nulls, effective lengths and weighted averages."""
    rows = ruler_means(evaluation, is_compatible=is_compatible)
    lists = sorted(
        {
            f"mean of {len(one.tasks)}: {', '.join(one.tasks)}"
            for details in evaluation.details.values()
            for one in details.ruler
            if one.is_compatible == is_compatible
        }
    )
    note = ""
    if lists:
        note = (
            f"{'; '.join(lists)}. Errors and intervals: from the tasks' own, as if independent. Nulls: empty answers. "
        )
    if is_compatible:
        rows = [*rows, *effective_lengths(evaluation), *_weighted_averages(evaluation)]
        note += (
            "Effective length: the longest one whose mean reaches 85.6 (Llama-2-7B-chat at 4096). Weighted averages "
            "weight the lengths linearly, increasing or decreasing."
        )
    return Table(
        title="RULER: mean over tasks by length" if is_compatible else "Substitutes: mean over tasks by length",
        header=HEADER,
        rows=[[name, *map(cell, COLUMNS)] for name, cell in rows],
        note=note.strip(),
    )


def ruler_means(evaluation: Evaluation, *, is_compatible: bool) -> list[NamedRow]:
    """One row for each permutation and length."""
    found = {
        name: {(one.permutation, one.length): one for one in details.ruler if one.is_compatible == is_compatible}
        for name, details in evaluation.details.items()
    }
    rows: list[NamedRow] = []
    for key in sorted({key for summaries in found.values() for key in summaries}):
        permutation, length = key
        tasks = next(summaries[key].tasks for summaries in found.values() if key in summaries)
        small = (_mean_of(tasks), *([permutation] if permutation else []))
        name = Cell(text=f"RULER, {count(length)} tokens" if is_compatible else f"{count(length)} tokens", small=small)
        summaries = {column: by_key[key] for column, by_key in found.items() if key in by_key}
        rows.append((name, partial(_mean_cell, evaluation, summaries, tasks)))
    return rows


def _mean_cell(
    evaluation: Evaluation, summaries: Mapping[str, RulerSummary], tasks: Sequence[str], column: str
) -> Cell:
    """Mean of the tasks with its error, difference and recovery, as their own rows have them, and the nulls."""
    summary, other = summaries.get(column), summaries.get(evaluation.reference)
    if summary is None:
        return Cell(text=NOT_RUN)
    nulls = f"nulls {summary.nulls or NOT_APPLICABLE}"
    different = [] if summary.tasks == tasks else [_mean_of(summary.tasks)]
    if summary.mean is None:
        return Cell(text=NOT_APPLICABLE, small=(nulls, *different))
    rows = [row for task in summary.tasks if (row := _official_row(evaluation, summary, task, column))]
    if len(rows) < len(summary.tasks):
        return Cell(text=f"{summary.mean:.2f} ± {NOT_APPLICABLE}", small=(nulls, *different))
    found = score_mean(rows, column)
    error = NOT_APPLICABLE if found.standard_error is None else f"{found.standard_error:.2f}"
    small = count_and_change(evaluation, column, found.n, found.delta, lambda value: f"{value:+.2f}")
    if column != evaluation.reference and other and other.mean:
        small.append(f"recovery {recovery(100 * summary.mean / other.mean)}")
    return Cell(text=f"{summary.mean:.2f} ± {error}", small=(*small, nulls, *different))


def _official_row(evaluation: Evaluation, summary: RulerSummary, task: str, column: str) -> Row | None:
    """The task's official score at the summary's length and permutation, where the column has it."""
    place = (task, summary.length, summary.permutation)
    return next(
        (
            row
            for row in evaluation.section("ruler")
            if row.is_headline and (row.task, row.length, row.variant) == place and column in row.scores
        ),
        None,
    )


def effective_lengths(evaluation: Evaluation) -> list[NamedRow]:
    """One row for each permutation."""
    by_column = {name: details.effective_length for name, details in evaluation.details.items()}
    permutations = dict.fromkeys(name for lengths in by_column.values() for name in lengths)

    def cells(permutation: str) -> Callable[[str], Cell]:
        def cell(column: str) -> Cell:
            if permutation not in by_column.get(column, {}):
                return Cell(text=NOT_RUN)
            length = by_column[column][permutation]
            return Cell(text="none reaches it" if length is None else count(length))

        return cell

    return [
        (Cell(text="RULER, effective length", small=("tokens", permutation)), cells(permutation))
        for permutation in permutations
    ]


def _weighted_averages(evaluation: Evaluation) -> list[NamedRow]:
    by_column = {name: details.weighted for name, details in evaluation.details.items()}
    weights = dict.fromkeys(name for averages in by_column.values() for name in averages)

    def cells(weight: str) -> Callable[[str], Cell]:
        def cell(column: str) -> Cell:
            if weight not in by_column.get(column, {}):
                return Cell(text=NOT_RUN)
            value = by_column[column][weight]
            return Cell(text=NOT_APPLICABLE if value is None else f"{value:.2f}")

        return cell

    return [(Cell(text="RULER, weighted average", small=("%", weight)), cells(weight)) for weight in weights]


def _mean_of(tasks: Sequence[str]) -> str:
    return f"mean of {f'all {_ALL_TASKS}' if len(tasks) == _ALL_TASKS else len(tasks)} tasks (%)"


def answer_classes_table(evaluation: Evaluation) -> Table:
    """Shares of the item and answer classes of each model's CWE answers."""
    found = [
        (evaluation.label(name), key, classes)
        for name in COLUMNS
        if name in evaluation.details
        for key, classes in evaluation.details[name].answers.items()
    ]
    item_names = dict.fromkeys(name for _, _, classes in found for name in classes.items)
    answer_names = dict.fromkeys(name for _, _, classes in found for name in classes.answers)
    header = ("", *item_names, *(f"answer {name}" for name in answer_names), "by substring only", "n")
    note = (
        "Items: correct, repeat (given before), rare (an uncommon word of the list), demo (from the example's list), "
        "near (one edit or a part of a list word), off_list. Answers: null (empty), unparsed, demo_copy (the example's "
        "answer), loop, short (fewer items than asked), ok. Shares of all items and of all answers. By substring only: "
        "references that the official rule credits although no item equals them."
    )
    lines = [_classes_line(label, key, classes, list(item_names), list(answer_names)) for label, key, classes in found]
    return Table(title="CWE: what the answers consist of", header=header, rows=lines, note=note)


def _classes_line(
    label: str, key: str, classes: AnswerClasses, items: Sequence[str], answers: Sequence[str]
) -> list[str | Cell]:
    shares = [*(classes.items.get(name, 0.0) for name in items), *(classes.answers.get(name, 0.0) for name in answers)]
    return [
        Cell(text=label, small=(key,)),
        *map(share_or_gap, shares),
        share_or_gap(classes.substring_only),
        count(classes.n),
    ]
