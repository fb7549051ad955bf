"""The parts that a report consists of. Each is said once and printed both as HTML and as Markdown.

A part of a `Document` has `html()` and `markdown()`; either may be empty (a chart has no Markdown).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from bankwise.report.formats import NOT_RUN
from bankwise.report.style import STYLE
from bankwise.report.table import Table, muted

PAPER = "https://arxiv.org/abs/2606.10722"


class Part(Protocol):
    def html(self) -> str: ...

    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Paragraph:
    text: str
    is_quiet: bool = False

    def html(self) -> str:
        kind = ' class="quiet"' if self.is_quiet else ""
        return f"<p{kind}>{escape(self.text)}</p>"

    def markdown(self) -> str:
        return _flat(self.text)


@dataclass(frozen=True)
class Heading:
    text: str

    def html(self) -> str:
        return f"<h3>{escape(self.text)}</h3>"

    def markdown(self) -> str:
        return f"### {_flat(self.text)}"


@dataclass(frozen=True)
class Box:
    """Lines that a reader must not miss; `is_alarm`: the run broke a promise."""

    lines: Sequence[str]
    is_alarm: bool = False

    def html(self) -> str:
        lines = "".join(f"<p>{_linked(escape(line))}</p>" for line in self.lines)
        return f'<div class="notice{" alarm" if self.is_alarm else ""}" role="note">{lines}</div>'

    def markdown(self) -> str:
        return "\n\n".join(f"> {_flat(line)}" for line in self.lines)


@dataclass(frozen=True)
class Tiles:
    """A few numbers at a glance, by name."""

    values: Mapping[str, str]

    def html(self) -> str:
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd{muted(value)}>{escape(value)}</dd></div>"
            for name, value in self.values.items()
        )
        return f'<dl class="tiles">{tiles}</dl>'

    def markdown(self) -> str:
        return "\n".join(f"- {_flat(name)}: {_flat(value)}" for name, value in self.values.items())


@dataclass(frozen=True)
class Shown:
    """A table; "not run" where it has no rows. Folded: opened by a click."""

    table: Table
    is_folded: bool = False

    def html(self) -> str:
        title = escape(self.table.title)
        if not self.is_folded:
            return self.table.html() if self.table.rows else f'<p class="muted">{title}: {NOT_RUN}</p>'
        content = self.table.html() if self.table.rows else f'<p class="muted">{NOT_RUN}</p>'
        return f"<details><summary>{title}</summary><div>{content}</div></details>"

    def markdown(self) -> str:
        return f"### {_flat(self.table.title)}\n\n{self.table.markdown() if self.table.rows else f'{NOT_RUN}.'}"


@dataclass(frozen=True)
class Figures:
    """Charts as HTML, two beside each other on a wide page; empty ones are left out."""

    charts: Sequence[str]

    def html(self) -> str:
        return f'<div class="figures">{"".join(self.charts)}</div>' if any(self.charts) else ""

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Quotes:
    """Named texts, word for word: the first over the whole width, the others beside each other."""

    texts: Mapping[str, str]

    def html(self) -> str:
        first, *others = (
            f"<h3>{escape(name)}</h3>\n<blockquote>{escape(text)}</blockquote>" for name, text in self.texts.items()
        )
        return f'{first}\n<div class="pair">{"".join(f"<div>{other}</div>" for other in others)}</div>'

    def markdown(self) -> str:
        return "\n\n".join(f"{_flat(name)}:\n\n{_fenced(text)}" for name, text in self.texts.items())


@dataclass(frozen=True)
class Code:
    """A file, word for word, opened by a click."""

    title: str
    text: str
    language: str

    def html(self) -> str:
        return f'<details><summary>{escape(self.title)}</summary><pre tabindex="0">{escape(self.text)}</pre></details>'

    def markdown(self) -> str:
        return f"{_flat(self.title)}:\n\n{_fenced(self.text, self.language)}"


@dataclass(frozen=True)
class Section:
    heading: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-")

    def html(self) -> str:
        content = "\n".join(html for part in self.parts if (html := part.html()))
        return f'<section>\n<h2 id="{self.anchor}">{escape(self.heading)}</h2>\n{content}\n</section>\n'

    def markdown(self) -> str:
        parts = [f"## {_flat(self.heading)}", *(part.markdown() for part in self.parts)]
        return "\n\n".join(part for part in parts if part) if any(parts[1:]) else ""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report. `opening` stands before the sections."""

    title: str
    opening: Sequence[Part]
    sections: Sequence[Section]
    has_contents: bool = False
    """Whether links to the sections stand above them."""

    def html(self) -> str:
        """The page as one string: no script, no request."""
        links = "".join(
            f'<li><a href="#{section.anchor}">{escape(section.heading)}</a></li>' for section in self.sections
        )
        contents = f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if self.has_contents else ""
        opening = "\n".join(part.html() for part in self.opening)
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(self.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(self.title)}</h1>
{opening}
{contents}{"".join(section.html() for section in self.sections)}</main>
</body>
</html>
"""

    def markdown(self) -> str:
        """The same statements and tables."""
        parts = [f"# {_flat(self.title)}", *(part.markdown() for part in (*self.opening, *self.sections))]
        return "\n\n".join([*(part for part in parts if part), "Figures: see report.html."]) + "\n"


def _linked(text: str) -> str:
    return text.replace("arXiv 2606.10722", f'<a href="{PAPER}">arXiv 2606.10722</a>')


def _flat(text: str) -> str:
    return escape(" ".join(text.split()), quote=False)


def _fenced(text: str, language: str = "") -> str:
    """A Markdown code block whose fence is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
