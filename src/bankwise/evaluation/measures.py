"""One number of a report with the items behind it, and how the same number of two models is compared.

A measure keeps one amount per item (question, window, prompt), so that two models that answered the same items are
compared pairwise: the interval of a paired difference is far narrower than those of the two values.

Shapes: I items, B bootstrap draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bankwise.errors import DataError

NOT_COMPATIBLE = "not RULER-compatible"
"""Note of tasks that stand in for RULER's own; a report sets them in a table apart."""

_DRAWS = 2000
_DRAW_BLOCK = 2_000_000  # random indices held at one time

Key = tuple[str, str, str, int | None, str]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of one task for one model: `scale * f(sum(amounts) / sum(weights))`."""

    section: str
    """Suite: perplexity, benchmarks, ruler, cwe."""

    task: str
    """Task or text source."""

    metric: str
    """What is measured, for example `acc_per_char`, `score`, `perplexity`."""

    items: tuple[str, ...]
    """Ids of the items, unique."""

    amounts: tuple[float, ...]
    """Amount of each item: 0 or 1 for an accuracy, the summed loss of a window, ..."""

    weights: tuple[float, ...] | None = None
    """What an item counts: tokens of a window, bytes of an answer. None: every item counts 1."""

    form: Literal["mean", "exp"] = "mean"
    """f: the mean itself, or its exponential (perplexity)."""

    scale: float = 1.0
    """Factor of the shown value: 100 for percentages."""

    unit: str = ""
    """`%`, `nats`, `bits/byte`; empty: none."""

    better: Literal["higher", "lower", ""] = "higher"
    """Which direction is better; empty: neither."""

    recovery: Literal["ratio", "inverse", ""] = ""
    """How recovery is formed: value / reference (accuracies), reference / value (perplexity, bits per byte), or not."""

    chance: float | None = None
    """Value of a random answer, on the shown scale."""

    length: int | None = None
    """Window size in tokens, for long-context tasks."""

    variant: str = ""
    """What else tells two measures of one metric apart: a position bucket, a permutation."""

    group: str = ""
    """Group whose mean recovery is reported: commonsense, reading, knowledge, code, ..."""

    is_headline: bool = False
    """Whether a summary shows this metric of the task."""

    note: str = ""
    """What a reader must know, for example `not RULER-compatible`."""

    def __post_init__(self) -> None:
        if not self.items or len(self.items) != len(self.amounts) or len(set(self.items)) != len(self.items):
            raise DataError(
                f"{self.section}/{self.task}/{self.metric}: {len(self.amounts)} amounts for {len(self.items)} items "
                f"({len(set(self.items))} distinct); a measure needs one amount per item and at least one item"
            )

    @property
    def key(self) -> Key:
        """What two models' measures must share to be compared."""
        return self.section, self.task, self.metric, self.length, self.variant

    @property
    def n(self) -> int:
        return len(self.items)

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Amounts and weights [I]."""
        amounts_I = np.asarray(self.amounts, dtype=np.float64)
        weights_I = np.ones_like(amounts_I) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        return amounts_I, weights_I

    @cached_property
    def value(self) -> float:
        amounts_I, weights_I = self.arrays
        return float(self._shown(amounts_I.sum() / weights_I.sum()))

    def _shown(self, mean: Any) -> Any:
        return self.scale * (np.exp(np.minimum(mean, 700.0)) if self.form == "exp" else mean)

    def draws(self, seed: int) -> Iterator[NDArray[np.float64]]:
        """Blocks of bootstrap values; the same seed draws the same items for every measure of equal length."""
        amounts_I, weights_I = self.arrays
        generator = np.random.default_rng(seed)
        block = max(1, min(_DRAWS, _DRAW_BLOCK // self.n))
        for start in range(0, _DRAWS, block):
            chosen_BI = generator.integers(self.n, size=(min(block, _DRAWS - start), self.n))
            yield self._shown(amounts_I[chosen_BI].sum(axis=1) / weights_I[chosen_BI].sum(axis=1))

    def standard_error(self, seed: int = 0) -> float:
        """Binomial for accuracies, otherwise bootstrap over items; NaN for a single item."""
        if self.n < 2:
            return math.nan
        amounts_I, _ = self.arrays
        if self.weights is None and self.form == "mean" and bool(np.isin(amounts_I, (0.0, 1.0)).all()):
            share = float(amounts_I.mean())
            return self.scale * math.sqrt(share * (1 - share) / self.n)
        return float(np.concatenate(list(self.draws(seed))).std(ddof=1))


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A paired difference with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def paired_delta(measure: Measure, reference: Measure, seed: int = 0) -> Delta | None:
    """measure - reference over the items of both; None where they share fewer than two items.

    Both are resampled together, item by item, so that what is common to both models cancels.
    """
    if measure.key != reference.key:
        raise DataError(f"measures of different keys cannot be compared: {measure.key} and {reference.key}")
    shared = sorted(set(measure.items) & set(reference.items))
    if len(shared) < 2:
        return None
    left, right = restricted(measure, shared), restricted(reference, shared)
    differences_B = np.concatenate([a - b for a, b in zip(left.draws(seed), right.draws(seed), strict=True)])
    low, high = np.quantile(differences_B, (0.025, 0.975))
    return Delta(value=left.value - right.value, low=float(low), high=float(high), n=len(shared))


def restricted(measure: Measure, items: Sequence[str]) -> Measure:
    """The measure on `items` alone, in that order."""
    place = {item: index for index, item in enumerate(measure.items)}
    chosen = [place[item] for item in items]
    weights = None if measure.weights is None else tuple(measure.weights[index] for index in chosen)
    return replace(
        measure, items=tuple(items), amounts=tuple(measure.amounts[index] for index in chosen), weights=weights
    )


def recovery(value: float, reference: float, form: str) -> float | None:
    """Share of the reference that is kept, in %; None where the metric has no recovery or the ratio does not exist."""
    over, under = (value, reference) if form == "ratio" else (reference, value)
    if not form or not under or not math.isfinite(over) or not math.isfinite(under):
        return None
    return 100 * over / under


def recovery_above_chance(measure: Measure, reference: Measure, seed: int = 0) -> float | None:
    """100 (value - chance) / (reference - chance); None where the reference is within two standard errors of chance."""
    if measure.chance is None or measure.recovery != "ratio":
        return None
    above = reference.value - measure.chance
    error = reference.standard_error(seed)
    if not above > 2 * error:
        return None
    return 100 * (measure.value - measure.chance) / above
