"""Windows hold the documents' tokens, each once, in a seeded order, and no more text is read than they need."""

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bankwise.config import DataSource
from bankwise.data import Document, mixed_windows, token_windows
from bankwise.errors import ConfigError, DataError

EOS = "<eos>"


def word_tokenizer(num_words: int = 5000, eos: str | None = EOS) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... as single tokens."""
    vocab = {f"w{index}": index for index in range(num_words)} | {EOS: num_words, "<bos>": num_words + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, " t" and " th" merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "Ġt", "Ġth"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("Ġt", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the characters it is given."""

    num_chars = 0

    def __call__(self, text: list[str], **options: object) -> object:  # type: ignore[override]
        type(self).num_chars += sum(map(len, text))
        return super().__call__(text, **options)


def numbered_documents(lengths: list[int]) -> list[Document]:
    """Documents of different words: the first holds w0.., the next goes on from there."""
    documents, start = [], 0
    for length in lengths:
        documents.append(Document(f"doc-{start}", " ".join(f"w{index}" for index in range(start, start + length))))
        start += length
    return documents


# token_windows


def test_windows_hold_every_token_once_and_eos_after_each_document() -> None:
    tokenizer = word_tokenizer()
    windows = token_windows(numbered_documents([30, 50, 7, 9]), tokenizer, seq_len=4)
    assert windows.dtype == torch.long
    assert windows.shape == (25, 4)
    counts = Counter(windows.flatten().tolist())
    assert counts.pop(tokenizer.eos_token_id) == 4
    assert counts == Counter(range(96))


def test_rest_that_fills_no_window_is_dropped() -> None:
    assert token_windows(numbered_documents([30]), word_tokenizer(eos=None), seq_len=8).shape == (3, 8)


def test_text_keeps_its_order_inside_a_window() -> None:
    (window,) = token_windows(numbered_documents([10]), word_tokenizer(), seq_len=11)
    assert window.tolist() == [*range(10), 5000]


def test_tokenizer_own_rule_for_bos_and_eos_is_kept() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<eos>", 5000), ("<bos>", 5001)]
    )
    (window,) = token_windows(numbered_documents([3]), tokenizer, seq_len=5)
    assert window.tolist() == [5001, 0, 1, 2, 5000]


@pytest.mark.parametrize("max_windows", [None, 10])
def test_same_seed_same_windows_another_seed_another_order(max_windows: int | None) -> None:
    documents, tokenizer = numbered_documents([40] * 20), word_tokenizer()
    first, again, other = (
        token_windows(documents, tokenizer, seq_len=8, max_windows=max_windows, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_documents_share_a_limited_number_of_windows_evenly() -> None:
    windows = token_windows(numbered_documents([1000, 400, 400]), word_tokenizer(), seq_len=10, max_windows=30)
    assert windows.shape == (30, 10)
    first_document = ((windows < 1000).sum() / windows.numel()).item()
    assert first_document <= 12 / 30
    assert len(set(windows.flatten().tolist())) == 300


def test_limit_reads_on_when_the_shares_are_too_small() -> None:
    tokenizer = word_tokenizer()
    windows = token_windows(numbered_documents([1000, 20, 20]), tokenizer, seq_len=10, max_windows=100)
    assert windows.shape == (100, 10)
    counts = Counter(windows.flatten().tolist())
    counts.pop(tokenizer.eos_token_id)
    assert max(counts.values()) == 1


def test_limit_above_the_text_gives_what_there_is() -> None:
    documents, tokenizer = numbered_documents([300, 20, 7]), word_tokenizer()
    everything = token_windows(documents, tokenizer, seq_len=10)
    limited = token_windows(documents, tokenizer, seq_len=10, max_windows=1000)
    assert len(limited) == len(everything) == 33
    assert Counter(limited.flatten().tolist()) == Counter(everything.flatten().tolist())


@pytest.mark.parametrize("text", ["the  thing\n\n that there was " * 40, "x" * 2000, "ß" * 1000])
def test_tokens_of_a_prefix_are_those_of_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    (window,) = token_windows([Document("a", text)], tokenizer, seq_len=50, max_windows=1)
    assert window.tolist() == tokenizer(text)["input_ids"][:50]


def test_few_windows_read_little_text() -> None:
    tokenizer = CountingTokenizer(tokenizer_object=word_tokenizer().backend_tokenizer, eos_token=EOS)
    documents = [Document(str(index), f"w{index} " * 20_000) for index in range(50)]
    token_windows(documents, tokenizer, seq_len=32, max_windows=16)
    assert CountingTokenizer.num_chars < 0.01 * sum(len(document.text) for document in documents)


def test_progress_counts_tokens() -> None:
    calls: list[tuple[int, int]] = []
    documents, tokenizer = numbered_documents([40] * 5), word_tokenizer()
    token_windows(documents, tokenizer, seq_len=8, max_windows=3, progress=lambda *call: calls.append(call))
    assert calls[-1][0] >= 24
    assert {wanted for _, wanted in calls} == {24}
    calls.clear()
    token_windows(documents, tokenizer, seq_len=8, progress=lambda *call: calls.append(call))
    assert calls == [(205, 0)]


@pytest.mark.parametrize("max_windows", [None, 3])
def test_text_below_one_window_is_refused_with_its_size(max_windows: int | None) -> None:
    with pytest.raises(DataError, match=r"2 documents have 9 tokens, which is less than one window of seq_len=10"):
        token_windows(numbered_documents([3, 4]), word_tokenizer(), seq_len=10, max_windows=max_windows)
    with pytest.raises(DataError, match="0 documents have 0 tokens"):
        token_windows([], word_tokenizer(), seq_len=10, max_windows=max_windows)


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len=0 must be at least 1"):
        token_windows(numbered_documents([3]), word_tokenizer(), seq_len=0)
    with pytest.raises(ConfigError, match="max_windows=0 must be at least 1"):
        token_windows(numbered_documents([3]), word_tokenizer(), seq_len=2, max_windows=0)


# mixed_windows


def make_source(folder: Path, name: str, first_word: int, num_documents: int, weight: float) -> DataSource:
    """A folder of documents of 40 words each, all different."""
    (folder / name).mkdir()
    for index in range(num_documents):
        start = first_word + 40 * index
        text = " ".join(f"w{word}" for word in range(start, start + 40))
        (folder / name / f"{index:03}.txt").write_text(text)
    return DataSource(path=str(folder / name), weight=weight)


@pytest.fixture
def two_sources(tmp_path: Path) -> list[DataSource]:
    return [make_source(tmp_path, "large", 1000, 50, 3.0), make_source(tmp_path, "small", 4000, 20, 1.0)]


def mix(
    sources: list[DataSource],
    num_windows: int,
    split: Literal["train", "held_out"] = "train",
    seed: int = 0,
    seq_len: int = 8,
) -> torch.Tensor:
    return mixed_windows(
        sources,
        word_tokenizer(),
        seq_len=seq_len,
        num_windows=num_windows,
        split=split,
        held_out_fraction=0.2,
        seed=seed,
    )


def words(windows: torch.Tensor) -> set[int]:
    return {token for token in windows.flatten().tolist() if token < 5000}


def from_small(windows: torch.Tensor) -> list[bool]:
    return [any(4000 <= token < 5000 for token in row) for row in windows.tolist()]


def test_mixture_follows_the_weights_and_is_interleaved(two_sources: list[DataSource]) -> None:
    windows = mix(two_sources, 42)
    assert windows.shape == (42, 8)
    is_small = from_small(windows)
    assert sum(is_small) in (10, 11)  # 42 / 4 = 10.5
    assert is_small != sorted(is_small)
    assert is_small != sorted(is_small, reverse=True)


def test_every_source_gives_a_window_where_there_are_enough(two_sources: list[DataSource]) -> None:
    two_sources[1].weight = 1e-6
    assert sum(from_small(mix(two_sources, 2))) == 1
    assert sum(from_small(mix(two_sources, 1))) == 0


def test_training_and_held_out_windows_share_no_text(two_sources: list[DataSource]) -> None:
    held_out = mix(two_sources, 8, "held_out")
    for seed in range(3):
        assert not words(mix(two_sources, 100, seed=seed)) & words(held_out)


def test_mixture_is_deterministic(two_sources: list[DataSource]) -> None:
    assert torch.equal(mix(two_sources, 20), mix(two_sources, 20))
    assert not torch.equal(mix(two_sources, 20), mix(two_sources, 20, seed=1))


def test_small_training_source_repeats_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(tmp_path, "tiny", 0, 4, 1.0)
    available = len(words(mix([source], 10)))
    assert available
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        windows = mix([source], 60)
    assert len(windows) == 60
    counts = Counter(map(tuple, windows.tolist()))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert f"tiny has {len(counts)} training windows of 8 tokens" in caplog.text
    assert f"repeated for {60 / len(counts):.1f} epochs to give 60" in caplog.text


def test_small_held_out_source_is_refused_with_what_it_has(tmp_path: Path) -> None:
    source = make_source(tmp_path, "tiny", 0, 4, 1.0)
    with pytest.raises(DataError, match=r"tiny has only \d+ held-out windows of seq_len=8, but 60 are asked for"):
        mix([source], 60, "held_out")


def test_source_below_one_window_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path, "tiny", 0, 4, 1.0)
    with pytest.raises(DataError, match=r"tiny \(held_out split\): \d documents have \d+ tokens"):
        mix([source], 1, "held_out", seq_len=4000)


def test_mixtures_that_cannot_be_made_are_refused(two_sources: list[DataSource]) -> None:
    with pytest.raises(ConfigError, match="no data source"):
        mix([], 1)
    with pytest.raises(ConfigError, match="num_windows=0"):
        mix(two_sources, 0)
    with pytest.raises(ConfigError, match="split='test' is not known"):
        mix(two_sources, 1, "test")  # type: ignore[arg-type]
