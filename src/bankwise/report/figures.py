"""What a report draws: which curves, from which fields of the run, and one sentence on how to read each figure."""

from __future__ import annotations

import math
from typing import Any

from bankwise.report.charts import Interval, Points, Series, interval_chart, line_chart, smooth
from bankwise.report.folder import MODELS, RunFolder

_SHAPE = {"dense": "square", "untrained": "hollow", "companion": "diamond", "sparse": "circle"}
_DASH = {"companion": "7 3", "sparse": ""}


def results_figure(run: RunFolder) -> str:
    """Held-out loss of the four models, with one standard error to each side."""
    rows = []
    for model in MODELS:
        column: dict[str, Any] = run.summary.get(model) or {"loss": None, "standard_error": 0.0}
        loss, error = column["loss"], column["standard_error"]
        if loss is None or math.isfinite(loss):
            error = error if math.isfinite(error) else 0.0
            rows.append(Interval(name=model, value=loss, error=error, colour=f"c-{model}", shape=_SHAPE[model]))
    caption = (
        "Marker: mean held-out loss (left is better); whiskers: one standard error over windows. The comparison that "
        "counts is sparse with companion, which saw the same training tokens; dense saw none of them."
    )
    return interval_chart("Held-out loss", rows, caption, x_label="nats per token")


def training_figure(run: RunFolder) -> str:
    """Training cross entropy of companion and sparse model by trained tokens, smoothed, with the raw values behind."""
    series: list[Series] = []
    window = 1
    for model, dash in _DASH.items():
        raw = _finite(run.curve(model, "ce", run.metrics))
        window = max(window, 2 * (len(raw) // 40) + 1)
        series.append(Series(name=model, points=raw, colour=f"c-{model}", is_faint=True))
        series.append(Series(name=model, points=smooth(raw, window), colour=f"c-{model}", dash=dash))
    blur = f"Line: mean of {window} neighbouring log lines, pale: each of them. " if window > 1 else ""
    caption = (
        f"{blur}Both models see the same batches, so the distance between the lines is the price of sparsity at that "
        "point of training."
    )
    return line_chart("Training cross entropy", series, caption, x_label="trained tokens", y_label="nats per token")


def held_out_curve_figure(run: RunFolder) -> str:
    """Held-out loss by trained tokens; empty where the run did not measure it on the way."""
    curves = {model: _finite(run.curve(model, "loss", run.held_out)) for model in _DASH}
    if not any(curves.values()):
        return ""
    end = max(points[-1][0] for points in curves.values() if points)
    level = _finite([(0.0, run.summary["dense"]["loss"]), (end, run.summary["dense"]["loss"])])
    series = [
        Series(name="dense, before training", points=level, colour="c-dense", dash="2 4"),
        *(
            Series(name=model, points=points, colour=f"c-{model}", shape=_SHAPE[model], dash=_DASH[model])
            for model, points in curves.items()
        ),
    ]
    caption = (
        "Measured on held-out text on the way; a line that still falls at its right end would gain from more tokens."
    )
    return line_chart("Held-out loss by tokens", series, caption, x_label="trained tokens", y_label="nats per token")


def recall_figure(run: RunFolder) -> str:
    """Recall of the oracle's channels by layer, at conversion and after training, with the level of chance."""
    converted, trained = _converted(run, "recall"), _trained(run, "recall")
    chance = run.summary["untrained"]["active_fraction"]
    series = [
        Series(
            name="random choice", points=[(x, chance) for x, _ in converted or trained], colour="c-dense", dash="2 4"
        ),
        Series(name="at conversion", points=converted, colour="c-untrained", shape="hollow", dash="7 3"),
        Series(name="after training", points=trained, colour="c-sparse", shape="circle"),
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
        Series(name="best choice (oracle)", points=oracle, colour="c-companion", shape="diamond"),
        Series(name="random choice", points=chance, colour="c-dense", dash="2 4"),
        Series(name="at conversion", points=converted, colour="c-untrained", shape="hollow", dash="7 3"),
        Series(name="after training", points=_trained(run, "retained"), colour="c-sparse", shape="circle"),
    ]
    caption = (
        "Share of the FFN's squared activation energy that the chosen channels carry: the distance to the oracle is "
        "what the predictor loses, the oracle's distance to 1 is lost by any choice of so few channels."
    )
    return _by_layer("Retained energy by layer", series, caption, "retained energy")


def _by_layer(title: str, series: list[Series], caption: str, y_label: str) -> str:
    return line_chart(title, series, caption, x_label="layer", y_label=y_label, y_range=(0.0, 1.0), has_whole_x=True)


def _converted(run: RunFolder, field: str) -> Points:
    return _finite([(row["layer"], row[field]) for row in run.calibrated_layers])


def _trained(run: RunFolder, field: str) -> Points:
    values = run.last_by_layer(field)
    layers = [row["layer"] for row in run.calibrated_layers]
    if len(layers) != len(values):
        layers = list(range(len(values)))
    return _finite(list(zip(layers, values, strict=True)))


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
