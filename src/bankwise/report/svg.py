"""Parts that all charts share: scales, ticks, markers, text, and the `<figure>` around an inline SVG.

Charts are drawn by hand so that they follow the page's colours (light and dark) and font size. Colours are the classes
`c-...` of `style.py`; dashes and marker shapes tell the series apart without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bankwise.report.formats import NOT_RUN

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 36, 50
"""Margins around the plot."""
CHARACTER, LINE = 10.3, 18
"""Widest advance of a character and height of a line of text, in chart units, at the font size of a phone."""

_SHAPES = {
    "circle": '<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6">{tip}</circle>',
    "hollow": '<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="3.4">{tip}</circle>',
    "square": '<rect x="{left:.1f}" y="{top:.1f}" width="6.4" height="6.4">{tip}</rect>',
    "diamond": '<path d="M{x:.1f} {y:.1f}m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z">{tip}</path>',
    "triangle": '<path d="M{x:.1f} {y:.1f}m0 -4.8l4.6 8.2h-9.2z">{tip}</path>',
    "cross": '<path class="line" d="M{x:.1f} {y:.1f}m-3.6 -3.6l7.2 7.2m0 -7.2l-7.2 7.2">{tip}</path>',
    "plus": '<path class="line" d="M{x:.1f} {y:.1f}m-4.2 0h8.4m-4.2 -4.2v8.4">{tip}</path>',
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one series looks."""

    colour: str
    """CSS class."""
    shape: str = ""
    """Marker, a key of `_SHAPES`; empty: none."""
    dash: str = ""
    """SVG dash pattern of the line; empty: solid."""

    @property
    def dash_attribute(self) -> str:
        return f' stroke-dasharray="{self.dash}"' if self.dash else ""


STYLES = {
    "dense": Style(colour="c-dense", shape="square", dash="2 4"),
    "companion": Style(colour="c-companion", shape="diamond", dash="7 3"),
    "dense_narrow": Style(colour="c-dense_narrow", shape="triangle", dash="9 3 2 3"),
    "untrained": Style(colour="c-untrained", shape="hollow", dash="4 2"),
    "sparse": Style(colour="c-sparse", shape="circle"),
    "repaired": Style(colour="c-repaired", shape="cross", dash="12 3"),
}
"""The look of each column of the report, the same in every chart."""

BASELINE_STYLE = Style(colour="c-dense", shape="plus")
LEVEL_STYLE = Style(colour="c-dense", dash="2 4")
"""Of a horizontal line to compare with: chance, a random choice."""


def marker(shape: str, x: float, y: float, tip: str) -> str:
    """The sign of a series at (x, y), with `tip` shown under the pointer; nothing for a series without one."""
    if not shape:
        return ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return _SHAPES[shape].format(x=x, y=y, left=x - 3.2, top=y - 3.2, tip=title)


def text_at(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    """Text at (x, y), centred on x unless `anchor` says otherwise."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<text{attribute} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def legend(entries: Sequence[tuple[str, Style, bool]]) -> str:
    """A list of (name, style, whether the series has data)."""
    return f'<ul class="legend">{"".join(_legend_item(*entry) for entry in entries)}</ul>'


def _legend_item(name: str, style: Style, has_data: bool) -> str:
    sign = marker(style.shape, 15, 7, "")
    shown = name if has_data else f"{name}: {NOT_RUN}"
    return (
        f'<li><svg class="{style.colour}" width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="line" d="M0 7H30"{style.dash_attribute}/>{sign}</svg>{escape(shown)}</li>'
    )


def figure(
    title: str, description: str, parts: Sequence[str], caption: str, *, legend: str, height: int = HEIGHT
) -> str:
    """A chart with heading, legend (HTML) and caption; `description` is read aloud in its place."""
    return (
        f"<figure>\n<h3>{escape(title)}</h3>\n{legend}\n{drawing(f'{title}: {description}', parts, height)}\n"
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def drawing(label: str, parts: Sequence[str], height: float) -> str:
    body = "\n".join(parts)
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height:g}" aria-label="{escape(label)}">\n{body}\n</svg>'
    )


def empty_figure(title: str, caption: str, legend: str = "") -> str:
    parts = [text_at(WIDTH / 2, 50, NOT_RUN, "quiet")]
    return figure(title, NOT_RUN, parts, caption, legend=legend, height=90)


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


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)


def scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def y_axis(low: float, high: float, label: str) -> tuple[Scale, list[str]]:
    """The vertical scale of a plot of standard size, and its grid lines with their numbers and label."""
    to_y = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = []
    ticks = nice_ticks(low, high, 5)
    for tick, shown in zip(ticks, tick_labels(ticks), strict=True):
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text_at(LEFT - 7, y + 5, shown, anchor="end"))
    return to_y, [*parts, text_at(4, 16, shortened(label, WIDTH), "label", "start")]


def x_tick(x: float, label: str, lines_down: int = 0, shift: float = 0.0) -> str:
    """A tick and its label, which may stand some lines lower or to the side."""
    bottom = HEIGHT - BOTTOM
    line = f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
    return line + text_at(x + shift, bottom + 20 + LINE * lines_down, label)


def x_label(label: str, lines_down: int = 0) -> str:
    return text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7 + LINE * lines_down, label, "label")


def shortened(label: str, width: float) -> str:
    """The label, cut with an ellipsis where it is wider than `width` chart units."""
    fits = max(2, int(width / CHARACTER))
    return label if len(label) <= fits else f"{label[: fits - 1]}…"
