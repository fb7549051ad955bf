"""Synthetic texts whose answer must be collected from all over a long text: what is frequent, and in what order.

Training data for a repair. They are not RULER's: other words (`aggregation_words.txt`, none of which is an entry of
wonderwords, on which RULER's common-words task draws), other wording, other layouts, so that task stays held out.

The words are those that the public-domain messages of United States presidents use most, by the number of messages.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bankwise.data.sources import Document
from bankwise.errors import ConfigError

_SHARE_OF_FREQUENT = 0.6  # of the entries, at most; at least half of that


@lru_cache
def aggregation_words() -> tuple[str, ...]:
    """The words, sorted."""
    text = (Path(__file__).parent / "aggregation_words.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def aggregation_documents(tokenizer: Callable[..., Any], *, seq_len: int, count: int, seed: int = 0) -> list[Document]:
    """`count` texts that fill windows of `seq_len` tokens: several small tasks in a row, or one that is long.

    Of the tokenizer only its call is used, as of any of transformers'.
    """
    if seq_len < 1 or count < 1:
        raise ConfigError(f"count={count} texts of {seq_len} tokens were asked for; both must be at least 1")
    documents = []
    for number in range(count):
        generator = random.Random(f"aggregation/{seq_len}/{seed}/{number}")
        largest = seq_len // 2 if number % 2 else seq_len // 6
        parts: list[str] = []
        tokens = 0
        while tokens <= seq_len:
            parts.append(_task(generator, max(12, generator.randint(largest // 2, largest) // 2)))
            tokens += len(tokenizer(parts[-1] + "\n", add_special_tokens=False, verbose=False)["input_ids"])
        documents.append(Document(id=f"aggregation/{seed}/{number}", text="\n".join(parts)))
    return documents


def _task(generator: random.Random, entries: int) -> str:
    """One text with its answer."""
    frequent = generator.randint(1, min(8, max(1, entries // 6)))
    share = generator.uniform(_SHARE_OF_FREQUENT / 2, _SHARE_OF_FREQUENT)
    repeats = max(2, round(share * entries / frequent))
    rare = max(1, entries - repeats * frequent)
    words = generator.sample(aggregation_words(), frequent + rare)
    # No two counts are equal, so that the order of the answer is one that can be known.
    counts = {word: repeats + frequent - place for place, word in enumerate(words[:frequent])}
    listed = [word for word, times in counts.items() for _ in range(times)] + words[frequent:]
    generator.shuffle(listed)
    return generator.choice((_ballots, _tally, _mode))(listed, counts)


def _ballots(listed: Sequence[str], counts: dict[str, int]) -> str:
    """Like the frequent-words task: a ranking."""
    return f"Ballots cast: {', '.join(listed)}. Elected, by votes: {', '.join(counts)}."


def _tally(listed: Sequence[str], counts: dict[str, int]) -> str:
    """A histogram of what is frequent."""
    rows = "; ".join(f"{word} {times}" for word, times in counts.items())
    return f"Sightings of the day: {' '.join(listed)}. Tally of repeated sightings: {rows}."


def _mode(listed: Sequence[str], counts: dict[str, int]) -> str:
    """The one most frequent entry."""
    return f"Stock, piece by piece: {' / '.join(listed)}. Held in greatest quantity: {next(iter(counts))}."
