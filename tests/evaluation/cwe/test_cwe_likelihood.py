"""Which tokens are words, NLL over them, and AUC, hits and mass against naive definitions."""

import itertools
import math
import random
from statistics import mean
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bankwise.errors import ConfigError
from bankwise.evaluation.cwe.likelihood import (
    answer_nll,
    answer_text,
    cwe_auc,
    first_tokens,
    first_word,
    top_hits,
    word_of_token,
)
from bankwise.evaluation.engine import ContinuationScore

WORDS = ["shoe", "ad hoc", "jalapeño", "ATM", "well-being", "sesquipedalian", "gum", "contact lens", "a", "pencil"]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fast(vocab: list[str], merges: list[tuple[str, str]], **parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=merges))
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def marked_start() -> PreTrainedTokenizerFast:
    """As sentencepiece tokenizers that put a mark of their own before a text."""
    return fast(
        ["▁", "1", "2", ".", "a", "b", "c", "▁▁", "▁a", "▁b"],
        [("▁", "▁"), ("▁", "a"), ("▁", "b")],
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


# which tokens are words


def test_words_and_numbering_are_told_apart(smollm2_tokenizer):
    ids = ids_of(smollm2_tokenizer, answer_text(WORDS))
    word_of = word_of_token(ids, WORDS, smollm2_tokenizer)
    for place, word in enumerate(WORDS):
        own = [token for token, owner in zip(ids, word_of, strict=True) if owner == place]
        assert smollm2_tokenizer.decode(own) == f" {word}"
    numbering = [token for token, owner in zip(ids, word_of, strict=True) if owner is None]
    assert smollm2_tokenizer.decode(numbering) == "".join(f" {number}." for number in range(1, 11))


def test_bytes_of_one_letter_belong_to_its_word_and_a_lone_space_does_not(tokenizer):
    word_of = word_of_token(ids_of(tokenizer, " 1. ñb 2. he"), ["ñb", "he"], tokenizer)
    assert word_of == [None, None, None, None, 0, 0, 0, None, None, None, None, 1]


def test_token_of_numbering_and_word_counts_as_word():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = fast(
        [*alphabet, ".Ġ", ".Ġa"],
        [(".", "Ġ"), (".Ġ", "a")],
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoder=decoders.ByteLevel(),
    )
    ids = ids_of(tokenizer, " 1. ab 2. b")
    assert [tokenizer.decode([token]) for token in ids] == [" ", "1", ". a", "b", " ", "2", ". ", "b"]
    assert word_of_token(ids, ["ab", "b"], tokenizer) == [None, None, 0, 0, None, None, None, 1]


def test_tokens_after_a_prompt_are_found_where_the_start_of_a_text_is_marked(marked_start):
    prompt, words = "c", ["a", "bc"]
    scored = ids_of(marked_start, prompt + answer_text(words))[len(ids_of(marked_start, prompt)) :]
    assert scored != ids_of(marked_start, answer_text(words))
    assert word_of_token(scored, words, marked_start, prompt) == [None, None, None, 0, None, None, None, 1, 1]


def test_tokenizer_without_offsets_or_with_other_tokens_is_refused(smollm2_tokenizer):
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ConfigError, match=r"SlowTokenizer does not tell which characters .* use a fast tokenizer"):
        word_of_token([1], ["a"], SlowTokenizer())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"does not give the tokens that were scored for the answer ' 1\. a'"):
        word_of_token([1, 2, 3, 4], ["a"], smollm2_tokenizer, "text")


# NLL


def test_nll_sums_word_tokens_and_the_first_item_apart():
    score = ContinuationScore(token_ids=(1, 2, 3, 4, 5), logprobs=(-1.0, -2.0, -4.0, -8.0, -16.0), is_greedy=False)
    nll = answer_nll(score, [None, 0, 0, None, 1])
    assert (nll.total, nll.tokens, nll.first_total, nll.first_tokens) == (22.0, 3, 6.0, 2)


# first tokens


def test_first_token_is_that_of_the_word_after_a_space(smollm2_tokenizer):
    expected = [ids_of(smollm2_tokenizer, f" {word}")[0] for word in WORDS]
    assert first_tokens(WORDS, smollm2_tokenizer) == expected


def test_first_token_is_the_one_after_the_number_where_the_start_of_a_text_is_marked(marked_start):
    found = first_tokens(["a", "bc"], marked_start)
    assert marked_start.convert_ids_to_tokens(found) == ["▁a", "▁b"]


# AUC, hits, mass


def naive_auc(common: list[float], uncommon: list[float]) -> float:
    pairs = list(itertools.product(common, uncommon))
    return sum(1.0 if c > u else 0.5 if c == u else 0.0 for c, u in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(20))
def test_auc_equals_the_naive_sum_over_pairs(seed):
    generator = random.Random(seed)
    values = range(5) if seed % 2 else range(10**6)  # few values: many ties
    common, uncommon = ([-float(generator.choice(values)) for _ in range(n)] for n in (10, 43))
    assert cwe_auc(common, uncommon) == pytest.approx(naive_auc(common, uncommon), abs=1e-12)


def test_auc_at_its_ends():
    assert cwe_auc([-1.0, -2.0], [-3.0]) == 1.0
    assert cwe_auc([-3.0], [-1.0, -2.0]) == 0.0
    assert cwe_auc([-1.0] * 3, [-1.0] * 2) == 0.5


def test_broken_scores_are_not_a_result():
    assert math.isnan(cwe_auc([math.nan, -1.0], [-2.0]))
    assert math.isnan(top_hits([math.nan, -1.0], [-2.0]))


def naive_hits(common: list[float], uncommon: list[float], count: int) -> float:
    """Mean over all orders among equals."""
    words = [(score, 1) for score in common] + [(score, 0) for score in uncommon]
    orders = itertools.permutations(words)
    return mean(sum(kind for _, kind in sorted(order, key=lambda word: -word[0])[:count]) for order in orders)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("seed", range(6))
def test_hits_are_the_mean_over_all_orders_of_ties(seed, count):
    generator = random.Random(seed)
    common, uncommon = ([-float(generator.randrange(3)) for _ in range(n)] for n in (2, 4))
    assert top_hits(common, uncommon, count) == pytest.approx(naive_hits(common, uncommon, count))


def test_mass_counts_each_token_once_and_shared_ones_as_common():
    logprobs = {token: math.log(share) for token, share in {1: 0.4, 2: 0.2, 3: 0.1, 4: 0.05}.items()}
    first = first_word(logprobs, common=[1, 1, 2], uncommon=[2, 3, 4, 4])
    assert first.mass_common == pytest.approx(0.6)
    assert first.mass_uncommon == pytest.approx(0.15)
    assert first.auc == pytest.approx(naive_auc([4.0, 4.0, 2.0], [2.0, 1.0, 0.5, 0.5]))
    assert first.top_hits == 3.0
