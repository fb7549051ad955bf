"""Documents of a Hugging Face dataset (`hf:NAME`), downloaded whole or read as a stream.

NAME is what `datasets.load_dataset` takes: a name on the hub, or a local folder of .parquet, .jsonl or .csv files.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from bankwise.config import DataSource
from bankwise.data.documents import Document, row_id
from bankwise.errors import DataError


def read_dataset(source: DataSource) -> Iterator[Document]:
    """Documents in the dataset's order, each known by a hash of its text."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = source.path.removeprefix("hf:")
    try:
        dataset = load_dataset(name, source.config_name or None, split=source.split, streaming=source.streaming)
        columns = dataset.column_names
        if columns is not None:  # a stream may not know them before its first row
            _check_field(columns, source)
            dataset = dataset.select_columns([source.text_field])
        for number, row in enumerate(dataset):
            yield _document(row, number, source)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: a data set that is a script
        raise DataError(
            f"{source.path} (config_name={source.config_name or 'none'}, split={source.split!r}) cannot be read: "
            f"{' '.join(str(error).split())}; check the name, config_name, split and network, or give a local folder"
        ) from error


def _check_field(columns: Iterable[str], source: DataSource) -> None:
    if source.text_field not in columns:
        raise DataError(
            f"{source.path} has no field {source.text_field!r}; its fields are {', '.join(columns)}; set text_field"
        )


def _document(row: dict[str, Any], number: int, source: DataSource) -> Document:
    _check_field(row, source)
    text = row[source.text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{source.path} has {type(text).__name__}, not text, in field {source.text_field!r} of row {number}; "
            "set text_field"
        )
    return Document(row_id(text or ""), text or "")
