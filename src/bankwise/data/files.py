"""Documents of local files: text, .jsonl, .parquet, folders of text, and folders written by `bankwise data build`.

Every mistake in a file is named by its line or column.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from bankwise.config import DataSource
from bankwise.data.documents import Document, row_id
from bankwise.errors import ConfigError, DataError
from bankwise.files import file_sha256

TEXT_KINDS = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts")
"""Files that a folder is read for."""

MANIFEST = "manifest.json"
ORIGIN_FIELD, HELD_OUT_FIELD = "bankwise_source", "bankwise_held_out"
"""Fields of a row that `bankwise data build` wrote, beside `id` and `text`."""

_KINDS = f"a folder of text files ({', '.join(TEXT_KINDS)})"


def read_files(source: DataSource) -> Iterator[Document]:
    """Documents of a local path, in the order of the paths and rows."""
    path = Path(source.path).expanduser()
    if not path.exists():
        raise DataError(
            f"{source.path} does not exist; give a file, {_KINDS}, or a source package:NAME, hf:NAME, synthetic:TASK"
        )
    if source.concat_by != "none" and (path.is_file() or is_corpus(path)):
        kind = "a file" if path.is_file() else "a corpus of `bankwise data build`"
        raise ConfigError(f"concat_by={source.concat_by!r} joins the files of a folder, but {source.path} is {kind}")
    if path.is_dir() and is_corpus(path):
        return _read_corpus(path)
    if path.is_dir():
        documents = read_folder(path)
        return iter(join_directories(list(documents))) if source.concat_by == "folder" else documents
    match path.suffix.lower():
        case ".jsonl":
            return _read_jsonl(path, source.text_field)
        case ".parquet":
            return _read_parquet(path, source.text_field)
        case suffix if suffix in TEXT_KINDS:
            return iter([Document(path.name, read_text(path))])
    raise DataError(f"{source.path} is not of a known kind; use .txt, .jsonl, .parquet, or {_KINDS}")


def is_corpus(folder: Path) -> bool:
    """Whether `bankwise data build` wrote the folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [(entry["file"], entry["sha256"]) for entry in manifest["sources"].values()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder / MANIFEST} is not a manifest of `bankwise data build` ({type(error).__name__}: {error}); "
            "rename it, or build the corpus again"
        ) from error
    if not files:
        raise DataError(f"{folder / MANIFEST} lists no source; build the corpus again")
    return dict(manifest)


def read_folder(folder: Path, pattern: str = "*") -> Iterator[Document]:
    """One document per text file, by its path in the folder."""
    return (Document(file.relative_to(folder).as_posix(), read_text(file)) for file in _text_files(folder, pattern))


def directory_of(document: Document) -> str:
    """The directory of a document that is a file of a folder, relative to the folder."""
    return PurePosixPath(document.id).parent.as_posix()


def join_directories(files: Sequence[Document]) -> list[Document]:
    """One document per directory: its own files in path order, a blank line between them."""
    by_directory = sorted(files, key=lambda file: (directory_of(file), file.id))
    return [
        Document(directory, "\n\n".join(text for file in own if (text := file.text.strip("\n"))))
        for directory, own in groupby(by_directory, key=directory_of)
    ]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, f"byte {error.start}")) from error


def _text_files(folder: Path, pattern: str = "*") -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob(pattern)
        if file.suffix.lower() in TEXT_KINDS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder} holds no text files ({', '.join(TEXT_KINDS)})")
    return files


def _read_corpus(folder: Path) -> Iterator[Document]:
    """The documents of every source in the manifest; a file that is not as it was written is refused."""
    for name, entry in read_manifest(folder)["sources"].items():
        path = folder / entry["file"]
        found = file_sha256(path) if path.is_file() else "no such file"
        if found != entry["sha256"]:
            raise DataError(
                f"{path} is not the file that {MANIFEST} lists for {name} (sha256 {entry['sha256'][:12]}..., found "
                f"{found[:12]}); build the corpus again with `bankwise data build`"
            )
        yield from _read_jsonl(path, "text")


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
            if ORIGIN_FIELD in row:
                yield Document(str(row["id"]), text or "", str(row[ORIGIN_FIELD]), bool(row.get(HELD_OUT_FIELD)))
            else:
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
    """A row as a document; null is blank."""
    return Document(row_id(text or ""), text or "")


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"


def _not_utf8(path: Path, place: str) -> str:
    return f"{path} is not UTF-8 text ({place}); convert it, for example with `iconv -f latin1 -t utf-8`"
