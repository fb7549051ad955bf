"""Charts as inline SVG, drawn by hand so that they follow the page's colours (light and dark) and font size.

A chart is a `<figure>`: legend (HTML), one `<svg>` and a caption. Colours are the classes `c-dense`, `c-untrained`,
`c-companion`, `c-sparse` of `style.py`; dashes and marker shapes tell the series apart without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from bankwise.report.tables import NOT_RUN, fraction, nats

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 36, 50
_MAX_POINTS = 400
_SHAPES = {
    "circle": '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6">{tip}</circle>',
    "hollow": '<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="3.4">{tip}</circle>',
    "square": '<rect x="{left:.1f}" y="{top:.1f}" width="6.4" height="6.4">{tip}</rect>',
    "diamond": '<path d="M{x:.1f} {y:.1f}m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z">{tip}</path>',
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve or set of points."""

    name: str
    points: Points
    colour: str
    """CSS class."""
    shape: str = ""
    """Marker, a key of `_SHAPES`; empty: none."""
    dash: str = ""
    """SVG dash pattern of the line; empty: solid."""
    is_faint: bool = False
    """Drawn thin and pale, and left out of the legend: the raw values behind a smoothed line."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One row of an interval chart."""

    name: str
    value: float | None
    """None: not run."""
    error: float
    """Standard error, the reach of the whiskers to each side."""
    colour: str
    shape: str


def line_chart(
    title: str,
    series: Sequence[Series],
    caption: str,
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    has_whole_x: bool = False,
) -> str:
    """Curves over shared axes; the x axis starts at 0. A series without points is named "not run" in the legend."""
    drawn = [one for one in series if one.points]
    legend = f'<ul class="legend">{"".join(_legend_item(one) for one in series if not one.is_faint)}</ul>'
    if not drawn:
        parts = [f'<text class="quiet" x="{_WIDTH / 2:.0f}" y="50" text-anchor="middle">{NOT_RUN}</text>']
        return _figure(title, NOT_RUN, parts, caption, legend=legend, height=90)
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    x_low, x_high = _padded(min(xs), max(xs), 0.015) if has_whole_x else _padded(min(0.0, *xs), max(xs), 0.0)
    y_low, y_high = y_range or _padded(min(ys), max(ys), 0.05)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    to_x, to_y = _scale(x_low, x_high, _LEFT, right), _scale(y_low, y_high, bottom, _TOP)
    parts = []
    y_ticks = nice_ticks(y_low, y_high, 5)
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{to_y(tick):.1f}" y2="{to_y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{to_y(tick) + 5:.1f}" text-anchor="end">{label}</text>')
    for tick in nice_ticks(x_low, x_high, 8 if has_whole_x else 5):
        if has_whole_x and tick != round(tick):
            continue
        parts.append(
            f'<line class="tick" x1="{to_x(tick):.1f}" x2="{to_x(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(_text(to_x(tick), bottom + 20, short_count(tick)))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 7, x_label, "label"))
    parts.append(f'<text class="label" x="4" y="16">{escape(y_label)}</text>')
    parts += [_curve(one, to_x, to_y, x_label) for one in drawn]
    description = "; ".join(
        f"{one.name} from {fraction(one.points[0][1])} to {fraction(one.points[-1][1])}"
        for one in drawn
        if not one.is_faint
    )
    return _figure(title, description, parts, caption, legend=legend)


def interval_chart(title: str, rows: Sequence[Interval], caption: str, *, x_label: str) -> str:
    """One row per name: the value as a marker with its number above, one standard error as whiskers."""
    row_height, left, right, top = 44, 104, _WIDTH - 26, 14
    bottom = top + row_height * len(rows)
    ends = [row.value + sign * row.error for row in rows if row.value is not None for sign in (-1, 1)]
    low, high = _padded(min(ends, default=0.0), max(ends, default=1.0), 0.08)
    to_x = _scale(low, high, left, right)
    parts = []
    ticks = nice_ticks(low, high, 5)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(f'<line class="grid" x1="{to_x(tick):.1f}" x2="{to_x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(to_x(tick), bottom + 20, label))
    for i, row in enumerate(rows):
        y = top + row_height * (i + 0.64)
        parts.append(f'<text x="{left - 10}" y="{y + 5:.1f}" text-anchor="end">{escape(row.name)}</text>')
        if row.value is None:
            parts.append(f'<text class="quiet" x="{left + 8}" y="{y + 5:.1f}">{NOT_RUN}</text>')
            continue
        x, x_from, x_to = to_x(row.value), to_x(row.value - row.error), to_x(row.value + row.error)
        whiskers = f"M{x_from:.1f} {y:.1f}H{x_to:.1f}M{x_from:.1f} {y - 5:.1f}v10M{x_to:.1f} {y - 5:.1f}v10"
        marker = _marker(row.shape, x, y, f"{row.name}: {nats(row.value)} ± {nats(row.error)} {x_label}")
        parts.append(f'<g class="{row.colour}"><path class="line" d="{whiskers}"/>{marker}</g>')
        parts.append(_text(min(max(x, left + 28), right), y - 10, nats(row.value), "value"))
    parts.append(_text((left + right) / 2, bottom + 43, x_label, "label"))
    description = "; ".join(f"{row.name} {NOT_RUN if row.value is None else nats(row.value)}" for row in rows)
    return _figure(title, description, parts, caption, legend="", height=bottom + 50)


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred mean over `window` (odd) neighbours; near the ends the window shrinks evenly, so nothing is shifted."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(window // 2, i, len(points) - 1 - i)
        smoothed.append((x, fmean(y for _, y in points[i - reach : i + reach + 1])))
    return smoothed


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as the finest of them needs."""
    decimals = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def short_count(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _curve(series: Series, to_x: Scale, to_y: Scale, x_label: str) -> str:
    kept = list(series.points[:: -(-len(series.points) // _MAX_POINTS)])
    if kept[-1] != series.points[-1]:
        kept.append(series.points[-1])
    path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in kept)
    parts = [f'<path class="line" d="M{path}"{_dash(series)}/>']
    if series.shape:
        for x, y in kept:
            tip = f"{series.name}, {x_label} {short_count(x)}: {fraction(y)}"
            parts.append(_marker(series.shape, to_x(x), to_y(y), tip))
    return f'<g class="{series.colour}{" faint" if series.is_faint else ""}">{"".join(parts)}</g>'


def _marker(shape: str, x: float, y: float, tip: str) -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return _SHAPES[shape].format(x=x, y=y, left=x - 3.2, top=y - 3.2, tip=title)


def _dash(series: Series) -> str:
    return f' stroke-dasharray="{series.dash}"' if series.dash else ""


def _legend_item(series: Series) -> str:
    marker = _marker(series.shape, 15, 7, "") if series.shape else ""
    name = series.name if series.points else f"{series.name}: {NOT_RUN}"
    return (
        f'<li><svg class="{series.colour}" width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="line" d="M0 7H30"{_dash(series)}/>{marker}</svg>{escape(name)}</li>'
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    """Text centred on x."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _figure(
    title: str, description: str, parts: Sequence[str], caption: str, *, legend: str, height: int = _HEIGHT
) -> str:
    label = escape(f"{title}: {description}")
    body = "\n".join(parts)
    return (
        f"<figure>\n<h3>{escape(title)}</h3>\n{legend}\n"
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {height}" aria-label="{label}">\n'
        f"{body}\n</svg>\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )
