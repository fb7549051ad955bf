"""Selections without a predictor: which channels they keep, what they pass back, and that nothing else changes them."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bankwise.config import SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask_reference, record_routing
from bankwise.kernels import dispatch
from bankwise.models import BankwiseLlamaConfig
from bankwise.models.cost import token_cost

D, F, B, K = 24, 64, 16, 4
CONTROLS = ["oracle_bank", "oracle_global", "random_fixed", "random_per_token"]
RANDOM = ["random_fixed", "random_per_token"]


def make_layer(selection, *, layer=0, **settings):
    torch.manual_seed(5)
    settings = {"bank_size": B, "active_per_bank": K, "predictor_rank": 4, "selection": selection} | settings
    made = SparseSwiGLU(D, F, SparsityConfig(**settings), layer)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_(std=0.5)
    return made.eval()


def make_input(*shape, seed=6):
    return torch.randn(*(shape or (3, 9)), D, generator=torch.Generator().manual_seed(seed))


def dense_h(layer, x):
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    return gate * torch.sigmoid(gate) * up


def oracle(layer, x, *, bank_size=B, active=K, center=0.0):
    energy = (dense_h(layer, x) - center).abs() * layer.down_proj.weight.square().sum(dim=0).sqrt()
    return bank_topk_mask_reference(energy, bank_size=bank_size, active_per_bank=active)


@torch.no_grad()
def test_the_oracles_keep_the_largest_true_contributions():
    x = make_input()
    in_banks, over_all = make_layer("oracle_bank"), make_layer("oracle_global")
    assert torch.equal(in_banks.active_mask(x), oracle(in_banks, x))
    expected = oracle(over_all, x, bank_size=F, active=F // B * K)
    assert torch.equal(over_all.active_mask(x), expected)
    assert not torch.equal(expected, oracle(in_banks, x))
    centred = make_layer("oracle_bank", center="mean")
    centred.center.normal_()
    assert torch.equal(centred.active_mask(x), oracle(centred, x, center=centred.center))


@torch.no_grad()
def test_of_equal_contributions_the_lower_channel_is_kept():
    layer = make_layer("oracle_global")
    for linear in (layer.gate_proj, layer.up_proj):
        linear.weight.copy_(linear.weight[:1].expand(F, D))
    layer.down_proj.weight.fill_(1.0)
    assert layer.active_mask(make_input(1)).nonzero()[:, 1].tolist() == list(range(F // B * K))


@torch.no_grad()
@pytest.mark.parametrize("selection", RANDOM)
def test_random_channels_are_k_of_each_bank_and_follow_from_seed_and_layer(selection):
    x = make_input(4, 50)
    mask = make_layer(selection).active_mask(x)
    assert mask.shape == (4, 50, F)
    assert (mask.unflatten(-1, (-1, B)).sum(dim=-1) == K).all()
    assert torch.equal(mask, make_layer(selection).active_mask(x))
    assert not torch.equal(mask, make_layer(selection, selection_seed=1).active_mask(x))
    assert not torch.equal(mask, make_layer(selection, layer=1).active_mask(x))
    assert bool((mask == mask[:1, :1]).all()) == (selection == "random_fixed")


@torch.no_grad()
def test_random_per_token_draws_evenly_and_independently_of_the_token_before():
    mask = make_layer("random_per_token").active_mask(make_input(2000)).double()
    assert (mask.mean(dim=0) - K / B).abs().max() < 4.5 * math.sqrt(K / B * (1 - K / B) / 2000)
    assert (mask[1:] * mask[:-1]).sum() / mask[1:].sum() == pytest.approx(K / B, abs=0.01)


@torch.no_grad()
def test_random_per_token_looks_at_the_token_alone_and_not_at_its_last_bits():
    layer, x = make_layer("random_per_token"), make_input(4, 700)
    mask = layer.active_mask(x)
    assert torch.equal(layer.active_mask(x[2, 5]), mask[2, 5])
    assert torch.equal(layer.active_mask(x.flip(1)).flip(1), mask)
    assert torch.equal(layer.active_mask(x * (1 + 1e-6)), mask)


@pytest.mark.parametrize("h_grad", ["masked", "straight"])
@pytest.mark.parametrize("gate_mode", ["ste_unit", "hard", "detached"])
@pytest.mark.parametrize("selection", CONTROLS)
def test_the_layer_is_the_plain_mask_and_no_gradient_reaches_the_predictor(selection, gate_mode, h_grad):
    layer, x = make_layer(selection, gate_mode=gate_mode, h_grad=h_grad), make_input()
    mask, weight = layer.active_mask(x), make_input(seed=7)
    expected = (dense_h(layer, x) * mask) @ layer.down_proj.weight.T
    y = layer.train()(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * weight).sum().backward()
    assert all(value.grad is None for value in layer.predictor.parameters())
    reached = mask if h_grad == "masked" else torch.ones_like(mask)
    (by_hand,) = torch.autograd.grad(
        (dense_h(layer, x) * reached * (weight @ layer.down_proj.weight)).sum(), layer.up_proj.weight
    )
    torch.testing.assert_close(layer.up_proj.weight.grad, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", CONTROLS)
def test_recomputation_in_the_backward_pass_keeps_the_mask(selection):
    layer = make_layer(selection).train()
    gradients = []
    for recompute in (False, True):
        x = make_input().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("selection", CONTROLS)
def test_a_schedule_of_channels_and_a_leak_apply(selection):
    layer, x = make_layer(selection), make_input()
    h = dense_h(layer, x)
    layer.train()
    layer.scheduled_active = B
    torch.testing.assert_close(layer(x), h @ layer.down_proj.weight.T, rtol=1e-5, atol=1e-5)
    layer.scheduled_active, layer.leak = None, 0.5
    half = torch.where(layer.active_mask(x), h, h / 2)
    torch.testing.assert_close(layer(x), half @ layer.down_proj.weight.T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("selection", CONTROLS)
def test_the_record_tells_how_much_of_the_oracle_was_kept(selection):
    layer, x = make_layer(selection), make_input(400)
    with record_routing(layer) as record:
        layer(x)
    assert record.losses == [], "there is no predictor to train"
    expected = (layer.active_mask(x) & oracle(layer, x)).sum() / (400 * F * K / B)
    assert record.recalls[0].item() == pytest.approx(expected.item())
    known = {"oracle_bank": 1.0, "random_fixed": K / B, "random_per_token": K / B}
    if selection in known:
        assert record.recalls[0].item() == pytest.approx(known[selection], abs=0.1)


def test_a_frozen_predictor_chooses_but_learns_from_nothing():
    layer, x = make_layer("predictor", predictor_grad="frozen"), make_input()
    with record_routing(layer) as record:
        layer.train()(x).sum().backward()
    assert record.losses == []
    assert all(value.grad is None for value in layer.predictor.parameters())
    assert torch.equal(layer.active_mask(x), bank_topk_mask_reference(layer.logits(x), bank_size=B, active_per_bank=K))


@torch.no_grad()
@pytest.mark.parametrize("selection", CONTROLS)
def test_kernels_leave_these_layers_to_the_reference(selection):
    layer, x = make_layer(selection), make_input(1)
    choice = dispatch.choose(layer, x)
    assert choice.kernel == "reference"
    assert selection in choice.reason
    expected = (dense_h(layer, x) * layer.active_mask(x)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer.packed is None


@pytest.mark.parametrize(
    ("selection", "share"),
    [("oracle_bank", 1.0), ("oracle_global", 1.0), ("random_fixed", 0.25), ("random_per_token", 0.25)],
)
def test_a_token_pays_for_what_its_choice_has_to_read(selection, share):
    def cost(**settings):
        shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        sparsity = SparsityConfig(predictor_rank=16, **settings).to_dict()
        config = BankwiseLlamaConfig(**shape, num_key_value_heads=2, vocab_size=261, sparsity=sparsity)
        return token_cost(config, dtype_bytes=2, active_fraction=0.25)

    control, predictor = cost(selection=selection), cost()
    assert control.ffn_bytes_fraction == share < predictor.ffn_bytes_fraction or share == 1.0
    assert control.ffn_bytes == share * control.dense_ffn_bytes
    assert control.predictor_bytes == 0 < predictor.predictor_bytes
