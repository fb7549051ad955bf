"""Dealing channels into banks: the documented order, a lower variance, and the same dense function."""

import pytest
import torch

from bankwise.config import SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask
from bankwise.upcycle.permutation import bank_order, permute_channels

LAYOUTS = ["none", "random", "snake", "coact"]


def energies(tokens=64, channels=256, seed=0):
    """Positive, unequal channels of which groups of 16 fire together."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(channels, generator=generator).exp()
    burst = torch.randn(tokens, channels // 16, generator=generator).exp().repeat_interleave(16, dim=1)
    return scale * burst * torch.rand(tokens, channels, generator=generator)


def share_variance(energy, order, bank_size):
    """sum_b Var_t[s_b], s_b the bank's share of the squared energy (method.md section 3.2)."""
    square = energy.double().square()[:, order].unflatten(-1, (-1, bank_size)).sum(-1)
    return (square / square.sum(-1, keepdim=True)).var(dim=0).sum().item()


@pytest.mark.parametrize(("channels", "bank_size"), [(256, 64), (24, 4), (6, 3), (64, 64), (8, 1)])
def test_snake_equals_its_formula(channels, bank_size):
    energy = energies(channels=256)[:, :channels]
    num_banks = channels // bank_size
    banks = [[] for _ in range(num_banks)]
    for rank, channel in enumerate(energy.mean(0).argsort(descending=True).tolist()):
        turn, place = divmod(rank, num_banks)
        banks[place if turn % 2 == 0 else num_banks - 1 - place].append(channel)
    order = bank_order(energy, bank_size=bank_size, layout="snake", seed=0)
    assert order.tolist() == [channel for bank in banks for channel in bank]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_seeded_permutation(layout):
    order = bank_order(energies(), bank_size=64, layout=layout, seed=3)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(256))
    assert torch.equal(order, bank_order(energies(), bank_size=64, layout=layout, seed=3))
    assert torch.equal(order, bank_order(energies(), bank_size=64, layout=layout, seed=4)) == (
        layout in ("none", "snake")
    )
    assert torch.equal(order, torch.arange(256)) == (layout == "none")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coact_lowers_the_variance_of_the_banks_shares(seed):
    energy = energies(seed=seed)
    variance = {
        layout: share_variance(energy, bank_order(energy, bank_size=64, layout=layout, seed=seed), 64)
        for layout in LAYOUTS
    }
    assert variance["coact"] < 0.8 * variance["snake"]
    assert variance["coact"] < variance["random"]


def test_snake_keeps_more_energy_than_sorted_channels():
    energy = energies()

    def retained(order):
        dealt = energy[:, order].square()
        kept = bank_topk_mask(dealt, bank_size=64, active_per_bank=16)
        return ((dealt * kept).sum(-1) / dealt.sum(-1)).mean().item()

    by_energy = energy.mean(0).argsort(descending=True)
    assert retained(bank_order(energy, bank_size=64, layout="snake", seed=0)) > retained(by_energy) + 0.01


@pytest.mark.parametrize("layout", ["snake", "coact"])
def test_one_bank_cannot_be_dealt(layout):
    energy = energies(channels=64)
    order = bank_order(energy, bank_size=64, layout=layout, seed=0)
    assert torch.equal(order, energy.mean(0).argsort(descending=True))


@pytest.mark.parametrize("bias", [False, True])
def test_permuted_channels_compute_the_same_dense_function(bias):
    torch.manual_seed(0)
    layer = SparseSwiGLU(24, 256, SparsityConfig(active_per_bank=64, predictor_rank=4), 0, bias=bias).double()
    x = torch.randn(5, 24, dtype=torch.float64)
    order = bank_order(energies(), bank_size=64, layout="random", seed=0)
    with torch.no_grad():
        before, channels = layer(x), layer.dense_activation(x)
        permute_channels(layer, order)
        torch.testing.assert_close(layer.dense_activation(x), channels[:, order], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
        permute_channels(layer, order.argsort())
        assert torch.equal(layer(x), before)
