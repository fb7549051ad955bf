"""Interleaved timing: an implementation and each of its baselines in turn, the order swapped from pair to pair."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

Step = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of an implementation and a baseline, pair by pair."""

    seconds: list[float]
    base_seconds: list[float]

    def ratios(self) -> list[float]:
        """Baseline / implementation of each pair."""
        return [base / own for own, base in zip(self.seconds, self.base_seconds, strict=True)]


def interleave(step: Step, baselines: dict[str, Step], *, pairs: int, min_seconds: float = 2e-3) -> dict[str, Timing]:
    """Timings of `step` against every baseline.

    A sample repeats its step until it lasts `min_seconds`. Two pairs come first that are not counted.
    """
    repeats = {name: _repeats(one, min_seconds) for name, one in [("", step), *baselines.items()]}
    timings = {name: Timing([], []) for name in baselines}
    for pair in range(-2, pairs):
        for name, baseline in baselines.items():
            both = [(step, repeats[""], timings[name].seconds), (baseline, repeats[name], timings[name].base_seconds)]
            for one, count, seconds in both if pair % 2 else reversed(both):
                taken = _sample(one, count)
                if pair >= 0:
                    seconds.append(taken)
    return timings


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p10, p50, p90."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], statistics.median(values), deciles[-1]


def _sample(step: Step, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def _repeats(step: Step, min_seconds: float) -> int:
    step()
    return max(1, round(min_seconds / min(_sample(step, 1) for _ in range(3))))
