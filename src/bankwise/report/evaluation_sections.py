"""The sections A to G of an evaluation, in the order of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bankwise.evaluation.measures import NOT_COMPATIBLE
from bankwise.report import (
    evaluation_figures,
    evaluation_tables,
    long_context_tables,
    overview_tables,
    sparsity_figures,
    sparsity_tables,
)
from bankwise.report.document import Box, Code, Figures, Paragraph, Part, Section, Shown, Tiles
from bankwise.report.evaluation_data import ALL_SOURCES, COLUMNS, Evaluation
from bankwise.report.evaluation_tables import measures_table
from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN, count, flatten, percent
from bankwise.report.means import group_mean, groups
from bankwise.report.table import Table

_LONG_TABLE = 24
"""Rows from which on a table whose numbers a figure shows as well is folded."""


def evaluation_opening(evaluation: Evaluation) -> list[Part]:
    """What was compared, the numbers at a glance, and how to read the tables."""
    absent = [label for name, label in COLUMNS.items() if name not in evaluation.columns]
    run = [label for name, label in COLUMNS.items() if name in evaluation.columns]
    compared = f"Evaluated: {', '.join(run)}." + (f" {NOT_RUN.capitalize()}: {', '.join(absent)}." if absent else "")
    if not evaluation.has_reference:
        compared += " Neither the dense companion nor the dense model was run: no differences and no recoveries."
    elif evaluation.reference != "companion":
        compared += (
            f" Differences are against {evaluation.label(evaluation.reference)}, because the dense companion was not "
            "run: they mix the price of sparsity with what further training does by itself."
        )
    broken = sparsity_tables.violations(evaluation)
    return [
        *([Box(broken, is_alarm=True)] if broken else []),
        _tiles(evaluation),
        Paragraph(compared),
        Shown(overview_tables.glance_table(evaluation)),
        Paragraph(evaluation_tables.how_to_read(evaluation), is_quiet=True),
    ]


def evaluation_sections(evaluation: Evaluation) -> list[Section]:
    """Sections A to F; G, the provenance, closes the whole report."""
    return [
        Section("A. Held-out language modelling", _language_modelling(evaluation)),
        Section("B. Benchmarks", _benchmarks(evaluation)),
        Section("C. Long context", _long_context(evaluation)),
        Section("D. Sparsity", _sparsity(evaluation)),
        Section("E. Speed", _speed(evaluation)),
        Section("F. Layer scan", _scan(evaluation)),
    ]


def evaluation_provenance(evaluation: Evaluation) -> list[Part]:
    """Models, how the evaluation ran, where its prompts came from, and files that it quotes whole."""
    files = {name: text for name, text in evaluation.provenance.items() if isinstance(text, str) and "\n" in text}
    scalars = {name: value for name, value in evaluation.provenance.items() if name not in files}
    origins: dict[str, Any] = {}
    for details in evaluation.details.values():
        origins = {**details.origins, **origins}
    return [
        Shown(overview_tables.models_table(evaluation)),
        Shown(_what_and_value("Evaluation", scalars)),
        *([Shown(_what_and_value("Prompts: generator, files, shots", origins), is_folded=True)] if origins else []),
        *(Code(f"Evaluation: {name}", text, "yaml") for name, text in files.items()),
    ]


def _what_and_value(title: str, values: Mapping[str, Any]) -> Table:
    return Table(title=title, header=("what", "value"), rows=list(flatten(values).items()), numeric=False)


def _tiles(evaluation: Evaluation) -> Tiles:
    """The newest converted model's headline numbers."""
    name = next((name for name in ("repaired", "sparse", "untrained") if name in evaluation.columns), "")
    label = COLUMNS.get(name, "sparse")
    column = evaluation.columns.get(name)
    active = column.active_fraction if column else None
    tiles = {f"{label}: FFN channels active": NOT_RUN if active is None else percent(active)}
    texts = [row for row in evaluation.section("perplexity") if row.is_headline and row.recovery]
    text = next((row for row in texts if row.task == ALL_SOURCES), texts[0] if texts else None)
    score = text.scores.get(name) if text else None
    if text and score and score.recovery is not None:
        tiles[f"{label}: recovery, {text.metric} of {text.task}"] = f"{score.recovery:.1f} %"
    else:
        tiles[f"{label}: recovery on held-out text"] = NOT_RUN
    for group in groups(evaluation)[:1]:
        mean = group_mean(evaluation, group, name)
        tiles[f"{label}: mean recovery, {group.name}"] = f"{mean.value:.1f} %" if mean else NOT_APPLICABLE
    ruler = [one for one in evaluation.details[name].ruler if one.is_compatible] if name in evaluation.details else []
    if ruler:
        last = max(ruler, key=lambda one: one.length)
        shown = NOT_APPLICABLE if last.mean is None else f"{last.mean:.1f}"
        tiles[f"{label}: RULER, mean of {len(last.tasks)} tasks at {count(last.length)}"] = shown
    return Tiles(tiles)


def _language_modelling(evaluation: Evaluation) -> list[Part]:
    rows = evaluation.section("perplexity")
    plain = [row for row in rows if not row.is_agreement]
    positions_note = "Position of the token in its window; the same tokens in every column."
    return [
        Shown(measures_table(evaluation, "By source", [row for row in plain if not row.variant])),
        Shown(measures_table(evaluation, "By position", [row for row in plain if row.variant], positions_note)),
        Shown(measures_table(evaluation, "Agreement with the dense model", [row for row in rows if row.is_agreement])),
    ]


def _benchmarks(evaluation: Evaluation) -> list[Part]:
    rows = evaluation.section("benchmarks")
    if not rows:
        return [Paragraph(f"Benchmarks: {NOT_RUN}.")]
    headline = [row for row in rows if row.is_headline]
    by_group = [row for name in dict.fromkeys(row.group for row in headline) for row in headline if row.group == name]
    return [
        Shown(evaluation_tables.group_means_table(evaluation)),
        Figures([evaluation_figures.recovery_figure(evaluation)]),
        Shown(measures_table(evaluation, "Headline metric of each task", by_group)),
        Shown(measures_table(evaluation, "All metrics", rows, is_full=True), is_folded=True),
    ]


def _long_context(evaluation: Evaluation) -> list[Part]:
    substitutes = [row for row in evaluation.rows if row.is_substitute]
    means = long_context_tables.ruler_means_table(evaluation, is_compatible=False)
    note = (
        f"These tasks are {NOT_COMPATIBLE}: they use other texts or sizes than NVIDIA's and their scores must not be "
        "set beside published ones. They enter no mean above."
    )
    return [
        *_ruler(evaluation),
        *_cwe(evaluation),
        *([Shown(means)] if means.rows else []),
        Shown(measures_table(evaluation, f"Substitutes, {NOT_COMPATIBLE}", substitutes, note)),
    ]


def _ruler(evaluation: Evaluation) -> list[Part]:
    rows = [row for row in evaluation.section("ruler") if not row.is_substitute]
    if not rows:
        return [Paragraph(f"RULER: {NOT_RUN}.")]
    note = (
        "Score: share of the references that occur anywhere in the answer, letters' case ignored, in %, as NVIDIA "
        "counts. Rows of one length and permutation are the same for every model."
    )
    by_task = measures_table(evaluation, "RULER by task and length", [row for row in rows if row.is_headline], note)
    return [
        Shown(long_context_tables.ruler_means_table(evaluation, is_compatible=True)),
        Figures(evaluation_figures.ruler_figures(evaluation)),
        Shown(by_task, is_folded=len(by_task.rows) > _LONG_TABLE),
        Shown(measures_table(evaluation, "RULER: all metrics", rows, is_full=True), is_folded=True),
    ]


def _cwe(evaluation: Evaluation) -> list[Part]:
    rows = [row for row in evaluation.section("cwe") if not row.is_substitute]
    answers = long_context_tables.answer_classes_table(evaluation)
    parts: list[Part] = [Paragraph(f"Classes of CWE answers: {NOT_RUN}.")]
    if answers.rows:
        parts = [Figures([evaluation_figures.answers_figure(evaluation)]), Shown(answers, is_folded=True)]
    headline = measures_table(evaluation, "CWE in depth", evaluation.cwe_rows)
    return [
        Figures(evaluation_figures.cwe_figures(evaluation)),
        Shown(headline, is_folded=len(headline.rows) > _LONG_TABLE),
        Shown(measures_table(evaluation, "CWE: all metrics", rows, is_full=True), is_folded=True),
        *parts,
    ]


def _sparsity(evaluation: Evaluation) -> list[Part]:
    found = sparsity_tables.routings(evaluation)
    baselines = Shown(overview_tables.baselines_table(evaluation))
    if not found:
        return [Paragraph(f"Routing statistics: {NOT_RUN}."), baselines]
    broken = sparsity_tables.violations(evaluation)
    return [
        *([Box(broken, is_alarm=True)] if broken else []),
        *map(Paragraph, sparsity_tables.kept_promises(evaluation)),
        Shown(sparsity_tables.sparsity_table(evaluation)),
        Figures([sparsity_figures.recall_figure(evaluation), sparsity_figures.retained_figure(evaluation)]),
        Figures(
            [
                sparsity_figures.position_figure(evaluation),
                sparsity_figures.usage_figure(evaluation),
                sparsity_figures.union_figure(evaluation),
            ]
        ),
        *(
            [Shown(measures_table(evaluation, "Means over layers, with standard errors", rows), is_folded=True)]
            if (rows := evaluation.section("routing"))
            else []
        ),
        Shown(sparsity_tables.positions_table(evaluation), is_folded=True),
        Shown(sparsity_tables.union_table(evaluation), is_folded=True),
        *(
            Shown(sparsity_tables.layers_table(evaluation, name, routing), is_folded=True)
            for name, routing in found.items()
        ),
        baselines,
    ]


def _speed(evaluation: Evaluation) -> list[Part]:
    found = {name: details.speed for name, details in evaluation.details.items() if details.speed}
    if not found:
        return [Paragraph(f"Speed: {NOT_RUN}.")]
    measures = dict.fromkeys(measure for speed in found.values() for measure in speed)
    names = (*COLUMNS, *(column.name for column in evaluation.baselines if column.name in found))
    rows = [
        (measure.replace("_", " "), *(_speed_cell(found.get(name), measure) for name in names)) for measure in measures
    ]
    header = ("", *(evaluation.label(name) for name in names))
    return [
        Figures([evaluation_figures.speed_figure(evaluation)]),
        Shown(Table(title="Speed", header=header, rows=rows)),
    ]


def _speed_cell(speed: Mapping[str, float | None] | None, measure: str) -> str:
    if speed is None or measure not in speed:
        return NOT_RUN
    value = speed[measure]
    return NOT_APPLICABLE if value is None else f"{value:.4g}"


def _scan(evaluation: Evaluation) -> list[Part]:
    scan = evaluation.scan
    if scan is None:
        return [Paragraph(f"Layer scan: {NOT_RUN}.")]
    rows = [
        (str(layer), *(NOT_APPLICABLE if value is None else f"{value:+.4f}" for value in values))
        for layer, values in zip(scan.layers, scan.values, strict=True)
    ]
    header = ("layer", *(f"{count(length)} tokens" for length in scan.lengths))
    table = Table(title=f"Layer scan: change of {scan.metric}", header=header, rows=rows)
    return [Figures([evaluation_figures.scan_figure(evaluation)]), Shown(table, is_folded=True)]
