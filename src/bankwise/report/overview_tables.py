"""Tables over all sections: the numbers at a glance, baselines beside the converted model, and the models."""

from __future__ import annotations

from typing import Any

from bankwise.report.evaluation_data import COLUMNS, Evaluation, Row, check_evaluation
from bankwise.report.evaluation_tables import HEADER, group_cell, group_name, measure_cell, row_name, row_title
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN, count, plain, share_or_gap
from bankwise.report.long_context_tables import NamedRow, effective_lengths, ruler_means
from bankwise.report.means import Group, groups
from bankwise.report.table import Cell, Table


def evaluation_table(report: dict[str, Any]) -> str:
    """Return the headline measures of a `report.json` as plain text, one column per model that was evaluated."""
    evaluation = check_evaluation(report, "report")
    names = [*(name for name in COLUMNS if name in evaluation.columns), *(one.name for one in evaluation.baselines)]
    rows = [
        [row_title(row), *(measure_cell(evaluation, row, name).text for name in names)]
        for row in evaluation.rows
        if row.is_headline
    ]
    rows += [
        [f"{group.name}: mean recovery", *(group_cell(evaluation, group, name).text for name in names)]
        for group in groups(evaluation)
    ]
    table = Table(title="", header=("", *map(evaluation.label, names)), rows=rows)
    against = evaluation.label(evaluation.reference) if evaluation.has_reference else NOT_RUN
    return f"{table.text()}\n\nvalue ± standard error; reference of the recoveries: {against}"


def headline_rows(evaluation: Evaluation) -> list[NamedRow]:
    """Held-out text, group means, RULER means, and CWE at its longest window."""
    text = [row for row in evaluation.section("perplexity") if row.is_headline]
    cwe = evaluation.cwe_rows
    longest = max((row.length or 0 for row in cwe), default=0)
    first_variant = next((row.variant for row in cwe), "")
    cwe = [row for row in cwe if (row.length or 0) == longest and row.variant == first_variant]
    return [
        *(_measure(evaluation, row) for row in text),
        *(_group(evaluation, group) for group in groups(evaluation)),
        *ruler_means(evaluation, is_compatible=True),
        *effective_lengths(evaluation),
        *(_measure(evaluation, row) for row in cwe),
    ]


def _measure(evaluation: Evaluation, row: Row) -> NamedRow:
    return row_name(evaluation, row), lambda column: measure_cell(evaluation, row, column)


def _group(evaluation: Evaluation, group: Group) -> NamedRow:
    return group_name(group), lambda column: group_cell(evaluation, group, column)


def glance_table(evaluation: Evaluation) -> Table:
    rows = [[name, *map(cell, COLUMNS)] for name, cell in headline_rows(evaluation)]
    return Table(title="At a glance", header=HEADER, rows=rows)


def baselines_table(evaluation: Evaluation) -> Table:
    """Training-free baselines and the converted model: what each keeps active, what it reads, and the headlines."""
    beside = dict.fromkeys(("untrained", "sparse", "dense_narrow", evaluation.reference))
    columns = [*evaluation.baselines, *(evaluation.columns[name] for name in beside if name in evaluation.columns)]
    headline = headline_rows(evaluation)
    note = (
        "Equal active fraction is not equal reading: FFN bytes is the share of the dense FFN's weights that one token "
        "reads at batch 1; a method that needs the whole gate first, or true activations, reads more than it keeps. "
        "Baselines are applied to the dense model without training."
    )
    lines: list[list[str | Cell]] = [
        [
            Cell(
                text=evaluation.label(column.name),
                small=(column.description or "baseline",) if column.is_baseline else (),
            ),
            share_or_gap(column.active_fraction),
            share_or_gap(column.ffn_bytes_fraction),
            *(cell(column.name) for _, cell in headline),
        ]
        for column in columns
    ]
    return Table(
        title="Baselines at equal active fraction",
        header=("", "active channels", "FFN bytes", *(", ".join((name.text, *name.small[:1])) for name, _ in headline)),
        rows=lines if evaluation.baselines else [],
        note=note,
    )


def models_table(evaluation: Evaluation) -> Table:
    """Which model stands in which column."""
    header = ("column", "model", "SHA-256", "parameters", "trained tokens", "active channels", "seconds")
    lines: list[list[str | Cell]] = []
    for name in (*COLUMNS, *(column.name for column in evaluation.baselines)):
        column = evaluation.columns.get(name)
        if column is None:
            lines.append([COLUMNS[name], *[NOT_RUN] * (len(header) - 1)])
            continue
        parameters = NOT_APPLICABLE if column.parameters is None else count(column.parameters)
        tokens = NOT_APPLICABLE if column.tokens is None else count(column.tokens)
        seconds = NOT_APPLICABLE if column.seconds is None else f"{column.seconds:.0f}"
        lines.append(
            [
                evaluation.label(name),
                plain(column.model),
                plain(column.sha256),
                parameters,
                tokens,
                share_or_gap(column.active_fraction),
                seconds,
            ]
        )
    note = (
        "dense: the model before conversion. dense companion: the dense model trained on the same tokens, in the same "
        "order, with the same optimiser. Dense-4x: the dense FFN cut to the quarter of its channels that is strongest, "
        "trained alike; the paper does not define its Dense-4x in public, this is our reading. post-hoc: converted, "
        "not trained. sparse: after training. repaired: sparse with the layer patch."
    )
    return Table(title="Models", header=header, rows=lines, note=note, numeric=False)
