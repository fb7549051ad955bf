"""Section D in pictures: where the predictor chooses well, and which channels are used."""

from __future__ import annotations

from bankwise.report.charts import Series, line_chart
from bankwise.report.evaluation_data import COLUMNS, Evaluation
from bankwise.report.evaluation_details import Routing
from bankwise.report.formats import fraction
from bankwise.report.heat_map import Colours, Panel, heat_maps
from bankwise.report.point_charts import ErrorSeries, error_chart
from bankwise.report.sparsity_tables import GLOBAL, MODEL, ORACLE, choosing, position_buckets, routings, union_curve
from bankwise.report.svg import LEVEL_STYLE, STYLES, Style


def recall_figure(evaluation: Evaluation) -> str:
    """Recall by layer, one curve per column."""
    caption = (
        "Share of each bank's truly largest channels that were chosen: 1 is a perfect choice, a random one reaches the "
        "share of active channels (dotted). A layer far below its neighbours is routed badly."
    )
    found = routings(evaluation)
    chance = next((one.active_fraction for one in found.values() if one.active_fraction is not None), None)
    layers = [layer.layer for routing in found.values() for layer in routing.layers]
    level = [(layer, chance) for layer in sorted(set(layers))] if chance is not None else []
    series = [Series(name="random choice", points=level, style=LEVEL_STYLE)] if level else []
    return _by_layer("Recall by layer", [*series, *_curves(found, "recall")], caption, "recall")


def retained_figure(evaluation: Evaluation) -> str:
    """Retained energy by layer of each column, between nothing and the oracles of one of them."""
    found = routings(evaluation)
    caption = (
        "Share of the FFN's squared contributions that the chosen channels carry. The distance to the oracle by bank "
        "is what the predictor loses; from there to the oracle over all channels is the price of equal banks; the rest "
        "is lost by any choice of so few channels."
    )
    best = next((name for name in ("repaired", "sparse", "untrained") if name in found), "")
    oracles = []
    if best:
        oracles = [
            Series(
                name=f"oracle by bank ({COLUMNS[best]})",
                points=_points(found[best], ORACLE),
                style=Style(colour="c-dense", dash="2 4"),
            ),
            Series(
                name=f"oracle over all channels ({COLUMNS[best]})",
                points=_points(found[best], GLOBAL),
                style=Style(colour="c-dense", dash="8 4"),
            ),
        ]
    return _by_layer("Retained energy by layer", [*oracles, *_curves(found, MODEL)], caption, "retained energy")


def union_figure(evaluation: Evaluation) -> str:
    """Channels that runs of neighbouring tokens keep together."""
    found = routings(evaluation)
    curves = {name: dict(union_curve(routing)) for name, routing in found.items()}
    sizes = sorted({tokens for curve in curves.values() for tokens in curve})
    series = [
        ErrorSeries(
            name=label,
            values=[(curves[name][n], 0.0) if n in curves.get(name, {}) else None for n in sizes],
            style=STYLES[name],
        )
        for name, label in choosing(found).items()
    ]
    active = next((curve[1] for curve in curves.values() if 1 in curve), None)
    if active is not None:
        independent = [(1 - (1 - active) ** n, 0.0) for n in sizes]
        series.append(
            ErrorSeries(name="independent choices", values=independent, style=Style(colour="c-dense", dash="2 4"))
        )
    caption = (
        "Share of all channels that a run of neighbouring tokens reads, mean over layers. Below the dotted line (every "
        "token chooses by itself) neighbours share channels; where a curve reaches 1, a batch or a draft of that many "
        "tokens reads every weight and saves nothing."
    )
    return error_chart(
        "Channels kept by neighbouring tokens",
        [str(n) for n in sizes],
        series,
        caption,
        x_axis="neighbouring tokens",
        y_label="share of channels",
        show=fraction,
    )


def position_figure(evaluation: Evaluation) -> str:
    """Maps of recall by layer (across) and position in the window (down)."""
    found = routings(evaluation)
    buckets = position_buckets(found)
    layers = sorted({layer.layer for routing in found.values() for layer in routing.layers})
    panels = []
    for name, routing in found.items():
        by_layer = {layer.layer: layer.recall_by_position for layer in routing.layers}
        panels.append(
            Panel(
                name=COLUMNS[name],
                values=[[by_layer.get(layer, {}).get(bucket) for layer in layers] for bucket in buckets],
            )
        )
    known = [value for panel in panels for row in panel.values for value in row if value is not None]
    caption = (
        "Recall by layer (across) and position of the token in its window (down): a row lower than those above means "
        "that routing gets worse with distance, a low column is a badly routed layer."
    )
    return heat_maps(
        "Recall by layer and position",
        panels if known else [],
        caption,
        rows=buckets,
        columns=[str(layer) for layer in layers],
        colours=Colours(low=min(known, default=0.0), high=max(known, default=1.0)),
        x_axis="layer",
        y_axis="position",
        show=fraction,
        has_text=False,
        missing=_missing(evaluation),
    )


def usage_figure(evaluation: Evaluation) -> str:
    """Maps of how often each channel is used: layers down, channels from the most to the least used across."""
    found = {
        name: routing for name, routing in routings(evaluation).items() if any(one.usage for one in routing.layers)
    }
    layers = sorted({layer.layer for routing in found.values() for layer in routing.layers})
    groups = max((len(layer.usage) for routing in found.values() for layer in routing.layers), default=0)
    panels = []
    for name, routing in found.items():
        by_layer = {layer.layer: layer.usage for layer in routing.layers}
        rows = [list(by_layer.get(layer, [])) for layer in layers]
        panels.append(Panel(name=COLUMNS[name], values=[row + [None] * (groups - len(row)) for row in rows]))
    caption = (
        f"Each row is a layer; its channels are sorted by how many tokens use them, most used at the left, in {groups} "
        "groups. An even row uses all channels alike; high values at the left and low ones over the rest are a "
        "layer that leans on few channels whatever the token."
    )
    return heat_maps(
        "Channel use",
        panels,
        caption,
        rows=[str(layer) for layer in layers],
        columns=[str(i + 1) for i in range(groups)],
        colours=Colours(low=0.0, high=1.0),
        x_axis="channel groups, most used first",
        y_axis="layer",
        show=fraction,
        has_text=False,
        missing=_missing(evaluation),
    )


def _by_layer(title: str, series: list[Series], caption: str, y_label: str) -> str:
    return line_chart(title, series, caption, x_axis="layer", y_label=y_label, y_range=(0.0, 1.0), has_whole_x=True)


def _curves(found: dict[str, Routing], field: str) -> list[Series]:
    return [
        Series(name=label, points=_points(found[name], field) if name in found else [], style=STYLES[name])
        for name, label in choosing(found).items()
    ]


def _points(routing: Routing, field: str) -> list[tuple[float, float]]:
    return [(layer.layer, value) for layer in routing.layers if (value := layer.values[field]) is not None]


def _missing(evaluation: Evaluation) -> list[str]:
    found = routings(evaluation)
    return [label for name, label in choosing(found).items() if name not in found]
