"""Documents of the texts in Debian packages and of the Brown corpus, given the folder of the unpacked package."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

from bankwise.data.documents import Document
from bankwise.errors import DataError

PERSUASION = "persuasion"
"""Id of the novel that is a haystack of evaluations, so never trained on."""

_XDR_STRINGS = b"\x00\x00\x00\x10"  # type of an R vector of strings
_XDR_STRING = 9  # type of one string, the last byte of its flags
_UP_LINK = re.compile(r'accesskey="u" href="([^"]+)"')
_NEXT_LINK = re.compile(r'accesskey="n" href="([^"]+)"')
_BROWN_SAMPLE = re.compile(r"c[a-r]\d\d")
_BEFORE_PUNCTUATION = re.compile(r" (?=[,.;:?!)])|(?<=\() ")


def read_austen(root: Path) -> Iterator[Document]:
    """One document per novel, by its title; *Persuasion* is held out."""
    path = root / "usr" / "lib" / "R" / "site-library" / "janeaustenr" / "data" / "Rdata.rdb"
    data = _read_bytes(path)
    while data:
        # A record: the length of its content, then a zlib stream that knows its own end.
        stream = zlib.decompressobj()
        lines = _first_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        title = next(line for line in lines if line.strip())
        name = "-".join(re.findall(r"[a-z]+", title.lower()))
        yield Document(name, "\n".join(lines).strip() + "\n", held_out=name == PERSUASION)


def _first_strings(record: bytes) -> list[str]:
    """The first string vector of an R serialisation."""
    start = record.index(_XDR_STRINGS) + len(_XDR_STRINGS)
    (count,) = struct.unpack_from(">i", record, start)
    start += 4
    lines: list[str] = []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", record, start)
        if flags & 0xFF != _XDR_STRING:
            raise DataError(f"string {len(lines)} of a novel has type {flags & 0xFF}; the R package has another layout")
        start += 8
        if length >= 0:  # -1 is a missing value
            lines.append(record[start : start + length].decode("utf-8"))
            start += length
    return lines


def read_linux(root: Path) -> Iterator[Document]:
    """One document per directory of the kernel's documentation, in English and not rendered."""
    (folder,) = _find(root, "usr/share/doc/linux-doc-*/Documentation")
    files = [
        file
        for file in folder.rglob("*")
        if file.name.removesuffix(".gz").endswith((".rst", ".txt"))
        and not {"html", "translations"} & set(file.relative_to(folder).parts)
    ]
    return _directories(folder, files)


def read_python(root: Path) -> Iterator[Document]:
    """One document per page of Python's documentation."""
    (folder,) = _find(root, "usr/share/doc/python3*/html/_sources")
    return _pages(folder, folder.rglob("*.rst.txt"))


def read_perl(root: Path) -> Iterator[Document]:
    """One document per manual page."""
    (folder,) = _find(root, "usr/share/perl/*")
    return _pages(folder, folder.rglob("*.pod"))


def read_postgresql(root: Path) -> Iterator[Document]:
    """One document per part of the manual: its pages in reading order."""
    (folder,) = _find(root, "usr/share/doc/postgresql-doc-*/html")
    pages = {path.name: _text_of(path) for path in sorted(folder.glob("*.html"))}
    above = {name: match[1] for name, page in pages.items() if (match := _UP_LINK.search(page))}
    parts: dict[str, list[str]] = {}
    name, seen = "index.html", {"index.html"}
    while (match := _NEXT_LINK.search(pages[name])) and match[1] in pages.keys() - seen:
        name = match[1]
        seen.add(name)
        part = name
        while above.get(part, "index.html") != "index.html":
            part = above[part]
        parts.setdefault(part, []).append(html_text(pages[name]))
    return (Document(part.removesuffix(".html"), "\n\n".join(texts)) for part, texts in parts.items())


def read_brown(root: Path) -> Iterator[Document]:
    """One document per sample, without the part-of-speech tags; all are held out."""
    for file in sorted((root / "package").iterdir()):
        if _BROWN_SAMPLE.fullmatch(file.name):
            paragraphs = []
            for line in _text_of(file).splitlines():
                text = " ".join(word.rsplit("/", 1)[0] for word in line.split())
                text = _BEFORE_PUNCTUATION.sub("", text.replace("`` ", '"').replace(" ''", '"'))
                if text:
                    paragraphs.append(text)
            yield Document(file.name, "\n".join(paragraphs) + "\n", held_out=True)


def html_text(page: str) -> str:
    """The text of an HTML page: a blank line between blocks, preformatted text as it is, no navigation."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    lines = "\n".join(line.rstrip() for line in "".join(parser.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


class _PageText(HTMLParser):
    """Collects the text of a page in `parts`."""

    _BLOCKS = frozenset(
        {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dl", "blockquote"}
    )
    _LINES = frozenset({"br", "li", "dt", "dd", "tr"})
    _HIDDEN = frozenset({"head", "script", "style"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._preformatted = 0
        self._hidden: list[str] = []  # the open tags from the one that hides what is in it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        is_navigation = tag == "div" and (dict(attrs).get("class") or "").startswith("nav")
        if is_navigation or tag in self._HIDDEN or (self._hidden and tag == self._hidden[0]):
            self._hidden.append(tag)
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden and tag == self._hidden[0]:
            self._hidden.pop()
        self._preformatted -= tag == "pre"
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in self._BLOCKS | self._LINES:
            self.parts.append("\n\n" if tag in self._BLOCKS else "\n")


def _directories(folder: Path, files: Iterable[Path]) -> Iterator[Document]:
    for directory, own in groupby(sorted(files, key=lambda f: (f.parent.as_posix(), f.name)), key=lambda f: f.parent):
        yield Document(directory.relative_to(folder).as_posix(), "\n\n".join(_text_of(file).strip() for file in own))


def _pages(folder: Path, files: Iterable[Path]) -> Iterator[Document]:
    return (Document(file.relative_to(folder).as_posix(), _text_of(file)) for file in sorted(files))


def _text_of(path: Path) -> str:
    """UTF-8, as nearly all these files are, or else Latin-1."""
    data = _read_bytes(path)
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _find(root: Path, pattern: str) -> list[Path]:
    """The one folder that a pattern fits."""
    found = sorted(path for path in root.glob(pattern) if path.is_dir() and not path.is_symlink())
    if not found:
        raise DataError(f"the package has no folder {pattern}; this release of Debian lays it out in another way")
    return found[:1]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name} is missing from the package ({error.strerror}); it has another layout") from error
