"""What a report draws of a training run: which curves, and one sentence on how to read each figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean
from typing import Any

from bankwise.report.charts import Interval, Series, interval_chart, line_chart, smooth
from bankwise.report.folder import TRAINED, RunFolder, controls_of, is_number, models_of
from bankwise.report.formats import fraction, short_count
from bankwise.report.heat_map import Colours, Panel, heat_maps
from bankwise.report.svg import BASELINE_STYLE, LEVEL_STYLE, STYLES, Points, Style

_ORACLE_STYLE = Style(colour="c-companion", shape="diamond")
_MOST_COLUMNS = 40
"""Log lines that the map of recall shows at most."""


def results_figure(run: RunFolder) -> str:
    """Held-out loss of the models and controls, with one standard error to each side."""
    rows = []
    for model in dict.fromkeys((*models_of(run.summary), *controls_of(run.summary))):
        column: dict[str, Any] = run.summary.get(model) or {"loss": None, "standard_error": 0.0}
        loss, error = column["loss"], column["standard_error"]
        if loss is None or math.isfinite(loss):
            error = error if math.isfinite(error) else 0.0
            rows.append(Interval(name=model, value=loss, error=error, style=STYLES.get(model, BASELINE_STYLE)))
    caption = (
        "Marker: mean held-out loss (left is better); whiskers: one standard error over windows. The comparison that "
        "counts is sparse with companion, which saw the same training tokens; dense saw none of them."
    )
    return interval_chart("Held-out loss", rows, caption, x_axis="nats per token")


def training_figure(run: RunFolder) -> str:
    """Training cross entropy of the trained models by trained tokens, smoothed, with the raw values behind."""
    series: list[Series] = []
    window = 1
    for model in _trained_models(run):
        raw = _finite(run.curve(model, "ce", run.metrics))
        window = max(window, 2 * (len(raw) // 40) + 1)
        series.append(Series(name=model, points=raw, style=STYLES[model], is_faint=True))
        series.append(Series(name=model, points=smooth(raw, window), style=_unmarked(model)))
    blur = f"Line: mean of {window} neighbouring log lines, pale: each of them. " if window > 1 else ""
    caption = (
        f"{blur}All models see the same batches, so the distance from the companion to the sparse line is the price of "
        "sparsity at that point of training."
    )
    return line_chart("Training cross entropy", series, caption, x_axis="trained tokens", y_label="nats per token")


def held_out_curve_figure(run: RunFolder) -> str:
    """Held-out loss by trained tokens; empty where the run did not measure it on the way."""
    curves = {model: _finite(run.curve(model, "loss", run.held_out)) for model in _trained_models(run)}
    if not any(curves.values()):
        return ""
    end = max(points[-1][0] for points in curves.values() if points)
    level = _finite([(0.0, run.summary["dense"]["loss"]), (end, run.summary["dense"]["loss"])])
    series = [
        Series(name="dense, before training", points=level, style=LEVEL_STYLE),
        *(Series(name=model, points=points, style=STYLES[model]) for model, points in curves.items()),
    ]
    caption = (
        "Measured on held-out text on the way; a line that still falls at its right end would gain from more tokens."
    )
    return line_chart("Held-out loss by tokens", series, caption, x_axis="trained tokens", y_label="nats per token")


def recall_figure(run: RunFolder) -> str:
    """Recall of the oracle's channels by layer, at conversion and after training, with the level of chance."""
    converted, trained = _converted(run, "recall"), _trained(run, "recall")
    chance = run.summary["untrained"]["active_fraction"]
    series = [
        Series(name="random choice", points=[(x, chance) for x, _ in converted or trained], style=LEVEL_STYLE),
        Series(name="at conversion", points=converted, style=STYLES["untrained"]),
        Series(name="after training", points=trained, style=STYLES["sparse"]),
    ]
    caption = (
        "Share of each layer's truly largest channels that the predictor chose: 1 is a perfect choice, the dotted line "
        "is chance; a layer far below its neighbours is routed badly."
    )
    return _by_layer("Recall by layer", series, caption, "recall")


def retained_figure(run: RunFolder) -> str:
    """Retained energy by layer: predictor at conversion and after training, between a random and the best choice."""
    oracle, chance, converted = (_converted(run, field) for field in ("retained_oracle", "retained_random", "retained"))
    series = [
        Series(name="best choice (oracle)", points=oracle, style=_ORACLE_STYLE),
        Series(name="random choice", points=chance, style=LEVEL_STYLE),
        Series(name="at conversion", points=converted, style=STYLES["untrained"]),
        Series(name="after training", points=_trained(run, "retained"), style=STYLES["sparse"]),
    ]
    caption = (
        "Share of the FFN's squared activation energy that the chosen channels carry: the distance to the oracle is "
        "what the predictor loses, the oracle's distance to 1 is lost by any choice of so few channels."
    )
    return _by_layer("Retained energy by layer", series, caption, "retained energy")


def recall_over_training_figure(run: RunFolder) -> str:
    """Map of recall by layer (down) and trained tokens (across); empty where training logged no recall."""
    lines = [line for line in run.metrics if line.get("model") == "sparse" and line.get("recall")]
    if not lines:
        return ""
    stride = -(-len(lines) // _MOST_COLUMNS)
    lines = lines[::-1][::stride][::-1]  # counted from the end, so that the last line is among them
    layers = _layers(run, len(lines[-1]["recall"]))
    grid = [[_number(line["recall"], i) for line in lines] for i in range(len(layers))]
    known = [value for row in grid for value in row if value is not None]
    caption = (
        "Each row is a layer, each column a logged training batch. A row that stays at the low end of the scale is a "
        "layer whose predictor does not learn; a column lower than its left neighbour is a step back. The colour scale "
        "spans the values shown."
    )
    return heat_maps(
        "Recall by layer and trained tokens",
        [Panel(name="sparse", values=grid)] if known else [],
        caption,
        rows=[str(layer) for layer in layers],
        columns=[short_count(float(f"{line['tokens']:.3g}")) for line in lines],
        colours=Colours(low=min(known, default=0.0), high=max(known, default=1.0)),
        x_axis="trained tokens",
        y_axis="layer",
        show=fraction,
        has_text=False,
    )


def telemetry_figure(run: RunFolder) -> str:
    """Recall, margin and churn on the held-out probe batch by trained tokens; empty where no telemetry was written."""
    lines = [line for line in run.telemetry if line.get("model") == "sparse"]
    if not lines:
        return ""
    series = [
        Series(name="recall, mean of the layers", points=_over_layers(lines, "recall", mean), style=STYLES["sparse"]),
        Series(name="recall, worst layer", points=_over_layers(lines, "recall", min), style=STYLES["untrained"]),
        Series(name="churn, mean", points=_over_layers(lines, "churn", mean), style=_ORACLE_STYLE),
        Series(name="margin, mean", points=_over_layers(lines, "margin", mean), style=BASELINE_STYLE),
    ]
    caption = (
        "Read on the same held-out windows each time. Recall should rise or stay while the loss falls. Churn is the "
        "share of the chosen channels that the next reading no longer chooses; it should fall with the learning rate. "
        "Where it is high and the margin (the step in the logits at the cut, in standard deviations) near 0, the "
        "choice flaps."
    )
    return line_chart(
        "Routing on held-out text", series, caption, x_axis="trained tokens", y_label="share", y_range=(0.0, 1.0)
    )  # fmt: skip


def _over_layers(lines: list[dict[str, Any]], field: str, combine: Callable[[list[float]], float]) -> Points:
    """Points (tokens, `field` combined over the layers that have it)."""
    known = [(line["tokens"], [v for v in line.get(field) or [] if is_number(v)]) for line in lines]
    return _finite([(tokens, combine(values)) for tokens, values in known if values])


def _by_layer(title: str, series: list[Series], caption: str, y_label: str) -> str:
    return line_chart(title, series, caption, x_axis="layer", y_label=y_label, y_range=(0.0, 1.0), has_whole_x=True)


def _converted(run: RunFolder, field: str) -> Points:
    return _finite([(row["layer"], row[field]) for row in run.calibrated_layers])


def _trained(run: RunFolder, field: str) -> Points:
    values = run.last_by_layer(field)
    return _finite(list(zip(_layers(run, len(values)), values, strict=True)))


def _layers(run: RunFolder, count: int) -> list[int]:
    """Numbers of the `count` sparse layers; counted from 0 where calibration measured other ones."""
    layers = [row["layer"] for row in run.calibrated_layers]
    return layers if len(layers) == count else list(range(count))


def _number(values: list[float], i: int) -> float | None:
    return values[i] if i < len(values) and is_number(values[i]) and math.isfinite(values[i]) else None


def _trained_models(run: RunFolder) -> list[str]:
    return [model for model in models_of(run.summary) if model in TRAINED]


def _unmarked(model: str) -> Style:
    """The column's look without markers, for lines of many points."""
    return Style(colour=STYLES[model].colour, dash=STYLES[model].dash)


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
