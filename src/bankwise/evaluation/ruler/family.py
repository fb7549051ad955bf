"""What RULER's task families share: where random numbers come from, the length search, and drawing a row until it fits.

Upstream draws everything from one stream that the length search has already used, so the order and number of draws
are part of the result: a probe's text is thrown away, its random numbers are not given back, and neither are those of
a row that came out too long.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bankwise.errors import ConfigError

SHORT_WINDOW = 4096
"""Below this window size the tasks are smaller in their own ways."""

MAX_MISSES = 300
"""Attempts at the smallest size before a row is given up: fitting can be luck, and upstream goes on for ever."""

_FEW_MISSES = 30  # after these, an excess above all that the attempts differed by is not left to luck


@dataclass(frozen=True)
class Streams:
    """Random numbers of one generator run, or of one row."""

    main: random.Random
    fresh: Callable[[], random.Random]
    """A new stream at the moment of use: all shuffles of one list length are the same permutation."""
    five_digits: Callable[[], int]


def shared_streams(seed: int) -> Streams:
    """Upstream's: one stream for the run, fresh ones of the same seed, and numpy's for the numbers of the vt task."""
    numbers = np.random.RandomState(seed)
    return Streams(
        main=random.Random(seed),
        fresh=lambda: random.Random(seed),
        five_digits=lambda: int(numbers.randint(10000, 99999)),
    )


def row_streams(task: str, max_seq_length: int, seed: int, row: int) -> Streams:
    """One stream for everything that a row draws, whatever rows were made before."""
    own = random.Random(f"{task}/{max_seq_length}/{seed}/{row}")
    return Streams(main=own, fresh=lambda: own, five_digits=lambda: own.randrange(10000, 99999))


@dataclass(frozen=True, kw_only=True)
class Window:
    """The room that a prompt and its answer share."""

    task: str
    max_seq_length: int
    template_tokens: int
    """Tokens that are kept free for a model template."""
    new_tokens: int
    remedy: str = "use a longer window"
    """What to do where the smallest prompt is too long."""

    @property
    def budget(self) -> int:
        return self.max_seq_length - self.template_tokens

    @property
    def is_short(self) -> bool:
        return self.max_seq_length < SHORT_WINDOW


@dataclass(frozen=True, kw_only=True)
class LengthSearch:
    """How the size of the rows was found."""

    units: int
    """Words, sentences or documents that a row starts with."""
    trace: list[tuple[int, int]]
    """Sizes that were tried, with their tokens, the answer's included where it counts."""
    estimate: float | None = None
    """Tokens of a unit."""
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One prompt with its references."""

    text: str
    outputs: list[str]
    details: dict[str, Any] = field(default_factory=dict)
    """What the generator knows of the row beyond upstream's file."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A draft that fits."""

    draft: Draft
    tokens: int
    units: int


class Family(ABC):
    """One task at one window size."""

    unit: str
    """What the size counts."""

    def __init__(self, window: Window, template: str, count: Callable[[str], int], increment: int) -> None:
        self.window = window
        self.template = template
        """Task and answer prefix, wrapped by the model template."""
        self.count = count
        self.increment = increment

    # Not abstract: most families prepare nothing.
    def prepare(self, streams: Streams) -> None:  # noqa: B027
        """What comes before the length search."""

    def smallest(self, row: int) -> int:
        """The smallest size that can be built at all."""
        return 1

    @abstractmethod
    def build(self, units: int, streams: Streams, row: int) -> Draft:
        """A prompt of that size; uses up random numbers."""

    def probe(self, units: int, streams: Streams) -> int:
        """Tokens of a text that the length search makes and throws away."""
        return self.count(self.build(units, streams, 0).text)

    @property
    def reserved(self) -> int:
        """Tokens beside a probe's own that must fit."""
        return self.window.new_tokens

    @property
    def estimate_units(self) -> int:
        """Size of the text that the estimate is made of."""
        return self.increment

    def bound(self, estimate: float) -> int:
        """The largest size that the search considers."""
        return int((self.window.budget / estimate) * 3)

    def search(self, streams: Streams) -> LengthSearch:
        """The size that the rows start with: the largest that is seen to fit by bisection."""
        estimate = self.probe(self.estimate_units, streams) / self.estimate_units
        low, high = self.increment, max(self.bound(estimate), 2 * self.increment)
        bounds = (low, high)
        best, trace = self.increment, []
        while low <= high:
            middle = (low + high) // 2
            trace.append((middle, self.probe(middle, streams) + self.reserved))
            if trace[-1][1] <= self.window.budget:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return LengthSearch(units=best, trace=trace, estimate=estimate, bounds=bounds)

    def sample(self, units: int, streams: Streams, row: int) -> Sample:
        """A prompt that fits: at most `units` large, smaller by `increment` after each one that is too long."""
        misses: list[int] = []
        while True:
            draft = self.build(units, streams, row)
            tokens = self.count(draft.text)
            if tokens + self.window.new_tokens <= self.window.budget:
                return Sample(draft=draft, tokens=tokens, units=units)
            if units - self.increment >= self.smallest(row):
                units -= self.increment
                continue
            misses.append(tokens)
            excess = min(misses) + self.window.new_tokens - self.window.budget
            is_hopeless = len(misses) >= _FEW_MISSES and excess > max(misses) - min(misses)
            if units > self.increment or is_hopeless or len(misses) == MAX_MISSES:
                raise self.too_small(units, min(misses))

    def too_small(self, units: int, tokens: int) -> ConfigError:
        """The error of a window that cannot hold the task."""
        window = self.window
        return ConfigError(
            f"{window.task} does not fit a window of {window.max_seq_length} tokens: the smallest size, {units} "
            f"{self.unit}, takes {tokens} tokens and {window.new_tokens} for the answer; {window.remedy}"
        )
