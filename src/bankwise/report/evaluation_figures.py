"""Pictures of sections A to C, E and F: benchmarks, long context, speed and layer scan."""

from __future__ import annotations

from collections.abc import Sequence

from bankwise.report.evaluation_data import COLUMNS, Evaluation, Row
from bankwise.report.evaluation_tables import number_format
from bankwise.report.formats import count
from bankwise.report.heat_map import Colours, Panel, heat_maps
from bankwise.report.means import group_mean, groups
from bankwise.report.point_charts import ErrorSeries, Level, PlacedPoint, error_chart, scatter_chart
from bankwise.report.svg import BASELINE_STYLE, STYLES


def recovery_figure(evaluation: Evaluation) -> str:
    """Mean recovery of each group of benchmarks, with standard errors."""
    found = [group for group in groups(evaluation) if group.rows]
    series = []
    for name, label in COLUMNS.items():
        if name == evaluation.reference:
            continue
        means = [group_mean(evaluation, group, name) for group in found]
        values = [(mean.value, mean.standard_error or 0.0) if mean else None for mean in means]
        series.append(ErrorSeries(name=label, values=values, style=STYLES[name]))
    caption = (
        f"Mean of the tasks' recoveries against {evaluation.label(evaluation.reference)} (dotted, 100 %), tasks at "
        "chance left out; whiskers: one standard error."
    )
    return error_chart(
        "Mean recovery by group",
        [group.name for group in found],
        series,
        caption,
        x_axis="group of tasks",
        y_label="recovery, %",
        show=lambda value: f"{value:.1f}",
        level=Level(name=evaluation.label(evaluation.reference), value=100.0),
        is_joined=False,
    )


def ruler_figures(evaluation: Evaluation) -> list[str]:
    """Heat maps of the RULER score by task and length, one figure per permutation."""
    rows = [row for row in evaluation.section("ruler") if row.is_headline and not row.is_substitute]
    return [
        _ruler_figure(evaluation, variant, [row for row in rows if row.variant == variant])
        for variant in dict.fromkeys(row.variant for row in rows)
    ]


def _ruler_figure(evaluation: Evaluation, variant: str, rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(row.task for row in rows))
    lengths = sorted({row.length or 0 for row in rows})
    by_place = {(row.task, row.length or 0): row for row in rows}
    panels = []
    for name, label in COLUMNS.items():
        if any(name in row.scores for row in rows):
            grid = [[_value(by_place.get((task, length)), name) for length in lengths] for task in tasks]
            panels.append(Panel(name=label, values=grid))
    drawn = {panel.name for panel in panels}
    caption = (
        "Official score in % by task (down) and window length in tokens (across); one map per model, on one scale. "
        "Read along a row: numbers that fall to the right are a task that the model loses with length. Compare the "
        "same cell of two maps for the price of sparsity."
    )
    return heat_maps(
        f"RULER by task and length{f', permutation {variant}' if variant else ''}",
        panels,
        caption,
        rows=tasks,
        columns=[count(length) for length in lengths],
        colours=Colours(low=0.0, high=100.0, unit=" %"),
        x_axis="tokens",
        y_axis="task",
        show=lambda value: f"{value:.0f}" if len(lengths) > 5 else f"{value:.1f}",
        has_text=len(lengths) <= 8,
        missing=[label for label in COLUMNS.values() if label not in drawn],
    )


def cwe_figures(evaluation: Evaluation) -> list[str]:
    """NLL, AUC and official score of the common-words task by length, with error bars, one chart each."""
    rows = evaluation.cwe_rows
    rows += [row for row in evaluation.section("ruler") if row.task == "cwe" and row.is_headline]
    rows = [row for row in rows if row.length is not None]
    return [
        _cwe_figure(evaluation, [row for row in rows if (row.metric, row.unit, row.variant) == key])
        for key in dict.fromkeys((row.metric, row.unit, row.variant) for row in rows)
    ]


def _cwe_figure(evaluation: Evaluation, rows: Sequence[Row]) -> str:
    by_length = {row.length: row for row in rows if row.length is not None}
    lengths, first = sorted(by_length), rows[0]
    series = []
    for name, label in COLUMNS.items():
        values: list[tuple[float, float] | None] = []
        for length in lengths:
            score = by_length[length].scores.get(name)
            if score is None or score.value is None:
                values.append(None)
            else:
                values.append((score.value, score.standard_error or 0.0))
        series.append(ErrorSeries(name=label, values=values, style=STYLES[name]))
    unit = f" ({first.unit})" if first.unit else ""
    direction = {"higher": "higher is better", "lower": "lower is better", "": "neither direction is better"}
    caption = (
        f"{first.metric} by window length, {direction[first.better]}; whiskers: one standard error over rows. Models "
        "are read on the same rows, so the intervals of their paired differences (table) are narrower than the "
        "whiskers suggest."
    )
    return error_chart(
        f"CWE by length: {first.metric}{f', permutation {first.variant}' if first.variant else ''}",
        [count(length) for length in lengths],
        series,
        caption,
        x_axis="window length, tokens",
        y_label=f"{first.metric}{unit}",
        show=lambda value: number_format(first.unit, value)(value),
        level=None if first.chance is None else Level(name="chance", value=first.chance),
    )


def answers_figure(evaluation: Evaluation) -> str:
    """Maps of the shares of item classes by length, one per column."""
    found = {name: evaluation.details[name].answers for name in COLUMNS if name in evaluation.details}
    found = {name: answers for name, answers in found.items() if answers}
    keys = list(dict.fromkeys(key for answers in found.values() for key in answers))
    classes = list(dict.fromkeys(name for answers in found.values() for one in answers.values() for name in one.items))
    panels = [
        Panel(
            name=COLUMNS[name],
            values=[[answers[key].items.get(one, 0.0) if key in answers else None for one in classes] for key in keys],
        )
        for name, answers in found.items()
    ]
    caption = (
        "What the items of the answers are, by window length and permutation: a model that counts well is high in "
        "the first column; rare words are a lost count, the example's words a copied answer, off-list words a guess."
    )
    return heat_maps(
        "CWE: classes of answered items",
        panels,
        caption,
        rows=keys,
        columns=classes,
        colours=Colours(low=0.0, high=1.0, unit=" %"),
        x_axis="class of item",
        y_axis="prompt",
        show=lambda share: f"{100 * share:.0f}",
        has_text=True,
        missing=[label for name, label in COLUMNS.items() if name not in found],
    )


def speed_figure(evaluation: Evaluation) -> str:
    """Quality against decoding speed; empty where no speed was measured."""
    speeds = {
        name: speed
        for name, details in evaluation.details.items()
        if (speed := details.speed.get("decode_tokens_per_second")) is not None
    }
    quality = next((row for row in evaluation.rows if row.is_headline and row.section != "routing"), None)
    if not speeds or quality is None:
        return ""
    points = []
    for name in (*COLUMNS, *(column.name for column in evaluation.baselines)):
        value, speed = _value(quality, name), speeds.get(name)
        is_baseline = name not in COLUMNS
        points.append(
            PlacedPoint(
                name=evaluation.label(name),
                place=None if value is None or speed is None else (speed, value),
                style=BASELINE_STYLE if is_baseline else STYLES[name],
                is_labelled=is_baseline,
            )
        )
    better = {"higher": "upper", "lower": "lower", "": "upper"}[quality.better]
    unit = f" ({quality.unit})" if quality.unit else ""
    caption = (
        f"Quality is {quality.metric} of {quality.task}. Towards the {better} right is better: faster and closer to "
        "the dense companion. A point pays only if nothing else lies on that side of it."
    )
    return scatter_chart(
        "Quality against speed",
        points,
        caption,
        x_axis="decoded tokens per second",
        y_label=f"{quality.task}: {quality.metric}{unit}",
        show=lambda value: number_format(quality.unit, value)(value),
    )


def scan_figure(evaluation: Evaluation) -> str:
    """Map of the change of the scan's metric by layer and length; empty where no scan was run."""
    scan = evaluation.scan
    if scan is None:
        return ""
    reach = max((abs(value) for row in scan.values for value in row if value is not None), default=0.0) or 1.0
    caption = (
        f"Change of {scan.metric} when one layer (down) is changed, by window length in tokens (across). Cells near "
        "the middle of the scale: the layer does not matter. A row of one strong colour is the layer to repair."
    )
    return heat_maps(
        f"Layer scan: {scan.metric}",
        [Panel(name="change by layer and length", values=scan.values)],
        caption,
        rows=[str(layer) for layer in scan.layers],
        columns=[count(length) for length in scan.lengths],
        colours=Colours(low=-reach, high=reach, is_diverging=True),
        x_axis="tokens",
        y_axis="layer",
        show=lambda value: f"{value:+.3f}",
        has_text=len(scan.lengths) <= 6,
    )


def _value(row: Row | None, column: str) -> float | None:
    score = row.scores.get(column) if row else None
    return score.value if score else None
