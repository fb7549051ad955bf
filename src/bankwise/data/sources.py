"""The documents of a data source, whatever its kind, and their split into training and held-out text."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

from bankwise.config import DataSource
from bankwise.data.documents import Document, split_documents
from bankwise.data.files import directory_of, is_corpus, join_directories, read_files
from bankwise.data.hub import read_dataset
from bankwise.data.packages import read_package
from bankwise.data.synthetic import synthetic_documents
from bankwise.errors import DataError

__all__ = [
    "Document",
    "load_documents",
    "load_split",
    "load_training_documents",
    "source_name",
    "split_documents",
]


def load_documents(source: DataSource) -> list[Document]:
    """The documents of a source in a fixed order, at most `max_documents`.

    Blank texts and exact repetitions of an earlier text are left out. Halves of surrogate pairs, which a cut in the
    middle of an emoji leaves in JSON, become U+FFFD: no tokenizer takes them.
    """
    documents, seen = [], set()
    for document in map(_without_surrogates, _read(source)):
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            documents.append(document)
            if len(documents) == source.max_documents:
                break
    if not documents:
        raise DataError(f"{source.path} holds no text")
    return documents


def source_name(source: DataSource) -> str:
    """Name of a source in the split: its package, data set or task, or the last part of its path, wherever it lies."""
    kind, found, name = source.path.partition(":")
    if found and kind in ("package", "synthetic"):
        return source.path
    if found and kind == "hf":
        name = Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name
        return ":".join(part for part in ("hf", name, source.config_name, source.split) if part)
    return Path(source.path).expanduser().resolve().name


def load_split(source: DataSource, held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a source.

    With `concat_by: folder` the files are split and the two sides of a directory joined apart: a file is on the same
    side whether it is read alone or as a part of its directory.
    """
    path = Path(source.path).expanduser()
    if source.concat_by == "none" or not path.is_dir() or is_corpus(path):
        return split_documents(load_documents(source), held_out_fraction, source_name(source))
    files = load_documents(dataclasses.replace(source, concat_by="none", max_documents=0))
    directories = sorted({directory_of(file) for file in files})[: source.max_documents or None]
    chosen = [file for file in files if directory_of(file) in directories]
    train, held_out = split_documents(chosen, held_out_fraction, source_name(source))
    return join_directories(train), join_directories(held_out)


def load_training_documents(source: DataSource, held_out_fraction: float) -> list[Document]:
    """Training documents of a source, at least one; a source whose documents are all held out raises `DataError`."""
    documents, _ = load_split(source, held_out_fraction)
    if not documents:
        raise DataError(f"all documents of {source.path} are always held out; name it in perplexity.data, not in data")
    return documents


def _without_surrogates(document: Document) -> Document:
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError:
        whole = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return dataclasses.replace(document, text=whole)
    return document


def _read(source: DataSource) -> Iterator[Document]:
    match source.path.partition(":")[:2]:
        case ("package", ":"):
            return read_package(source.path)
        case ("hf", ":"):
            return read_dataset(source)
        case ("synthetic", ":"):
            return synthetic_documents(source)
    return read_files(source)
