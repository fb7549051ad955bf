"""A table that is built once and printed as text, Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bankwise.report.formats import NOT_APPLICABLE, NOT_RUN

_LONG = 16
"""Rows above which a table scrolls in a box of its own, so that its header stays in view."""

_NARROW = 5
"""Columns that fit on a phone; broader tables scroll, so their cells need not be squeezed."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value with smaller lines below it."""

    text: str
    small: tuple[str, ...] = ()
    is_grey: bool = False
    """Set back, because the value says little: grey on the page, italic in Markdown."""

    def html(self) -> str:
        small = f"<small>{'<br>'.join(escape(line) for line in self.small)}</small>" if self.small else ""
        return escape(self.text) + small

    def markdown(self) -> str:
        text = _markdown_line(self.text)
        text = f"*{text}*" if self.is_grey and text else text
        return "<br>".join([*([text] if text else []), *map(_markdown_line, self.small)])


Line = Sequence[str | Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Header, rows of text or cells (the first one is the row's name), and a note on how to read them."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Line]
    note: str = ""
    numeric: bool = True
    """Whether the cells after the first are numbers, set flush right."""

    def text(self) -> str:
        """Aligned columns for a terminal, without the smaller lines."""
        lines = [self.header, *([_cell(cell).text for cell in line] for line in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        rule = ["-" * width for width in widths]
        align = str.rjust if self.numeric else str.ljust
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(align, line[1:], widths[1:])]).rstrip()
            for line in [lines[0], rule, *lines[1:]]
        )

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table, with its note below."""
        rule = ["---", *["---:" if self.numeric else "---"] * (len(self.header) - 1)]
        cells = [[_cell(cell).markdown() for cell in line] for line in (self.header, *self.rows)]
        lines = ["| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])]
        return "\n".join([*lines, *(["", escape(self.note, quote=False)] if self.note else [])])

    def html(self) -> str:
        """A `<table>` in a box that scrolls by itself, with its note below."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        rows = "\n".join(
            f'<tr><th scope="row"{_class(_cell(line[0]))}>{_cell(line[0]).html()}</th>'
            + "".join(f"<td{_class(_cell(cell))}>{_cell(cell).html()}</td>" for cell in line[1:])
            + "</tr>"
            for line in self.rows
        )
        note = f'\n<p class="note">{escape(self.note)}</p>' if self.note else ""
        kind = "numbers" if self.numeric else "words"
        is_broad = len(self.header) > _NARROW or any(_cell(cell).small for line in self.rows for cell in line)
        kind += " broad" if is_broad else ""
        box = "scroll long" if len(self.rows) > _LONG else "scroll"
        return (
            f'<div class="{box}" role="region" aria-label="{escape(self.title)}" tabindex="0">'
            f'<table class="{kind}"><caption>{escape(self.title)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
        )


def muted(text: str) -> str:
    """The class attribute of a text that stands for a missing value."""
    return ' class="muted"' if text in (NOT_RUN, NOT_APPLICABLE) else ""


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(text=cell)


def _class(cell: Cell) -> str:
    return ' class="grey"' if cell.is_grey else muted(cell.text)


def _markdown_line(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
