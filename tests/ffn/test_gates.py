"""Gate modes: forward values and gradients against the closed forms of `method.md` section 2.4, in float64.

The loss is sum(delta * gated), so that delta is the gradient at the gated activation and a = h * delta the change of
the loss per unit of gate.
"""

from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch

from bankwise.errors import RoutingError
from bankwise.ffn import bank_topk_mask_reference, gate_activation
from bankwise.ffn.gates import SteUnitGate

T, F, B, K = 5, 24, 8, 3
Q = NormalDist().inv_cdf(1 - K / B)
SIZES = {"bank_size": B, "active_per_bank": K}
UNIT_MODES = ["ste_unit", "detached", "default_ema", "hard"]
VALUE_MODES = ["sigmoid/none", "sigmoid/2sigma", "sigmoid/bank_mean_1", "affine", "relu_rms", "stat_topk"]
MODES = UNIT_MODES + VALUE_MODES


def inputs(dtype=torch.float64, tokens=T):
    """Skewed logits, well apart in each bank, so that a finite difference never moves a channel over the cut."""
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(tokens, F // B, B, generator=generator, dtype=torch.float64).argsort(dim=-1)
    offset = torch.rand(tokens, F // B, 1, generator=generator, dtype=torch.float64) / 2
    z = (0.1 * (0.5 * order).exp() - 1 + offset).flatten(-2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    h, delta, weight, default = draw(tokens, F), draw(tokens, F), draw(F), draw(F)
    return SimpleNamespace(
        h=h.to(dtype).requires_grad_(),
        z=z.to(dtype).requires_grad_(),
        delta=delta.to(dtype),
        weight=weight.to(dtype).requires_grad_(),
        default=default.to(dtype),
    )


def settings_of(mode, at):
    name, _, norm = mode.partition("/")
    extra = {"gate_norm": norm} if norm else {}
    if name in ("affine", "relu_rms"):
        extra["gate_weight_F"] = at.weight
    if name == "default_ema":
        extra["default_F"] = at.default
    return {"gate_mode": name} | SIZES | extra


def gated(mode, at, **changes):
    return gate_activation(at.h, at.z, **(settings_of(mode, at) | changes))


def in_banks(values):
    return values.unflatten(-1, (-1, B))


def bank_sum(values):
    return in_banks(values).sum(-1, keepdim=True).expand(-1, -1, B).flatten(-2)


def closed_form(mode, at, alpha=1.0, tau=1.0):
    """Gate, dL/dz, and dL/d(gate_weight) of the table, written with no autograd."""
    h, z, delta, weight = at.h.detach(), at.z.detach(), at.delta, at.weight.detach()
    m = bank_topk_mask_reference(z, **SIZES).double()
    a = h * delta
    sigma = 1 / (1 + torch.exp(-z))
    slope = sigma * (1 - sigma)
    mean = bank_sum(z) / B
    std = (bank_sum((z - mean) ** 2) / B).sqrt()
    if mode in ("detached", "hard"):
        return m, torch.zeros_like(z), None
    if mode in ("ste_unit", "default_ema"):
        ranked = in_banks(z).sort(-1, descending=True).values
        theta = ((ranked[..., K - 1] + ranked[..., K]) / 2).repeat_interleave(B, dim=-1)
        p = 1 / (1 + torch.exp(-(z - theta) / (tau * std)))
        moved = torch.where(m.bool(), h, at.default) if mode == "default_ema" else h
        return m, alpha * p * (1 - p) / (tau * std) * moved * delta, None
    if mode == "sigmoid/none":
        return m * sigma, m * slope * a, None
    if mode == "sigmoid/2sigma":
        return 2 * m * sigma, 2 * m * slope * a, None
    if mode == "sigmoid/bank_mean_1":
        g = K * m * sigma / bank_sum(m * sigma)
        return g, m * (1 - sigma) * g * (a - bank_sum(g * a) / K), None
    if mode == "affine":
        return m * (1 + weight * (sigma - 0.5)), m * weight * slope * a, (m * (sigma - 0.5) * a).sum(0)
    if mode == "relu_rms":
        q = m * z.clamp_min(0)
        rho = ((q**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        shared = (weight * a * q).sum(-1, keepdim=True)
        return weight * q / rho, m * (z > 0) * (weight * a / rho - q * shared / (F * rho**3)), (a * q / rho).sum(0)
    assert mode == "stat_topk"
    above = (z > mean + Q * std).double()
    shared = bank_sum(above * a)
    return above * (z - mean - Q * std), above * a - (1 / B + Q * (z - mean) / (B * std)) * shared, None


def assert_near(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(value, at, *names):
    found = torch.autograd.grad((value * at.delta).sum(), [getattr(at, name) for name in names], allow_unused=True)
    return [torch.zeros_like(getattr(at, n)) if g is None else g for n, g in zip(names, found, strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradients_are_those_of_the_table(mode):
    at = inputs()
    gate, dz, dweight = closed_form(mode, at)
    value = gated(mode, at)
    assert_near(value.detach(), gate * at.h.detach())
    actual_dh, actual_dz = gradients(gated(mode, at), at, "h", "z")
    assert_near(actual_dh, gate * at.delta)
    assert_near(actual_dz, dz)
    if dweight is not None:
        assert_near(gradients(gated(mode, at), at, "weight")[0], dweight)


def test_the_test_logits_exercise_both_sides_of_every_kink():
    at = inputs()
    kept = bank_topk_mask_reference(at.z.detach(), **SIZES)
    above = closed_form("stat_topk", at)[0] > 0
    assert (at.z[~kept] > 0).any()
    assert (above != kept).any(), "stat_topk never keeps another count than k"
    ranked = in_banks(at.z.detach()).sort(-1).values
    assert ranked.diff(dim=-1).min() > 0.05


@pytest.mark.parametrize("mode", VALUE_MODES)
def test_modes_that_are_smooth_away_from_the_cut_pass_gradcheck(mode):
    at = inputs(tokens=2)
    checked = (at.h, at.z, at.weight) if mode in ("affine", "relu_rms") else (at.h, at.z)

    def value(h, z, weight=None):
        return gated(mode, SimpleNamespace(h=h, z=z, weight=weight, default=None))

    assert torch.autograd.gradcheck(value, checked)


@pytest.mark.parametrize("mode", MODES)
def test_dropped_channels_pass_nothing_to_h(mode):
    at = inputs()
    kept = closed_form(mode, at)[0] != 0
    (dh,) = gradients(gated(mode, at), at, "h")
    assert (dh[~kept] == 0).all()
    assert (dh[kept] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_straight_changes_only_the_gradient_of_h(mode):
    at = inputs()
    masked, straight = gated(mode, at), gated(mode, at, h_grad="straight")
    assert torch.equal(masked, straight)
    dh, dz = gradients(straight, at, "h", "z")
    assert_near(dh, at.delta)
    assert_near(dz, closed_form(mode, at)[1])


@pytest.mark.parametrize("mode", ["ste_unit", "default_ema"])
def test_alpha_scales_and_tau_widens_the_straight_through_gradient(mode):
    at = inputs()
    (dz,) = gradients(gated(mode, at, ste_alpha=0.3, ste_tau=2.5), at, "z")
    assert_near(dz, closed_form(mode, at, alpha=0.3, tau=2.5)[1])


@pytest.mark.parametrize("mode", UNIT_MODES)
def test_keeping_every_channel_is_the_identity_and_gives_the_router_nothing(mode):
    at = inputs()
    value = gated(mode, at, active_per_bank=B)
    assert torch.equal(value, at.h)
    dh, dz = gradients(value, at, "h", "z")
    assert torch.equal(dh, at.delta)
    assert (dz == 0).all()


def test_keeping_every_channel_is_the_identity_for_affine_at_its_start_and_for_stat_topk():
    at = inputs()
    at.weight = torch.zeros_like(at.weight)
    assert torch.equal(gated("affine", at, active_per_bank=B), at.h)
    assert torch.equal(gated("stat_topk", at, active_per_bank=B), at.h)


def test_affine_gives_the_router_no_gradient_until_its_slope_leaves_zero():
    at = inputs()
    at.weight = torch.zeros_like(at.weight, requires_grad=True)
    dz, dweight = gradients(gated("affine", at), at, "z", "weight")
    assert (dz == 0).all()
    assert dweight.abs().max() > 0


def test_bank_mean_1_gates_average_to_one_over_the_kept_channels():
    at = inputs()
    at.h = torch.ones_like(at.h)
    assert_near(in_banks(gated("sigmoid/bank_mean_1", at)).sum(-1), torch.full((T, F // B), float(K)).double())


def test_bank_mean_1_is_finite_where_every_sigmoid_underflows():
    z = torch.full((1, B), -300.0)
    gate = gate_activation(torch.ones(1, B), z, gate_mode="sigmoid", gate_norm="bank_mean_1", **SIZES)
    assert gate.tolist() == [[1.0] * K + [0.0] * (B - K)]


def test_relu_rms_with_its_start_weight_gives_equal_positive_logits_a_gate_of_one():
    weight = torch.full((F,), (K / B) ** 0.5)
    gate = gate_activation(
        torch.ones(2, F), torch.full((2, F), 1.7), gate_mode="relu_rms", gate_weight_F=weight, **SIZES
    )
    torch.testing.assert_close(gate, (torch.arange(F) % B < K).float().expand(2, F))


def test_default_ema_reads_no_dropped_activation_in_its_router_gradient():
    at = inputs()
    kept = bank_topk_mask_reference(at.z.detach(), **SIZES)
    (before,) = gradients(gated("default_ema", at), at, "z")
    at.h = torch.where(kept, at.h.detach(), torch.full_like(at.h, 1e3)).requires_grad_()
    (after,) = gradients(gated("default_ema", at), at, "z")
    assert torch.equal(before, after)


def ste_gate(h, z, active_per_bank=K, alpha=1.0, tau=1.0):
    return SteUnitGate.apply(h, z, B, active_per_bank, alpha, tau)


@pytest.mark.parametrize("tokens", [0, 1, T, 600])
@pytest.mark.parametrize("active_per_bank", [1, K, B - 1, B])
def test_the_fast_gate_equals_its_definition(active_per_bank, tokens):
    at = inputs(tokens=tokens)
    fast = ste_gate(at.h, at.z, active_per_bank, 0.7, 1.3)
    slow = gated("ste_unit", at, active_per_bank=active_per_bank, ste_alpha=0.7, ste_tau=1.3)
    assert torch.equal(fast, slow)
    for actual, expected in zip(gradients(fast, at, "h", "z"), gradients(slow, at, "h", "z"), strict=True):
        assert_near(actual, expected)


def test_the_fast_gate_takes_any_leading_shape_and_strides():
    at = inputs(tokens=6)
    rows = ste_gate(at.h, at.z)
    dh, dz = gradients(rows, at, "h", "z")
    h, z, delta = (v.detach().view(2, 3, F).transpose(0, 1) for v in (at.h, at.z, at.delta))
    moved = SimpleNamespace(h=h.requires_grad_(), z=z.requires_grad_(), delta=delta)
    value = ste_gate(moved.h, moved.z)
    assert torch.equal(value.transpose(0, 1).reshape(6, F), rows)
    for actual, expected in zip(gradients(value, moved, "h", "z"), (dh, dz), strict=True):
        assert torch.equal(actual.transpose(0, 1).reshape(6, F), expected)


def test_the_fast_gate_keeps_one_bit_of_each_channel_for_its_backward_pass():
    at, saved = inputs(tokens=40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ste_gate(at.h, at.z)
    assert sorted(tensor.nbytes for tensor in saved) == sorted([at.h.nbytes, at.z.nbytes, 40 * F // 8, 40 * F // B * 8])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fast_gate_keeps_float32_logits_beside_h_of_any_dtype(dtype, tolerance):
    at = inputs(torch.float32, tokens=40)
    at.h, at.delta = at.h.detach().to(dtype).requires_grad_(), at.delta.to(dtype)
    fast, slow = ste_gate(at.h, at.z), gated("ste_unit", at)
    assert fast.dtype == slow.dtype == dtype
    assert torch.equal(fast, slow)
    (fast_dh, fast_dz), (slow_dh, slow_dz) = (gradients(value, at, "h", "z") for value in (fast, slow))
    assert (fast_dh.dtype, fast_dz.dtype) == (dtype, torch.float32)
    assert torch.equal(fast_dh, slow_dh)
    assert (fast_dz - slow_dz).norm() <= tolerance * slow_dz.norm()


@pytest.mark.parametrize("use_fast_gate", [True, False])
def test_a_large_offset_of_the_logits_changes_no_gradient(use_fast_gate):
    at = inputs(torch.float32)
    shifted = SimpleNamespace(**vars(at) | {"z": (at.z.detach() + 1024).requires_grad_()})
    exact = SimpleNamespace(
        h=at.h.detach().double().requires_grad_(),
        z=shifted.z.detach().double().requires_grad_(),
        delta=at.delta.double(),
    )
    value = ste_gate(shifted.h, shifted.z) if use_fast_gate else gated("ste_unit", shifted)
    (dz,), (exact_dz,) = gradients(value, shifted, "z"), gradients(gated("ste_unit", exact), exact, "z")
    assert (dz - exact_dz).norm() <= 1e-3 * exact_dz.norm()


@pytest.mark.parametrize("mode", MODES)
def test_a_bank_of_equal_logits_has_finite_gradients(mode):
    at = inputs(torch.float32)
    at.z = torch.full((T, F), 0.5, requires_grad=True)
    for gradient in gradients(gated(mode, at), at, "h", "z"):
        assert gradient.isfinite().all()


def test_the_gate_is_float32_where_h_is_bfloat16():
    at = inputs(torch.float32, tokens=40)
    at.h = at.h.detach().bfloat16()
    once_rounded = gated("sigmoid/2sigma", SimpleNamespace(**vars(at) | {"h": at.h.float()})).bfloat16()
    value = gated("sigmoid/2sigma", at)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, once_rounded)


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_finite_raise_in_every_mode(mode):
    at = inputs()
    at.z = at.z.detach().clone()
    at.z[2, 3] = float("nan")
    with pytest.raises(RoutingError, match="not finite"):
        gated(mode, at)


@pytest.mark.parametrize("mode", MODES)
def test_a_token_is_gated_alone_as_in_a_batch(mode):
    at = inputs()
    alone = [gated(mode, SimpleNamespace(**vars(at) | {"h": at.h[t : t + 1], "z": at.z[t : t + 1]})) for t in range(T)]
    assert_near(torch.cat(alone), gated(mode, at), 1e-14)
