"""Synthetic texts whose answer must be collected from all over a long text: what is frequent, and in what order.

Training data for a repair, and the source `synthetic:counting`. They are not RULER's: other words
(`aggregation_words.txt`, none of which is an entry of wonderwords, on which RULER's common-words task draws), other
wording, other layouts, so that task stays held out.

The words are those that the public-domain messages of United States presidents use most, by the number of messages.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bankwise.data.documents import Document
from bankwise.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How a list is written, and its question with the answer."""

    text: str
    separator: str
    """Between the listed words."""


LAYOUTS = (
    # Like the frequent-words task: a ranking.
    Layout("Ballots cast: {listed}. Elected, by votes: {ranking}.", ", "),
    # A histogram of what is frequent.
    Layout("Sightings of the day: {listed}. Tally of {repeated} sightings: {tally}.", " "),
    # The one most frequent entry.
    Layout("Stock, piece by piece: {listed}. Held in greatest quantity: {first}.", " / "),
)

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
            parts.append(aggregation_task(generator, max(12, generator.randint(largest // 2, largest) // 2)))
            tokens += len(tokenizer(parts[-1] + "\n", add_special_tokens=False, verbose=False)["input_ids"])
        documents.append(Document(id=f"aggregation/{seed}/{number}", text="\n".join(parts)))
    return documents


def aggregation_task(generator: random.Random, entries: int, layout: Layout | None = None) -> str:
    """One text of about `entries` listed words, with its answer; without `layout`, that is drawn too."""
    frequent = generator.randint(1, min(8, max(1, entries // 6)))
    share = generator.uniform(_SHARE_OF_FREQUENT / 2, _SHARE_OF_FREQUENT)
    repeats = max(2, round(share * entries / frequent))
    rare = max(1, entries - repeats * frequent)
    # A long list has more rare entries than there are words: each of them then occurs several times.
    times = -(-rare // (len(aggregation_words()) - frequent))
    words = generator.sample(aggregation_words(), frequent + rare // times)
    # No two counts are equal, so that the order of the answer is one that can be known.
    counts = {word: repeats + frequent - place for place, word in enumerate(words[:frequent])}
    listed = [word for word, number in counts.items() for _ in range(number)] + words[frequent:] * times
    generator.shuffle(listed)
    layout = layout or generator.choice(LAYOUTS)
    return layout.text.format(
        listed=layout.separator.join(listed),
        ranking=", ".join(counts),
        tally="; ".join(f"{word} {number}" for word, number in counts.items()),
        repeated="repeated" if times == 1 else f"more than {times}",
        first=next(iter(counts)),
    )
