"""The token cache: what it holds, when it is read, and what makes it a different one."""

import copy
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from bankwise.config import DataSource
from bankwise.data import load_split, tokenized
from bankwise.data.tokenized import tokenized_training_split
from bankwise.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index:02}.txt").write_text(f"hello {index} " * (index + 1), encoding="utf-8")
    return folder


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Grows by one with each batch of texts that is tokenised."""
    calls: list[int] = []
    encode = tokenized.encode
    monkeypatch.setattr(
        tokenized, "encode", lambda texts, tokenizer: calls.append(len(texts)) or encode(texts, tokenizer)
    )
    return calls


def documents(result) -> list[list[int]]:
    tokens = result.tokens()
    return [tokens[start : start + n].tolist() for start, n in zip(result.starts, result.lengths, strict=True)]


def test_the_training_documents_are_there_in_order_each_with_its_eos(folder, tokenizer):
    source = DataSource(path=str(folder))
    train, held_out = load_split(source, 0.2)
    result = documents(tokenized_training_split(source, tokenizer, 0.2))
    assert result == [[*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id] for document in train]
    assert held_out


def test_a_second_call_reads_the_cache(folder, tokenizer, encodings, cache):
    source = DataSource(path=str(folder))
    first = tokenized_training_split(source, tokenizer, 0.2)
    assert len(encodings) == 1
    again = tokenized_training_split(source, tokenizer, 0.2)
    assert len(encodings) == 1
    assert documents(first) == documents(again)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_another_file_split_or_tokenizer_is_tokenised_anew(folder, tokenizer, encodings):
    source = DataSource(path=str(folder))
    tokenized_training_split(source, tokenizer, 0.2)
    (folder / "03.txt").write_text("hellO 3 " * 4, encoding="utf-8")
    changed = documents(tokenized_training_split(source, tokenizer, 0.2))
    assert len(encodings) == 2
    assert tokenizer("hellO 3 ")["input_ids"][:5] in [ids[:5] for ids in changed]
    tokenized_training_split(source, tokenizer, 0.5)
    assert len(encodings) == 3
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["hello"])
    assert len(documents(tokenized_training_split(source, other, 0.2))[0]) < len(changed[0])
    assert len(encodings) == 4


def test_a_torn_folder_is_written_again(folder, tokenizer, encodings, cache):
    source = DataSource(path=str(folder))
    first = documents(tokenized_training_split(source, tokenizer, 0.2))
    (file,) = cache.glob("*/tokens.bin")
    file.write_bytes(file.read_bytes()[:-10])
    assert documents(tokenized_training_split(source, tokenizer, 0.2)) == first
    assert len(encodings) == 2


def test_what_a_killed_process_left_is_written_over(folder, tokenizer, cache):
    source = DataSource(path=str(folder))
    first = documents(tokenized_training_split(source, tokenizer, 0.2))
    (whole,) = (file.parent for file in cache.glob("*/tokens.bin"))
    whole.rename(cache / f".{whole.name}.partial")
    assert documents(tokenized_training_split(source, tokenizer, 0.2)) == first
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_documents_outside_the_limits_are_left_out(folder, tokenizer, encodings):
    lengths = tokenized_training_split(DataSource(path=str(folder)), tokenizer, 0.2).lengths
    low, high = np.quantile(lengths, [0.3, 0.7]).astype(int).tolist()
    source = DataSource(path=str(folder), min_tokens=low, max_tokens=high)
    result = tokenized_training_split(source, tokenizer, 0.2)
    assert result.lengths.tolist() == [n for n in lengths if low <= n <= high]
    assert [len(ids) for ids in documents(result)] == result.lengths.tolist()
    assert len(encodings) == 1, "the limits choose among cached documents"
    with pytest.raises(DataError, match=r"no training document of min_tokens=10000 to max_tokens=any.*have \d+ to \d+"):
        tokenized_training_split(DataSource(path=str(folder), min_tokens=10_000), tokenizer, 0.2)


def test_a_cache_that_cannot_be_written_is_named(folder, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set BANKWISE_CACHE"):
        tokenized_training_split(DataSource(path=str(folder)), tokenizer, 0.2)


def ask(source, tokenizer, barrier, results):
    barrier.wait()
    results.put(documents(tokenized_training_split(source, tokenizer, 0.2)))


def test_processes_that_start_together_write_one_cache(folder, tokenizer, cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    source = DataSource(path=str(folder))
    workers = [context.Process(target=ask, args=(source, tokenizer, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert all(answer == answers[0] for answer in answers)
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]
