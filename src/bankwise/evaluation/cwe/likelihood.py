"""What the right answer to a CWE prompt costs a model (NLL), and how well its first word is told from the rest (AUC).

Pure functions over the scores of one reading.

A token is a word token if it covers at least one character of a reference word. A token that holds both a part of the
numbering and a part of the word is therefore counted, whole: the word cannot be had without it. The space before a
word is numbering where it is a token of its own.

Shapes: C common words, U uncommon words, N all words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from bankwise.errors import ConfigError
from bankwise.evaluation.engine import ContinuationScore

ITEM_START = " 1."
"""What stands between a prompt and the first word of its answer."""


@dataclass(frozen=True, kw_only=True)
class AnswerNll:
    """Summed negative log-likelihood (nats) of the word tokens of an answer, and how many these are."""

    total: float
    tokens: int
    first_total: float
    """Of the first item alone."""
    first_tokens: int


@dataclass(frozen=True, kw_only=True)
class FirstWord:
    """How the common words stand among all words of the list as the first word of the answer."""

    auc: float
    """Probability that a common word scores above an uncommon one; 0.5: chance, 1: perfect."""
    top_hits: float
    """Common words among the ten best-scoring words of the list."""
    mass_common: float
    """Probability that the first token begins a common word."""
    mass_uncommon: float
    """Probability that it begins an uncommon word and no common one."""


def answer_text(words: Sequence[str]) -> str:
    """The answer as the task writes it: ` 1. a 2. b`, with a space before it."""
    return "".join(f" {number}. {word}" for number, word in enumerate(words, start=1))


def word_of_token(
    token_ids: Sequence[int], words: Sequence[str], tokenizer: PreTrainedTokenizerBase, context: str = ""
) -> list[int | None]:
    """For each token of `answer_text(words)`, the place of the word that it writes; None: numbering.

    The tokens are those of the answer alone or, with tokenizers that treat the start of a text apart, of the answer
    after `context`.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers, so the words of an answer "
            "cannot be told from its numbering; use a fast tokenizer (one with a tokenizer.json)"
        )
    answer = answer_text(words)
    for before in dict.fromkeys(("", context)):
        encoded = tokenizer(before + answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        first = len(encoded["input_ids"]) - len(token_ids)
        if first >= 0 and encoded["input_ids"][first:] == list(token_ids):
            break
    else:
        raise ConfigError(f"the tokenizer does not give the tokens that were scored for the answer {answer!r}")
    spans = _word_spans(words, len(before))
    return [
        next((place for place, (start, end) in enumerate(spans) if start < token_end and token_start < end), None)
        for token_start, token_end in encoded["offset_mapping"][first:]
    ]


def _word_spans(words: Sequence[str], offset: int) -> list[tuple[int, int]]:
    """Characters that each word takes in `answer_text(words)`, which begins at `offset`."""
    ends = [offset + len(answer_text(words[: place + 1])) for place in range(len(words))]
    return [(end - len(word), end) for word, end in zip(words, ends, strict=True)]


def answer_nll(score: ContinuationScore, word_of: Sequence[int | None]) -> AnswerNll:
    """NLL over the word tokens of a scored answer; `word_of` as from `word_of_token`."""
    costs = [-logprob for logprob, word in zip(score.logprobs, word_of, strict=True) if word is not None]
    first = [-logprob for logprob, word in zip(score.logprobs, word_of, strict=True) if word == 0]
    return AnswerNll(total=math.fsum(costs), tokens=len(costs), first_total=math.fsum(first), first_tokens=len(first))


def first_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token with which each word begins as the first item of an answer.

    That is the first token of `" " + word`; where a tokenizer puts a mark of its own at the start of a text, the token
    that follows ` 1.`.
    """
    start = list(tokenizer(ITEM_START, add_special_tokens=False, verbose=False)["input_ids"])
    items = tokenizer([f"{ITEM_START} {word}" for word in words], add_special_tokens=False, verbose=False)["input_ids"]
    if all(item[: len(start)] == start and len(item) > len(start) for item in items):
        return [item[len(start)] for item in items]
    alone = tokenizer([f" {word}" for word in words], add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[0] for ids in alone]


def first_word(logprobs: Mapping[int, float], common: Sequence[int], uncommon: Sequence[int]) -> FirstWord:
    """AUC, hits and mass from the log-probability of every first token; `common` and `uncommon`: one token per word."""
    scores_C = [logprobs[token] for token in common]
    scores_U = [logprobs[token] for token in uncommon]
    return FirstWord(
        auc=cwe_auc(scores_C, scores_U),
        top_hits=top_hits(scores_C, scores_U),
        mass_common=math.fsum(math.exp(logprobs[token]) for token in set(common)),
        mass_uncommon=math.fsum(math.exp(logprobs[token]) for token in set(uncommon) - set(common)),
    )


def cwe_auc(common: Sequence[float], uncommon: Sequence[float]) -> float:
    """Share of (common, uncommon) pairs in which the common word scores higher; a tie counts 0.5."""
    difference_CU = np.asarray(common)[:, None] - np.asarray(uncommon)
    return float((1 + np.sign(difference_CU)).mean() / 2)  # the sign of NaN is NaN, so a broken model shows


def top_hits(common: Sequence[float], uncommon: Sequence[float], count: int = 10) -> float:
    """Common words among the `count` best; words that tie at the cut share what room there is.

    Words with one first token tie, so a fixed order among them would favour one side.
    """
    scores_C, scores_N = np.asarray(common), np.concatenate([common, uncommon])
    if np.isnan(scores_N).any():
        return math.nan
    cut = np.sort(scores_N)[-min(count, len(scores_N))]
    room = min(count, len(scores_N)) - (scores_N > cut).sum()
    tied_share = (scores_C == cut).sum() / (scores_N == cut).sum()
    return float((scores_C > cut).sum() + room * tied_share)
