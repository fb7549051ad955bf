"""Channel energy and the auxiliary routing loss, against their formulas in float64."""

import pytest
import torch

from bankwise.ffn import bank_topk_mask_reference, channel_energy, routing_loss

T, F, B, K = 6, 24, 8, 3
SIZES = {"bank_size": B, "active_per_bank": K}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_banks(values):
    return values.unflatten(-1, (-1, B))


def selection():
    return bank_topk_mask_reference(draw(T, F, seed=3), **SIZES)


def test_energy_is_the_norm_of_what_a_channel_adds_to_the_output():
    h, down, center = draw(T, F), draw(5, F, seed=1), draw(F, seed=2)
    for c in (None, center):
        moved = h if c is None else h - c
        added = moved[:, None, :] * down  # [T, D, F]: one column per channel
        torch.testing.assert_close(channel_energy(h, down, c), added.norm(dim=1))


def test_energy_carries_no_gradient_and_is_float32_for_a_bfloat16_model():
    h, down = draw(T, F).bfloat16().requires_grad_(), draw(5, F, seed=1).bfloat16().requires_grad_()
    energy = channel_energy(h, down)
    assert energy.dtype == torch.float32
    assert not energy.requires_grad
    torch.testing.assert_close(energy, channel_energy(h.float(), down.float()))


def kl_by_hand(z, energy, keep):
    total = 0.0
    for t in range(T):
        for start in range(0, F, B):
            channels = [i for i in range(start, start + B) if keep is None or keep[t, i]]
            weights = [float(energy[t, i]) ** 2 for i in channels]
            log_sum = torch.logsumexp(torch.stack([z[t, i] for i in channels]), 0)
            for i, weight in zip(channels, weights, strict=True):
                share = weight / sum(weights)
                if share > 0:
                    total = total + share * (torch.tensor(share).double().log() - (z[t, i] - log_sum))
    return total / (T * F / B)


@pytest.mark.parametrize("scope", ["all", "selected"])
def test_kl_follows_its_formula(scope):
    z, energy = draw(T, F).requires_grad_(), draw(T, F, seed=1).abs()
    keep = selection() if scope == "selected" else None
    loss, expected = routing_loss(z, energy, selected_TF=keep, **SIZES), kl_by_hand(z, energy, keep)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    actual, wanted = torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_kl_is_softmax_minus_share():
    z, energy = draw(T, F).requires_grad_(), draw(T, F, seed=1).abs()
    routing_loss(z, energy, **SIZES).backward()
    share = in_banks(energy**2) / in_banks(energy**2).sum(-1, keepdim=True)
    expected = (in_banks(z.detach()).softmax(-1) - share).flatten(-2) / (T * F / B)
    torch.testing.assert_close(z.grad, expected)


def test_kl_vanishes_at_the_log_of_the_squared_energies_and_at_any_offset_per_bank():
    energy = draw(T, F, seed=1).abs()
    offset = draw(T, F // B, seed=2).repeat_interleave(B, dim=-1)
    z = (energy.square().log() + offset).requires_grad_()
    loss = routing_loss(z, energy, **SIZES)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    assert z.grad.abs().max() < 1e-12
    assert float(routing_loss(z.detach() * 1.2, energy, **SIZES)) > 1e-4


@pytest.mark.parametrize("scope", ["all", "selected"])
def test_bce_follows_its_formula(scope):
    z, energy = draw(T, F), draw(T, F, seed=1).abs()
    keep = selection() if scope == "selected" else torch.ones(T, F, dtype=torch.bool)
    cut = in_banks(z).sort(-1, descending=True).values[..., K - 1 : K]
    p = torch.sigmoid(in_banks(z) - cut).flatten(-2)
    oracle = bank_topk_mask_reference(energy, **SIZES)
    expected = -(torch.where(oracle, p, 1 - p).log() * keep).sum() / (T * F)
    actual = routing_loss(z, energy, kind="bce", selected_TF=keep if scope == "selected" else None, **SIZES)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("scope", ["all", "selected"])
def test_kl_passes_gradcheck(scope):
    energy = draw(T, F, seed=1).abs()
    keep = selection() if scope == "selected" else None
    assert torch.autograd.gradcheck(
        lambda z: routing_loss(z, energy, selected_TF=keep, **SIZES), draw(T, F).requires_grad_()
    )


@pytest.mark.parametrize("scope", ["all", "selected"])
def test_the_gradient_of_bce_takes_the_cut_as_given(scope):
    z, energy = draw(T, F).requires_grad_(), draw(T, F, seed=1).abs()
    keep = selection() if scope == "selected" else None
    routing_loss(z, energy, kind="bce", selected_TF=keep, **SIZES).backward()
    cut = in_banks(z.detach()).sort(-1, descending=True).values[..., K - 1 : K]
    p = torch.sigmoid(in_banks(z.detach()) - cut).flatten(-2)
    expected = (p - bank_topk_mask_reference(energy, **SIZES).double()) / (T * F)
    torch.testing.assert_close(z.grad, expected if keep is None else expected * keep)


@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_channels_out_of_scope_get_no_gradient(kind):
    z, keep = draw(T, F).requires_grad_(), selection()
    routing_loss(z, draw(T, F, seed=1).abs(), kind=kind, selected_TF=keep, **SIZES).backward()
    assert (z.grad[~keep] == 0).all()
    assert (z.grad[keep] != 0).all()


@pytest.mark.parametrize("kind", ["kl", "bce"])
@pytest.mark.parametrize(
    "energy", [torch.zeros(T, F), torch.eye(T, F), torch.full((T, F), 1e-30)], ids=["0", "1", "-30"]
)
def test_banks_with_vanishing_energy_stay_finite(kind, energy):
    z = draw(T, F).float().requires_grad_()
    loss = routing_loss(z, energy, kind=kind, selected_TF=selection(), **SIZES)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_the_loss_sends_nothing_to_the_energies_and_is_float32_for_bfloat16_logits(kind):
    energy = draw(T, F, seed=1).abs().float().requires_grad_()
    z = draw(T, F).bfloat16()
    loss = routing_loss(z.requires_grad_(), energy, kind=kind, **SIZES)
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, energy, allow_unused=True) == (None,)
