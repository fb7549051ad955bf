"""Training rows of several sources: shares, epochs, long documents, order, and no held-out text."""

import logging
import pickle

import numpy as np
import pytest
import torch

from bankwise.config import DataSource, Packing
from bankwise.data import load_split, mixture, training_rows
from bankwise.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_source(tmp_path):
    """Factory: a folder of documents of one letter and their number, of the given lengths (in tokens, with eos)."""

    def make(name, lengths, first_letter="a", **settings):
        (tmp_path / name).mkdir()
        for index, length in enumerate(lengths):
            text = chr(ord(first_letter) + index % 11) * (length - 1 - len(str(index))) + str(index)
            (tmp_path / name / f"{index:04}.txt").write_text(text, encoding="utf-8")
        return DataSource(path=str(tmp_path / name), **settings)

    return make


@pytest.fixture
def rows(tokenizer):
    """Factory of training rows."""

    def make(sources, num_rows, seq_len=32, seed=0, **packing):
        return training_rows(
            sources, tokenizer, seq_len=seq_len, num_rows=num_rows, packing=Packing(**packing),
            held_out_fraction=0.2, seed=seed,
        )  # fmt: skip

    return make


def texts(rows, tokenizer):
    """The documents of every row, decoded, without eos."""
    return [
        [tokenizer.decode(ids).removesuffix("<|endoftext|>") for ids in row["input_ids"].split(pieces(row))][
            : len(row["document_lengths"])
        ]
        for row in rows
    ]


def pieces(row):
    lengths = row["document_lengths"].tolist()
    return [*lengths, len(row["input_ids"]) - sum(lengths)]


def test_the_budget_is_exact_and_shared_by_weight(make_source, rows, tokenizer):
    sources = [make_source("one", [20] * 60, "a", weight=3), make_source("two", [20] * 60, "n", weight=1)]
    made = rows(sources, 42)
    assert len(made) == 42
    assert all(row["input_ids"].shape == (32,) for row in made)
    is_second = [row[0][0] >= "n" for row in texts(made, tokenizer)]
    assert sum(is_second) in (10, 11)
    assert is_second not in (sorted(is_second), sorted(is_second, reverse=True))
    counted = sum(int(row["document_lengths"].sum()) for row in made)
    assert made.real_tokens == counted
    assert made.padding == pytest.approx(1 - counted / (42 * 32))


@pytest.mark.parametrize("mode", ["best_fit", "concat_split", "none"])
def test_a_row_is_a_function_of_its_number(make_source, rows, mode):
    sources = [make_source("one", range(5, 90), "a"), make_source("two", [50] * 9, "n", weight=0.5)]
    made, again, other = (
        rows(sources, 60, mode=mode),
        rows(sources, 60, mode=mode),
        rows(sources, 60, mode=mode, seed=1),
    )
    order = np.random.default_rng(0).permutation(60)
    copied = pickle.loads(pickle.dumps(made))
    for index in order:
        for name, value in made[index].items():
            assert torch.equal(value, again[index][name])
            assert torch.equal(value, copied[index][name])
    assert any(not torch.equal(made[index]["input_ids"], other[index]["input_ids"]) for index in order)


def test_one_epoch_holds_every_training_document_once_and_no_held_out_one(make_source, rows, tokenizer):
    source = make_source("one", [10 + index % 20 for index in range(80)])
    train, held_out = load_split(source, 0.2)
    one_epoch = len(rows([source], 1, mode="best_fit").sources[0].documents)
    assert one_epoch == len(train)
    made = rows([source], 300)
    seen = [text for row in texts(made, tokenizer) for text in row]
    assert set(seen) == {document.text for document in train}
    assert not set(seen) & {document.text for document in held_out}
    first = seen[: len(train)]
    assert len(set(first)) > 0.9 * len(train), "rows of the first epoch come before those of the second"


def test_a_repeated_source_is_reshuffled_and_warned_about_once(make_source, rows, tokenizer, caplog):
    source = make_source("tiny", [20] * 16)
    with caplog.at_level(logging.WARNING):
        made = rows([source], 64, mode="none")
    documents = len(load_split(source, 0.2)[0])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"tiny has {20 * documents} tokens for training in an epoch" in warnings[0]
    assert f"they are read {64 / documents:.1f} times to fill 64 rows of 32" in warnings[0]
    order = [row[0] for row in texts(made, tokenizer)]
    epochs = [order[start : start + documents] for start in range(0, 64 - documents, documents)]
    assert all(len(set(epoch)) == documents for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_source_is_read_once_for_all_stages_of_a_run(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some words " * 400)
    reads = []
    read = mixture.tokenized_training_split
    monkeypatch.setattr(mixture, "tokenized_training_split", lambda *a, **k: reads.append(a[0].path) or read(*a, **k))
    known = {}
    for seq_len, weight in ((16, 1.0), (32, 0.5)):
        source = DataSource(path=str(tmp_path / "a.txt"), weight=weight)
        settings = {"seq_len": seq_len, "num_rows": 4, "packing": Packing(), "held_out_fraction": 0.2}
        rows = training_rows([source], tokenizer, **settings, known=known)
        alone = training_rows([source], tokenizer, **settings)
        assert torch.equal(rows[0]["input_ids"], alone[0]["input_ids"])
    assert len(reads) == 3


@pytest.mark.parametrize("mode", ["best_fit", "concat_split"])
def test_the_ends_of_short_epochs_are_not_padded_one_by_one(make_source, rows, mode):
    source = make_source("tiny", [70] * 14)  # an epoch is about 1.5 rows
    assert rows([source], 40, seq_len=512, mode=mode).padding < 0.1


def test_a_source_larger_than_its_share_is_not_repeated(make_source, rows, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        made = rows([make_source("large", [31] * 100)], 40)
    seen = [text for row in texts(made, tokenizer) for text in row]
    assert len(seen) == len(set(seen)) == 40
    assert not caplog.records


def test_long_documents_get_their_share_of_the_tokens(make_source, rows, tokenizer):
    source = make_source("mixed", [100, 110, 90, *[10] * 300])

    def long_share(**packing):
        made = rows([source], 300, seq_len=128, **packing)  # every document is whole
        lengths = torch.cat([row["document_lengths"] for row in made])
        return (lengths[lengths > 10].sum() / lengths.sum()).item()

    usual = long_share()
    assert usual < 0.2
    assert long_share(long_fraction=0.6, long_threshold=80) == pytest.approx(0.6, abs=0.04)
    assert long_share(long_fraction=0.01, long_threshold=80) == pytest.approx(usual, abs=0.02), "never drawn less"


def test_a_source_without_long_documents_says_so(make_source, rows, caplog):
    with caplog.at_level(logging.WARNING):
        rows([make_source("short", [31] * 100)], 10, long_fraction=0.5)
    assert "has no document of 4096 tokens or more, so long_fraction=0.5 changes nothing" in caplog.text


def test_padding_is_reported_and_filled_with_the_pad_token(make_source, rows, tokenizer):
    made = rows([make_source("short", [8] * 100)], 20, mode="none")
    assert made.padding == 0.75
    for row in made:
        assert row["document_lengths"].tolist() == [8]
        assert set(row["input_ids"][8:].tolist()) == {tokenizer.pad_token_id}


def test_nothing_to_read_is_refused(make_source, rows):
    with pytest.raises(ConfigError, match="no data source"):
        rows([], 4)
    with pytest.raises(ConfigError, match="num_rows=0"):
        rows([make_source("one", [20] * 20)], 0)
