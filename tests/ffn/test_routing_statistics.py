"""The figures of routing against naive recomputations from lists and sets."""

import math
from statistics import mean, pstdev

import pytest
import torch

from bankwise.ffn.routing_statistics import (
    adjacent_unions,
    always_on_share,
    boundary_margin,
    dead_share,
    global_topk_mask,
    low_quantile,
    mask_churn,
    usage_gini,
)

T, F, B, K = 7, 24, 8, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(mask):
    return {(t, i) for t, row in enumerate(mask.tolist()) for i, is_kept in enumerate(row) if is_kept}


def test_margin_is_the_step_at_the_cut_in_standard_deviations():
    logits = draw(T, F)
    expected = []
    for row in logits.tolist():
        for start in range(0, F, B):
            values = sorted(row[start : start + B], reverse=True)
            expected.append((values[K - 1] - values[K]) / pstdev(values))
    margin = boundary_margin(logits, bank_size=B, active_per_bank=K)
    assert margin.shape == (T, F // B)
    assert margin.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert mean(expected) == pytest.approx(margin.mean().item(), rel=1e-5)


def test_margin_of_equal_logits_is_zero():
    assert boundary_margin(torch.ones(2, B), bank_size=B, active_per_bank=K).tolist() == [[0], [0]]


@pytest.mark.parametrize("count", [1, 19, 20, 21, 400])
def test_low_quantile_is_the_smallest_value_that_enough_values_do_not_exceed(count):
    values = draw(count)
    ordered = sorted(values.tolist())
    expected = next(value for place, value in enumerate(ordered, start=1) if place / count >= 0.05)
    assert low_quantile(values, 0.05).item() == expected


def test_churn_is_the_share_of_the_kept_that_is_lost():
    before, after = draw(T, F) > 0, draw(T, F, seed=1) > 0
    expected = len(kept(before) - kept(after)) / len(kept(before))
    assert mask_churn(before, after).item() == pytest.approx(expected)
    assert mask_churn(before, before).item() == 0
    assert mask_churn(before, ~before).item() == 1


def test_unions_are_the_distinct_channels_of_adjacent_tokens():
    mask = draw(T, F) > 1
    rows = [{i for i, is_kept in enumerate(row) if is_kept} for row in mask.tolist()]
    unions = dict(adjacent_unions(mask, (2, 4, 8)))
    assert sorted(unions) == [2, 4]  # no 8 tokens
    for width, union in unions.items():
        expected = [len(set().union(*rows[start : start + width])) for start in range(T - width + 1)]
        assert union.sum(dim=-1).tolist() == expected


def test_global_mask_keeps_the_largest_of_the_layer():
    energy = draw(T, F).abs()
    mask = global_topk_mask(energy, bank_size=B, active_per_bank=K)
    for values, row in zip(energy.tolist(), mask.tolist(), strict=True):
        best = sorted(range(F), key=values.__getitem__, reverse=True)[: F // B * K]
        assert {i for i, is_kept in enumerate(row) if is_kept} == set(best)


def test_shares_of_dead_and_always_on_channels_and_gini():
    rates = torch.tensor([0.0, 9e-5, 1.1e-4, 0.5, 0.998, 0.9995, 1.0, 0.25], dtype=torch.float64)
    assert dead_share(rates) == 2 / 8
    assert always_on_share(rates) == 2 / 8
    pairs = sum(abs(a - b) for a in rates.tolist() for b in rates.tolist())
    assert usage_gini(rates) == pytest.approx(pairs / (2 * 8 * math.fsum(rates.tolist())))
