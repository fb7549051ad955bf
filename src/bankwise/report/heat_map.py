"""Heat maps: panels of coloured cells over one colour scale.

The colours are the steps of `style.py`, which change with the page's theme; the text in a cell takes whichever of ink
and page colour is legible on its step. Cells too small for text are merged along a row where their steps are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN
from bankwise.report.style import STEPS, STRONG_STEPS
from bankwise.report.svg import CHARACTER, RIGHT, WIDTH, drawing, empty_figure, shortened, text_at

_WIDEST_LABEL = 18 * CHARACTER
_CELL_HEIGHT, _THIN_CELL_HEIGHT = 26, 9
_TOP = 8
_GAP, _OVERLAP = 1.5, 0.5
"""Between cells with text; of cells without, so that no seam shows between them."""
_SLANT = 35
"""Degrees by which column labels are turned where they do not fit side by side."""
_SINE = math.sin(math.radians(_SLANT))


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One grid: a row of values for each row label; None is a cell without a number."""

    name: str
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class Colours:
    """How values become steps of colour."""

    low: float
    high: float
    unit: str = ""
    is_diverging: bool = False
    """Two hues around 0, which is half-way between `low` and `high`."""

    def step(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return min(STEPS - 1, max(0, int(share * STEPS)))

    def css(self, step: int) -> str:
        return f"{'d' if self.is_diverging else 'h'}{step}"

    def is_strong(self, step: int) -> bool:
        return self.css(step) in STRONG_STEPS


def heat_maps(
    title: str,
    panels: Sequence[Panel],
    caption: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Colours,
    x_axis: str,
    y_axis: str,
    show: Callable[[float], str],
    has_text: bool,
    missing: Sequence[str] = (),
) -> str:
    """Panels of equal layout side by side; `missing` names the panels that were not run."""
    absent = f" {NOT_RUN[0].upper()}{NOT_RUN[1:]}: {', '.join(missing)}." if missing else ""
    if not panels or not rows or not columns:
        return empty_figure(title, caption + absent)
    drawn = "".join(
        f'<div><p class="panel">{escape(panel.name)}</p>'
        + _panel(title, panel, rows, columns, colours, x_axis, y_axis, show, has_text)
        + "</div>"
        for panel in panels
    )
    return (
        f'<figure class="wide">\n<h3>{escape(title)}</h3>\n{_key(colours, show)}\n<div class="panels">{drawn}</div>\n'
        f"<figcaption>{escape(caption + absent)}</figcaption>\n</figure>"
    )


def _panel(
    title: str,
    panel: Panel,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Colours,
    x_axis: str,
    y_axis: str,
    show: Callable[[float], str],
    has_text: bool,
) -> str:
    labels = [shortened(row, _WIDEST_LABEL) for row in rows]
    left = 14 + CHARACTER * max(4, *(len(label) for label in labels))
    width = (WIDTH - RIGHT - left) / len(columns)
    height = _CELL_HEIGHT if has_text else max(_THIN_CELL_HEIGHT, 60 / len(rows))
    bottom = _TOP + height * len(rows)
    parts = []
    every = 1 if height >= 18 else 5
    for i, label in enumerate(labels):
        if i % every == 0:
            tip = f"<title>{escape(rows[i])}</title>" if label != rows[i] else ""
            shown = text_at(left - 7, _TOP + height * (i + 0.5) + 5, label, anchor="end")
            parts.append(f"<g>{tip}{shown}</g>" if tip else shown)
    for i, values in enumerate(panel.values):
        parts += _cells(values, left, _TOP + height * i, width, height, colours, show if has_text else None)
    needed = max(len(shortened(column, _WIDEST_LABEL)) for column in columns) * CHARACTER
    is_slanted = has_text and needed + 6 > width
    end = bottom + (needed * _SINE + 14 if is_slanted else 20)
    stride = 1 if is_slanted else max(1, math.ceil((needed + 8) / width))
    for j in range(0, len(columns), stride):
        x, y = left + width * (j + 0.5), bottom + 19
        shown = text_at(x, y, shortened(columns[j], _WIDEST_LABEL), anchor="end" if is_slanted else "middle")
        parts.append(f'<g transform="rotate(-{_SLANT} {x:.1f} {y:.1f})">{shown}</g>' if is_slanted else shown)
    parts.append(text_at((left + WIDTH - RIGHT) / 2, end + 22, f"{x_axis} →", "label"))
    parts.append(text_at(4, end + 22, f"{y_axis} ↓", "label", "start"))
    return drawing(f"{title}, {panel.name}: {_description(panel, rows, show)}", parts, end + 30)


def _cells(
    values: Sequence[float | None],
    left: float,
    top: float,
    width: float,
    height: float,
    colours: Colours,
    show: Callable[[float], str] | None,
) -> list[str]:
    """The rectangles of one row, with their text where `show` is given."""
    parts = []
    start = 0
    while start < len(values):
        value = values[start]
        step = None if value is None else colours.step(value)
        end = start + 1
        while show is None and end < len(values) and _step(colours, values[end]) == step:
            end += 1
        x, gap = left + width * start, _GAP if show else -_OVERLAP
        css = "gap" if step is None else colours.css(step)
        parts.append(
            f'<rect class="{css}" x="{x:.1f}" y="{top:.1f}" width="{width * (end - start) - gap:.1f}" '
            f'height="{height - gap:.1f}"/>'
        )
        if show is not None:
            text = NOT_APPLICABLE if value is None else show(value)
            kind = "quiet" if step is None else "on-strong" if colours.is_strong(step) else ""
            parts.append(text_at(x + (width - gap) / 2, top + height / 2 + 4.5, text, kind))
        start = end
    return parts


def _step(colours: Colours, value: float | None) -> int | None:
    return None if value is None else colours.step(value)


def _key(colours: Colours, show: Callable[[float], str]) -> str:
    """The colour scale with its ends, and its middle where two hues meet."""
    swatches = "".join(
        f'<rect class="{colours.css(step)}" x="{14 * step}" y="0" width="14" height="14"/>' for step in range(STEPS)
    )
    high = f"{show(colours.high)}{colours.unit}{' (middle: 0)' if colours.is_diverging else ''}"
    return (
        f'<p class="scale">{escape(show(colours.low))} <svg width="{14 * STEPS}" height="14" '
        f'viewBox="0 0 {14 * STEPS} 14" aria-hidden="true">{swatches}</svg> {escape(high)}</p>'
    )


def _description(panel: Panel, rows: Sequence[str], show: Callable[[float], str]) -> str:
    """Range of each row, or of the whole panel where it has too many rows to listen to."""
    if len(rows) > 15:
        known = [value for values in panel.values for value in values if value is not None]
        return f"{len(rows)} rows, {_range(known, show)}"
    return "; ".join(
        f"{row} {_range([value for value in values if value is not None], show)}"
        for row, values in zip(rows, panel.values, strict=True)
    )


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(min(values))} to {show(max(values))}" if values else NOT_APPLICABLE
