"""Values with error bars over categories, one series per model, and points in a plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bankwise.report.formats import NOT_RUN
from bankwise.report.svg import (
    CHARACTER,
    HEIGHT,
    LEFT,
    LEVEL_STYLE,
    LINE,
    RIGHT,
    WIDTH,
    Style,
    empty_figure,
    figure,
    legend,
    marker,
    nice_ticks,
    padded,
    scale,
    shortened,
    text_at,
    tick_labels,
    x_label,
    x_tick,
    y_axis,
)


@dataclass(frozen=True, kw_only=True)
class ErrorSeries:
    """One model: per category the value and its standard error (0: unknown), or None."""

    name: str
    values: Sequence[tuple[float, float] | None]
    style: Style

    @property
    def known(self) -> list[tuple[float, float]]:
        return [pair for pair in self.values if pair is not None]


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class PlacedPoint:
    """One labelled point of a scatter chart; None: not run."""

    name: str
    place: tuple[float, float] | None
    style: Style
    is_labelled: bool = False
    """Named beside its marker, not in the legend."""


def error_chart(
    title: str,
    categories: Sequence[str],
    series: Sequence[ErrorSeries],
    caption: str,
    *,
    x_axis: str,
    y_label: str,
    show: Callable[[float], str],
    level: Level | None = None,
    is_joined: bool = True,
) -> str:
    """Markers by category, joined by lines where categories have an order; whiskers reach one standard error.

    Markers with whiskers stand side by side, so that they can be told apart; others stand on their category.
    """
    drawn = [one for one in series if one.known]
    entries = [(one.name, one.style, bool(one.known)) for one in series]
    key = legend([*entries, *([(level.name, LEVEL_STYLE, True)] if level else [])])
    if not drawn:
        return empty_figure(title, caption, key)
    ends = [value + sign * error for one in drawn for value, error in one.known for sign in (-1, 1)]
    ends += [level.value] if level else []
    to_y, parts = y_axis(*padded(min(ends), max(ends), 0.06), y_label)
    slot = (WIDTH - RIGHT - LEFT) / len(categories)
    # Labels that would touch stand on two lines in turn.
    lines = 1 + any(len(category) * CHARACTER > slot for category in categories)
    for i, category in enumerate(categories):
        x = LEFT + slot * (i + 0.5)
        label = shortened(category, 0.95 * slot * lines)
        inward = min(0.0, WIDTH - x - len(label) * CHARACTER / 2)
        parts.append(x_tick(x, label, lines_down=i % lines, shift=inward))
    parts.append(x_label(x_axis, lines_down=lines - 1))
    if level:
        y = to_y(level.value)
        parts.append(
            f'<g class="{LEVEL_STYLE.colour}"><path class="line" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"'
            f"{LEVEL_STYLE.dash_attribute}/></g>"
        )
    has_errors = any(error for one in drawn for _, error in one.known)
    spread = min(14.0, 0.7 * slot / len(drawn)) if has_errors else 0.0
    for k, one in enumerate(drawn):
        shift = spread * (k - (len(drawn) - 1) / 2)
        places = [LEFT + slot * (i + 0.5) + shift for i in range(len(categories))]
        parts.append(_series(one, places, categories, to_y, show, is_joined))
    description = "; ".join(f"{one.name} " + ", ".join(_with_error(pair, show) for pair in one.known) for one in drawn)
    return figure(title, description, parts, caption, legend=key, height=HEIGHT + LINE * (lines - 1))


def scatter_chart(
    title: str, points: Sequence[PlacedPoint], caption: str, *, x_axis: str, y_label: str, show: Callable[[float], str]
) -> str:
    """Points over two number axes; the x axis starts at 0."""
    placed = [(point, point.place) for point in points if point.place]
    key = legend([(point.name, point.style, bool(point.place)) for point in points if not point.is_labelled])
    if not placed:
        return empty_figure(title, caption, key)
    x_high = 1.12 * max(place[0] for _, place in placed) or 1.0
    ys = [place[1] for _, place in placed]
    to_x = scale(0.0, x_high, LEFT, WIDTH - RIGHT)
    to_y, parts = y_axis(*padded(min(ys), max(ys), 0.1), y_label)
    ticks = nice_ticks(0.0, x_high, 5)
    parts += [x_tick(to_x(tick), shown) for tick, shown in zip(ticks, tick_labels(ticks), strict=True)]
    parts.append(x_label(x_axis))
    for point, (x, y) in placed:
        tip = f"{point.name}: {show(y)} at {x:.3g} {x_axis}"
        parts.append(f'<g class="{point.style.colour}">{marker(point.style.shape, to_x(x), to_y(y), tip)}</g>')
        if point.is_labelled:
            is_left = to_x(x) > WIDTH * 0.6
            name, anchor = shortened(point.name, WIDTH / 2), "end" if is_left else "start"
            parts.append(text_at(to_x(x) + (-9 if is_left else 9), to_y(y) + 5, name, "", anchor))
    description = "; ".join(f"{point.name} {show(place[1])} at {place[0]:.3g}" for point, place in placed)
    absent = [point.name for point in points if not point.place]
    description += f"; {NOT_RUN}: {', '.join(absent)}" if absent else ""
    return figure(title, description, parts, caption, legend=key)


def _series(
    series: ErrorSeries,
    places: Sequence[float],
    categories: Sequence[str],
    to_y: Callable[[float], float],
    show: Callable[[float], str],
    is_joined: bool,
) -> str:
    """Lines between neighbouring categories, whiskers and markers."""
    parts = []
    known = [(x, name, pair) for x, name, pair in zip(places, categories, series.values, strict=True) if pair]
    if is_joined:
        path = "L".join(f"{x:.1f} {to_y(pair[0]):.1f}" for x, _, pair in known)
        parts.append(f'<path class="line thin" d="M{path}"{series.style.dash_attribute}/>')
    for x, category, pair in known:
        value, error = pair
        y, low, high = to_y(value), to_y(value - error), to_y(value + error)
        if error:
            caps = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
            parts.append(f'<path class="line thin" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>')
        parts.append(marker(series.style.shape, x, y, f"{series.name}, {category}: {_with_error(pair, show)}"))
    return f'<g class="{series.style.colour}">{"".join(parts)}</g>'


def _with_error(pair: tuple[float, float], show: Callable[[float], str]) -> str:
    value, error = pair
    return f"{show(value)} ± {show(error)}" if error else show(value)
