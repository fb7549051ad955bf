"""Curves over a number axis, and values with their errors, one row per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bankwise.report.formats import NOT_RUN, fraction, nats, short_count
from bankwise.report.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Points,
    Scale,
    Style,
    empty_figure,
    figure,
    legend,
    marker,
    nice_ticks,
    padded,
    scale,
    text_at,
    tick_labels,
    x_label,
    x_tick,
    y_axis,
)

_MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve or set of points."""

    name: str
    points: Points
    style: Style
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
    style: Style


def line_chart(
    title: str,
    series: Sequence[Series],
    caption: str,
    *,
    x_axis: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    has_whole_x: bool = False,
) -> str:
    """Curves over shared axes; the x axis starts at 0. A series without points is named "not run" in the legend."""
    drawn = [one for one in series if one.points]
    key = legend([(one.name, one.style, bool(one.points)) for one in series if not one.is_faint])
    if not drawn:
        return empty_figure(title, caption, key)
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    x_low, x_high = padded(min(xs), max(xs), 0.015) if has_whole_x else padded(min(0.0, *xs), max(xs), 0.0)
    to_x = scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    to_y, parts = y_axis(*(y_range or padded(min(ys), max(ys), 0.05)), y_label)
    for tick in nice_ticks(x_low, x_high, 8 if has_whole_x else 5):
        if not has_whole_x or tick == round(tick):
            parts.append(x_tick(to_x(tick), short_count(tick)))
    parts.append(x_label(x_axis))
    parts += [_curve(one, to_x, to_y, x_axis) for one in drawn]
    description = "; ".join(
        f"{one.name} from {fraction(one.points[0][1])} to {fraction(one.points[-1][1])}"
        for one in drawn
        if not one.is_faint
    )
    return figure(title, description, parts, caption, legend=key)


def interval_chart(title: str, rows: Sequence[Interval], caption: str, *, x_axis: str) -> str:
    """One row per name: the value as a marker with its number above, one standard error as whiskers."""
    row_height, left, right, top = 44, 104, WIDTH - 26, 14
    bottom = top + row_height * len(rows)
    ends = [row.value + sign * row.error for row in rows if row.value is not None for sign in (-1, 1)]
    low, high = padded(min(ends, default=0.0), max(ends, default=1.0), 0.08)
    to_x = scale(low, high, left, right)
    parts = []
    ticks = nice_ticks(low, high, 5)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        parts.append(f'<line class="grid" x1="{to_x(tick):.1f}" x2="{to_x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(text_at(to_x(tick), bottom + 20, label))
    for i, row in enumerate(rows):
        y = top + row_height * (i + 0.64)
        parts.append(text_at(left - 10, y + 5, row.name, anchor="end"))
        if row.value is None:
            parts.append(text_at(left + 8, y + 5, NOT_RUN, "quiet", "start"))
            continue
        x, x_from, x_to = to_x(row.value), to_x(row.value - row.error), to_x(row.value + row.error)
        whiskers = f"M{x_from:.1f} {y:.1f}H{x_to:.1f}M{x_from:.1f} {y - 5:.1f}v10M{x_to:.1f} {y - 5:.1f}v10"
        sign = marker(row.style.shape, x, y, f"{row.name}: {nats(row.value)} ± {nats(row.error)} {x_axis}")
        parts.append(f'<g class="{row.style.colour}"><path class="line" d="{whiskers}"/>{sign}</g>')
        parts.append(text_at(min(max(x, left + 28), right), y - 10, nats(row.value), "value"))
    parts.append(text_at((left + right) / 2, bottom + 43, x_axis, "label"))
    description = "; ".join(f"{row.name} {NOT_RUN if row.value is None else nats(row.value)}" for row in rows)
    return figure(title, description, parts, caption, legend="", height=bottom + 50)


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """Centred mean over `window` (odd) neighbours; near the ends the window shrinks evenly, so nothing is shifted."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(window // 2, i, len(points) - 1 - i)
        smoothed.append((x, fmean(y for _, y in points[i - reach : i + reach + 1])))
    return smoothed


def _curve(series: Series, to_x: Scale, to_y: Scale, x_axis: str) -> str:
    kept = list(series.points[:: -(-len(series.points) // _MAX_POINTS)])
    if kept[-1] != series.points[-1]:
        kept.append(series.points[-1])
    path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in kept)
    parts = [f'<path class="line" d="M{path}"{series.style.dash_attribute}/>']
    if not series.is_faint:
        for x, y in kept:
            tip = f"{series.name}, {x_axis} {short_count(x)}: {fraction(y)}"
            parts.append(marker(series.style.shape, to_x(x), to_y(y), tip))
    return f'<g class="{series.style.colour}{" faint" if series.is_faint else ""}">{"".join(parts)}</g>'
