"""The statistics of a scan and of a repair's acceptance (`method.md` section 6.4). Differences are always paired.

Shapes: I samples, C clusters, B draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
_BLOCK = 4_000_000  # random numbers held at one time


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over samples."""

    value: float
    standard_error: float
    """NaN for a single sample."""

    @property
    def z(self) -> float:
        """Standard errors that the mean is away from 0; infinite where the samples agree to the last digit."""
        if self.standard_error > 0:
            return self.value / self.standard_error
        if math.isnan(self.standard_error) or self.value == 0:
            return self.standard_error
        return math.copysign(math.inf, self.value)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error."""
    values_I = np.asarray(values, dtype=np.float64)
    error = float(values_I.std(ddof=1) / math.sqrt(len(values_I))) if len(values_I) > 1 else math.nan
    return Estimate(float(values_I.mean()), error)


def bootstrap_means(values: Sequence[float], clusters: Sequence[str], *, seed: int = 0) -> NDArray[np.float64]:
    """Means [B] of resampled clusters; samples of one cluster stay together."""
    members: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    sums_C = np.asarray([sum(part) for part in members.values()])
    sizes_C = np.asarray([len(part) for part in members.values()], dtype=np.float64)
    generator = np.random.default_rng(seed)
    block = max(1, min(DRAWS, _BLOCK // len(sums_C)))
    means = []
    for start in range(0, DRAWS, block):
        chosen_BC = generator.integers(len(sums_C), size=(min(block, DRAWS - start), len(sums_C)))
        means.append(sums_C[chosen_BC].sum(axis=1) / sizes_C[chosen_BC].sum(axis=1))
    return np.concatenate(means)


def drop_p_value(drops: Sequence[float], *, seed: int = 0) -> float:
    """p of "the mean drop is not above 0", one-sided and paired: signs are flipped at random.

    Assumes nothing of the distribution but that without an effect a drop is as likely as a rise of the same size.
    """
    drops_I = np.asarray(drops, dtype=np.float64)
    if drops_I.mean() <= 0:
        return 1.0
    generator = np.random.default_rng(seed)
    reached = 0
    block = max(1, min(DRAWS, _BLOCK // len(drops_I)))
    for start in range(0, DRAWS, block):
        signs_BI = generator.integers(2, size=(min(block, DRAWS - start), len(drops_I))) * 2 - 1
        reached += int(((signs_BI * drops_I).mean(axis=1) >= drops_I.mean() * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + DRAWS)


def holm_rejects(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected


def joint_z_scores(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Of each place, the sum of two values in standard deviations from their means; 0 where all are equal.

    Both are of one unit and share the larger of their spreads: a quantity that hardly differs from place to place has
    as little say as that.
    """
    values_2I = np.asarray([first, second], dtype=np.float64)
    spread = values_2I.std(axis=1).max()
    centred_2I = values_2I - values_2I.mean(axis=1, keepdims=True)
    return [0.0] * len(first) if spread == 0 else (centred_2I / spread).sum(axis=0).tolist()
