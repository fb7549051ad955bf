"""Values, standard errors, paired differences and recoveries, against textbook formulas."""

import math

import numpy as np
import pytest

from bankwise.errors import DataError
from bankwise.evaluation.measures import Measure, paired_delta, recovery, recovery_above_chance, restricted


def measure(amounts, weights=None, **settings):
    items = tuple(settings.pop("items", [f"i{index}" for index in range(len(amounts))]))
    defaults = {"section": "s", "task": "t", "metric": "m"}
    weights = None if weights is None else tuple(weights)
    return Measure(**defaults | settings, items=items, amounts=tuple(amounts), weights=weights)


@pytest.fixture
def answers():
    generator = np.random.default_rng(3)
    return (generator.random(400) < 0.6).astype(float)


def test_an_accuracy_is_the_mean_with_the_binomial_error(answers):
    accuracy = measure(answers, scale=100)
    share = answers.mean()
    assert accuracy.value == pytest.approx(100 * share)
    assert accuracy.standard_error() == pytest.approx(100 * math.sqrt(share * (1 - share) / 400))
    assert accuracy.n == 400


def test_a_perplexity_is_the_exponential_of_the_weighted_mean():
    ppl = measure([10.0, 30.0], [5, 10], form="exp")
    assert ppl.value == pytest.approx(math.exp(40 / 15))


def test_the_bootstrap_error_is_that_of_the_mean():
    generator = np.random.default_rng(0)
    amounts = generator.normal(size=500)
    error = measure(amounts).standard_error()
    assert error == pytest.approx(amounts.std(ddof=1) / math.sqrt(500), rel=0.08)
    assert measure(amounts).standard_error(seed=1) == pytest.approx(error, rel=0.1)
    assert measure(amounts).standard_error() == error


def test_one_item_has_no_standard_error():
    assert math.isnan(measure([1.0]).standard_error())


def test_a_paired_difference_is_narrower_than_its_values(answers):
    generator = np.random.default_rng(1)
    flipped = np.where(generator.random(400) < 0.05, 1 - answers, answers)
    one, other = measure(flipped), measure(answers)
    delta = paired_delta(one, other)
    assert delta.value == pytest.approx(flipped.mean() - answers.mean())
    differences = flipped - answers
    error = differences.std(ddof=1) / math.sqrt(400)
    assert delta.high - delta.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert delta.high - delta.low < 2 * one.standard_error()
    assert delta.low < delta.value < delta.high


def test_a_measure_against_itself_has_no_difference(answers):
    delta = paired_delta(measure(answers), measure(answers))
    assert (delta.value, delta.low, delta.high) == (0, 0, 0)


def test_only_shared_items_are_compared():
    one = measure([1, 0, 1], items=["a", "b", "c"])
    other = measure([0, 0, 1, 1], items=["c", "b", "d", "e"])
    delta = paired_delta(one, other)
    assert (delta.n, delta.value) == (2, 0.5)
    assert paired_delta(one, measure([1.0], items=["a"])) is None
    with pytest.raises(DataError, match="different keys"):
        paired_delta(one, measure([1, 0, 1], items=["a", "b", "c"], task="other"))


def test_restricting_keeps_the_asked_order_and_the_weights():
    part = restricted(measure([1, 2, 3], [4, 5, 6], items=["a", "b", "c"]), ["c", "a"])
    assert (part.items, part.amounts, part.weights) == (("c", "a"), (3, 1), (6, 4))


def test_recovery_by_direction():
    assert recovery(30, 40, "ratio") == pytest.approx(75)
    assert recovery(40, 30, "inverse") == pytest.approx(75)
    assert recovery(1, 2, "") is None
    assert recovery(1, 0, "ratio") is None
    assert recovery(math.inf, 3, "ratio") is None


def test_recovery_above_chance_needs_a_reference_above_chance(answers):
    settings = {"recovery": "ratio", "chance": 50.0, "scale": 100}
    reference = measure(answers, **settings)
    worse = measure(answers * (np.arange(400) % 10 != 0), **settings)
    expected = 100 * (worse.value - 50) / (reference.value - 50)
    assert recovery_above_chance(worse, reference) == pytest.approx(expected)
    at_chance = measure([0.0, 1.0] * 200, **settings)
    assert recovery_above_chance(worse, at_chance) is None
    assert recovery_above_chance(measure(answers, recovery="ratio"), measure(answers, recovery="ratio")) is None


@pytest.mark.parametrize("items", [[], ["a"], ["a", "a"]], ids=["none", "too few", "twice"])
def test_items_must_be_unique_and_complete(items):
    with pytest.raises(DataError, match="one amount per item"):
        measure([1.0, 2.0], items=items)
