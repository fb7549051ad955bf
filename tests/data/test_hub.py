"""Hugging Face datasets come as documents, whole or streamed, and what is wrong with one is said in one line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bankwise.config import DataSource
from bankwise.data import Document, load_documents, source_name
from bankwise.data.documents import row_id
from bankwise.errors import ConfigError, DataError

TEXTS = ["one", "two\nlines", "", "one", "drei ß"]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local folder that `datasets.load_dataset` opens, with its cache beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    pq.write_table(pa.table({"body": TEXTS, "n": range(5)}), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"body": ["held", "back"], "n": [1, 2]}), folder / "test-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_documents_known_by_their_text(dataset: str, streaming: bool) -> None:
    source = DataSource(path=dataset, text_field="body", streaming=streaming, max_documents=10)
    assert load_documents(source) == [Document(row_id(text), text) for text in ("one", "two\nlines", "drei ß")]


@pytest.mark.parametrize("streaming", [False, True])
def test_split_and_maximum_are_kept(dataset: str, streaming: bool) -> None:
    source = DataSource(path=dataset, text_field="body", split="test", streaming=streaming, max_documents=1)
    assert [document.text for document in load_documents(source)] == ["held"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"has no field 'text'; its fields are body, n; set text_field"),
        ({"text_field": "n"}, r"has int, not text, in field 'n' of row 0; set text_field"),
        ({"text_field": "body", "split": "dev"}, r"\(config_name=none, split='dev'\) cannot be read: .*train"),
        ({"text_field": "body", "config_name": "de"}, r"\(config_name=de, .* cannot be read: .*'de' not found"),
    ],
)
def test_mistakes_come_with_what_there_is(dataset: str, streaming: bool, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_documents(DataSource(path=dataset, streaming=streaming, max_documents=2, **settings))
    assert "\n" not in str(caught.value)


def test_dataset_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"hf:.*nowhere .*cannot be read: .*; check the name, .* or give a local folder"
    ):
        load_documents(DataSource(path=f"hf:{tmp_path / 'nowhere'}"))


def test_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(DataError, match=r"hf:org/name .* cannot be read: no network; check the name"):
        load_documents(DataSource(path="hf:org/name"))


def test_names_tell_configurations_and_splits_apart(tmp_path: Path) -> None:
    assert source_name(DataSource(path="hf:org/name")) == "hf:org/name:train"
    assert source_name(DataSource(path="hf:org/name", config_name="de", split="test")) == "hf:org/name:de:test"
    assert source_name(DataSource(path=f"hf:{tmp_path}")) == f"hf:{tmp_path.name}:train"


def test_stream_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="max_documents, since a stream has no end"):
        DataSource(path="hf:org/name", streaming=True)
