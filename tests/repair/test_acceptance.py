"""Acceptance and its statistics: what is certain passes, what is not does not, and a harmless guard rejects nothing."""

import random

import pytest

from bankwise.evaluation.measures import Measure
from bankwise.repair.acceptance import Acceptance, GuardDrop, guard_drops, judge
from bankwise.repair.statistics import bootstrap_means, drop_p_value, estimate, holm_rejects, joint_z_scores


def noise(count: int, mean: float = 0.0, spread: float = 1.0, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, spread) for _ in range(count)]


def judged(
    closed: float = 0.9, spread: float = 0.1, guards: list[GuardDrop] | None = None, clusters: int = 40
) -> Acceptance:
    reference = noise(40)
    before = [value + 1 for value in reference]
    after = [old - closed + extra for old, extra in zip(before, noise(40, 0, spread, 1), strict=True)]
    return judge(before, after, reference, [str(i % clusters) for i in range(40)], guards or [])


def test_certain_and_large_gain_is_accepted() -> None:
    result = judged()
    assert result.accepted
    assert result.closed == pytest.approx(0.9, abs=0.05)
    assert 0 < result.gain_low < result.gain


def test_gain_that_closes_too_little_is_refused() -> None:
    result = judged(closed=0.6)
    assert not result.accepted
    assert "80% are asked for" in result.reason


def test_gain_within_noise_is_refused() -> None:
    result = judged(closed=1.0, spread=12.0)
    assert result.gain_low < 0
    assert "not certain" in result.reason


def test_one_layout_is_one_observation() -> None:
    assert "not certain" in judged(clusters=1).reason
    assert judged(clusters=2).accepted


def test_significant_drop_of_one_guard_is_refused() -> None:
    harmless = [GuardDrop(name=f"guard {i}", drops=tuple(noise(30, 0, 0.5, i + 2))) for i in range(12)]
    assert judged(guards=harmless).accepted
    result = judged(guards=[*harmless, GuardDrop(name="vt", drops=tuple(noise(30, 3.0, 1.0, 99)))])
    assert not result.accepted
    assert "vt" in result.reason
    assert result.guards["vt"]["significant"]


def test_mean_drop_must_be_small_with_certainty() -> None:
    wide = [GuardDrop(name=f"guard {i}", drops=tuple(noise(8, 0, 8.0, i + 2))) for i in range(3)]
    result = judged(guards=wide)
    assert result.mean_drop_high > 1
    assert "on average" in result.reason


def test_thirteen_harmless_guards_seldom_reject() -> None:
    rejected = 0
    for trial in range(60):
        p_values = [drop_p_value(noise(30, seed=100 * trial + guard)) for guard in range(13)]
        rejected += any(holm_rejects(p_values))
    assert rejected <= 8  # 5 % of 60 is 3; the "one standard error" rule would reject 54


def test_sign_flips_know_no_drop_from_a_drop() -> None:
    assert drop_p_value([0.0] * 10) == 1.0
    assert drop_p_value([-1.0] * 10) == 1.0
    assert drop_p_value([1.0] * 10) == pytest.approx(2**-10, rel=0.5)
    assert drop_p_value([1.0, 1.0]) > 0.2  # two samples prove nothing


def test_holm_stops_at_the_first_that_fails() -> None:
    assert holm_rejects([0.001, 0.03, 0.026]) == [True, False, False]
    assert holm_rejects([0.001, 0.04, 0.02]) == [True, True, True]
    assert holm_rejects([]) == []


def test_bootstrap_keeps_clusters_together() -> None:
    values = [0.0] * 20 + [1.0] * 20
    alone = bootstrap_means(values, [str(i) for i in range(40)]).std()
    together = bootstrap_means(values, ["a"] * 20 + ["b"] * 20).std()
    assert together > 3 * alone


def test_estimates() -> None:
    assert estimate([1.0, 2.0, 3.0]).standard_error == pytest.approx(3**-0.5)
    assert joint_z_scores([2.0, 2.0], [0.0, 0.0]) == [0.0, 0.0]
    assert joint_z_scores([0.0, 2.0], [0.1, 0.0]) == pytest.approx([-0.95, 0.95])


def test_points_of_a_guard() -> None:
    """A score in percent counts as it is; 0.01 nats are one point, and a loss that rises is a drop."""
    score = Measure(
        section="ruler", task="vt", metric="score", items=("a", "b"), amounts=(1.0, 0.5), scale=100, unit="%"
    )
    worse = Measure(
        section="ruler", task="vt", metric="score", items=("a", "b"), amounts=(0.5, 0.5), scale=100, unit="%"
    )
    (drop,) = guard_drops({"vt": score}, {"vt": worse})
    assert drop.drops == pytest.approx((50, 0))
    about = {"section": "perplexity", "task": "text", "metric": "loss", "items": ("a",), "weights": (10.0,)}
    before = Measure(amounts=(20.0,), better="lower", unit="nats", **about)
    after = Measure(amounts=(20.1,), better="lower", unit="nats", **about)
    (drop,) = guard_drops({"text": before}, {"text": after})
    assert drop.drops == pytest.approx((1.0,))
