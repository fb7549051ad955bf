"""Interleaved timing: an implementation and each of its baselines in turn, the order swapped from pair to pair.

On a machine that others use too, `idle_only` waits until they use less than a tenth of it, and drops a pair during
which they used more.
"""

import os
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


def interleave(
    step: Step, baselines: dict[str, Step], *, pairs: int, min_seconds: float = 2e-3, idle_only: bool = False
) -> dict[str, Timing]:
    """Timings of `step` against every baseline.

    A sample repeats its step until it lasts `min_seconds`. Two pairs come first that are not counted.
    """
    if idle_only:
        # /proc/stat counts in hundredths of a second.
        min_seconds = max(min_seconds, 0.05)
        _wait_for_idle()
    repeats = {name: _repeats(one, min_seconds) for name, one in [("", step), *baselines.items()]}
    timings = {name: Timing([], []) for name in baselines}
    for pair in range(-2, pairs):
        for name, baseline in baselines.items():
            both = [(step, repeats[""]), (baseline, repeats[name])]
            while True:
                if idle_only:
                    _wait_for_idle()
                before = _foreign_seconds()
                taken = {one: _sample(one, count) for one, count in (both if pair % 2 else reversed(both))}
                if not idle_only or _foreign_seconds() - before <= _BUSY * sum(taken[one] * n for one, n in both):
                    break
            if pair >= 0:
                timings[name].seconds.append(taken[step])
                timings[name].base_seconds.append(taken[baseline])
    return timings


_BUSY = 0.1
"""Processor seconds of other processes per second of wall time above which the machine counts as busy."""


def _foreign_seconds() -> float:
    """Processor seconds that all other processes of this machine have used; 0 where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(v) for v in file.readline().split()[1:9])
    except FileNotFoundError:
        return 0.0
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


def _wait_for_idle() -> None:
    while True:
        before = _foreign_seconds()
        time.sleep(0.1)
        if _foreign_seconds() - before <= _BUSY * 0.1 + 0.005:
            return


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
