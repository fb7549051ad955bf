"""Synthetic aggregation texts: long enough, solvable, and nothing of the held-out task in them."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from bankwise.data.aggregation import aggregation_documents, aggregation_words
from bankwise.errors import ConfigError
from bankwise.evaluation.ruler.prompts import PROMPTS
from bankwise.evaluation.ruler.words import WORD_FILES


def wonderwords() -> set[str]:
    spec = importlib.util.find_spec("wonderwords")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets"
    lines = [
        line.strip().lower()
        for file in (folder / name for name in WORD_FILES)
        for line in file.read_text("utf-8").splitlines()
    ]
    return set(lines) | {part for line in lines for part in re.split(r"[\s-]", line)}


def test_no_word_is_one_of_wonderwords() -> None:
    words = aggregation_words()
    assert len(set(words)) == len(words) > 1000
    assert not set(words) & wonderwords()


def test_no_wording_is_that_of_ruler(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(document.text for document in aggregation_documents(tokenizer, seq_len=2000, count=12))

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 4]) for start in range(len(words) - 3)}

    assert not runs(text) & runs(" ".join(prompt.template + prompt.prefix for prompt in PROMPTS.values()))


def test_answers_are_right(tokenizer: PreTrainedTokenizerFast) -> None:
    seen = set()
    for document in aggregation_documents(tokenizer, seq_len=1500, count=16):
        for line in document.text.splitlines():
            kind, rest = line.split(": ", 1)
            listed, question, answer = re.fullmatch(r"(.*)\. ([^.:]*): (.*)\.", rest).groups()  # type: ignore[union-attr]
            counts = Counter(re.findall(r"[a-z]+", listed))
            ranked = [word for word, times in counts.most_common() if times > 1]
            answered = re.findall(r"[a-z]+", answer)
            assert answered == ranked[: len(answered)]
            assert [int(number) for number in re.findall(r"\d+", answer)] in ([], [counts[word] for word in answered])
            seen.add((kind, question))
    assert len(seen) == 3


def test_texts_fill_their_windows_and_repeat(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = aggregation_documents(tokenizer, seq_len=700, count=4, seed=3)
    assert all(len(tokenizer(document.text)["input_ids"]) >= 700 for document in documents)
    assert documents == aggregation_documents(tokenizer, seq_len=700, count=4, seed=3)
    assert documents[0].text != aggregation_documents(tokenizer, seq_len=700, count=4, seed=4)[0].text
    with pytest.raises(ConfigError, match="count=0"):
        aggregation_documents(tokenizer, seq_len=700, count=0)
