"""Whether a repair is good enough to ship (`method.md` section 6.4), on samples that chose nothing.

The gain on the affected lengths must be certain (paired bootstrap) and close most of the gap; no guard may show a
significant drop (one-sided, Holm's correction), and the mean drop of the guards must be below one point with 95 %
certainty. A point is a percent of a score, 0.01 of an AUC, or 1 % of perplexity (0.01 nats).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bankwise.evaluation.measures import Measure
from bankwise.repair.diagnose import CLOSED
from bankwise.repair.statistics import bootstrap_means, drop_p_value, estimate, holm_rejects

_LARGEST_MEAN_DROP = 1.0  # points


@dataclass(frozen=True, kw_only=True)
class GuardDrop:
    """What one guard lost, in points per item; negative where it won."""

    name: str
    drops: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """The figures of the decision."""

    accepted: bool
    reason: str
    gap: float
    gain: float
    gain_low: float
    """Lower end of the 95 % interval of the gain."""
    closed: float
    """Share of the gap that the repair closes."""
    samples: int
    guards: dict[str, dict[str, Any]]
    """By name: mean drop in points, p, whether the drop is significant after the correction, items."""
    mean_drop: float
    mean_drop_high: float
    """Upper 95 % bound of the mean drop over guards."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    before: Sequence[float],
    after: Sequence[float],
    reference: Sequence[float],
    clusters: Sequence[str],
    guards: Sequence[GuardDrop],
    *,
    seed: int = 0,
) -> Acceptance:
    """`before`, `after`, `reference`: losses of the same samples by the model, the repaired model and the reference."""
    gap = estimate([old - other for old, other in zip(before, reference, strict=True)]).value
    gains = [old - new for old, new in zip(before, after, strict=True)]
    gain = estimate(gains).value
    low = float(np.quantile(bootstrap_means(gains, clusters, seed=seed), 0.025))
    if len(set(clusters)) < 2:
        low = float("-inf")  # one layout is one observation
    closed = gain / gap if gap > 0 else 0.0
    p_values = [drop_p_value(guard.drops, seed=seed) for guard in guards]
    significant = holm_rejects(p_values)
    mean_drop, high = _mean_drop(guards, seed)
    problems = []
    if not low > 0:
        problems.append(f"the gain of {gain:.3g} is not certain (95 % from {low:.3g})")
    if closed < CLOSED:
        problems.append(f"it closes {closed:.0%} of the gap, and {CLOSED:.0%} are asked for")
    fallen = [guard.name for guard, falls in zip(guards, significant, strict=True) if falls]
    if fallen:
        problems.append(f"these guards drop: {', '.join(fallen)}")
    if guards and not high < _LARGEST_MEAN_DROP:
        problems.append(f"the guards may drop by {high:.2f} points on average")
    return Acceptance(
        accepted=not problems,
        reason="; ".join(problems) or f"closes {closed:.0%} of the gap, and no guard drops",
        gap=gap,
        gain=gain,
        gain_low=low,
        closed=closed,
        samples=len(gains),
        guards={
            guard.name: {"drop": estimate(guard.drops).value, "p": p, "significant": falls, "n": len(guard.drops)}
            for guard, p, falls in zip(guards, p_values, significant, strict=True)
        },
        mean_drop=mean_drop,
        mean_drop_high=high,
    )


def _mean_drop(guards: Sequence[GuardDrop], seed: int) -> tuple[float, float]:
    """Mean over guards, and its one-sided 95 % bound: items are resampled within each guard."""
    if not guards:
        return 0.0, 0.0
    draws_B = np.mean(
        [
            bootstrap_means(guard.drops, [str(item) for item in range(len(guard.drops))], seed=seed + place)
            for place, guard in enumerate(guards)
        ],
        axis=0,
    )
    return float(np.mean([estimate(guard.drops).value for guard in guards])), float(np.quantile(draws_B, 0.95))


def guard_drops(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> list[GuardDrop]:
    """The drops of measures that two models share, by name."""
    return [GuardDrop(name=name, drops=tuple(_drops(measure, after[name]))) for name, measure in before.items()]


def _drops(before: Measure, after: Measure) -> list[float]:
    """Points lost on each item."""
    points = before.scale if before.unit == "%" else 100.0
    sign = -1.0 if before.better == "lower" else 1.0
    weights = before.weights or (1.0,) * before.n
    return [
        sign * points * (old - new) / weight
        for old, new, weight in zip(before.amounts, after.amounts, weights, strict=True)
    ]
