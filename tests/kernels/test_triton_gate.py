"""The fused gate of training: the routing rule bit for bit, and the values and gradients of `SteUnitGate`."""

import subprocess
import sys

import pytest
import torch
from kernels.triton_cases import DEVICE, DTYPES, KINDS, draws, poison, relative_rms  # noqa: F401

from bankwise import SparsityConfig
from bankwise.errors import KernelError, RoutingError
from bankwise.ffn import SparseSwiGLU, bank_topk_mask_reference
from bankwise.ffn.bank import cut_banks
from bankwise.ffn.gates import SteUnitGate
from bankwise.kernels.triton import gate
from bankwise.kernels.triton.gate import FusedSteUnitGate

# numpy, in which the interpreter computes, warns of what a GPU does in silence.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def check_selection(logits, bank_size, active):
    gated, words, threshold, width = torch.ops.bankwise.unit_gate(
        torch.ones_like(logits), logits, bank_size, active, 0.5
    )
    mask = bank_topk_mask_reference(logits, bank_size=bank_size, active_per_bank=active)
    assert torch.equal(gated, mask.float())
    bits = (words[..., None] >> torch.arange(bank_size, device=DEVICE)) & 1
    assert torch.equal(bits.flatten(-2) != 0, mask)
    if active < bank_size:
        cut = cut_banks(logits, bank_size=bank_size, active_per_bank=active).threshold_TN1
        assert torch.equal(threshold, cut.squeeze(-1))
        from_cut = logits.double().unflatten(-1, (-1, bank_size)) - cut.double()
        if from_cut.square().sum() < 1e30:
            exact = 0.5 * from_cut.std(dim=-1, correction=0).clamp_min(1e-6)
            torch.testing.assert_close(width.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("active", [1, 8, 16, 63, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_the_rule_bit_for_bit(kind, active):
    check_selection(draws(3, 64 * 7, kind), 64, active)


@pytest.mark.parametrize(("bank_size", "active"), [(1, 1), (2, 1), (3, 2), (16, 4), (40, 10), (48, 47), (63, 16)])
def test_bank_sizes_beside_powers_of_two(bank_size, active):
    for kind in ("normal", "integers", "signed zeros"):
        check_selection(draws(2, bank_size * 11, kind), bank_size, active)


def test_the_widest_layer():
    check_selection(draws(3, 18944, "bfloat16"), 64, 16)


def gradients(function, h, logits, dy, *settings):
    h, logits = h.detach().requires_grad_(), logits.detach().requires_grad_()
    gated = function.apply(h, logits, *settings)
    return gated.detach(), *torch.autograd.grad(gated, (h, logits), dy.to(gated.dtype), allow_unused=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", [1, 16, 63, 64])
def test_values_and_gradients(dtype, active):
    h, logits, dy = (draws(5, 320, "normal", seed) for seed in range(3))
    h, dy = h.to(dtype), dy.to(dtype)
    settings = (64, active, 1.3, 0.7)
    fused = gradients(FusedSteUnitGate, h, logits, dy, *settings)
    plain = gradients(SteUnitGate, h, logits, dy, *settings)
    exact = gradients(SteUnitGate, h.double(), logits.double(), dy.double(), *settings)
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])
    assert (fused[0].dtype, fused[1].dtype) == (dtype, dtype)
    if active == 64:
        assert fused[2] is None
        assert plain[2] is None
        return
    assert fused[2].dtype == torch.float32
    assert relative_rms(fused[2], exact[2]) <= max(2 * relative_rms(plain[2], exact[2]), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_router_gradients_at_hard_logits(kind):
    h, dy, logits = draws(2, 192, "normal", 1), draws(2, 192, "normal", 3), draws(2, 192, kind, 2)
    _, _, dz = gradients(FusedSteUnitGate, h, logits, dy, 64, 16, 1.0, 1.0)
    if kind in ("largest", "all scales"):
        # The width overflows float32 or nearly so; what remains is that nothing but small numbers comes out.
        assert dz.isfinite().all()
        return
    exact = gradients(SteUnitGate, h.double(), logits.double(), dy.double(), 64, 16, 1.0, 1.0)[2]
    plain = gradients(SteUnitGate, h, logits, dy, 64, 16, 1.0, 1.0)[2]
    assert relative_rms(dz, exact) <= max(2 * relative_rms(plain, exact), 1e-6)


def test_only_the_gradients_that_are_asked_for():
    h, logits, dy = draws(3, 128, "normal", 1), draws(3, 128, "normal", 2), draws(3, 128, "normal", 3)
    _, dh, dz = gradients(FusedSteUnitGate, h, logits, dy, 64, 16, 1.0, 1.0)
    one = h.clone().requires_grad_()
    FusedSteUnitGate.apply(one, logits, 64, 16, 1.0, 1.0).backward(dy)
    assert torch.equal(one.grad, dh)
    other = logits.clone().requires_grad_()
    FusedSteUnitGate.apply(h, other, 64, 16, 1.0, 1.0).backward(dy)
    assert torch.equal(other.grad, dz)


def test_strided_inputs_leading_dimensions_and_no_tokens():
    h, logits, dy = draws(6, 128, "normal", 1), draws(6, 128, "normal", 2), draws(6, 128, "normal", 3)
    straight = gradients(FusedSteUnitGate, h, logits, dy, 64, 16, 1.0, 1.0)
    strided = [value.repeat_interleave(2, dim=1)[:, ::2] for value in (h, logits, dy)]
    for value, same in zip(gradients(FusedSteUnitGate, *strided, 64, 16, 1.0, 1.0), straight, strict=True):
        assert torch.equal(value, same)
    folded = [value.view(2, 3, 128) for value in (h, logits, dy)]
    for value, same in zip(gradients(FusedSteUnitGate, *folded, 64, 16, 1.0, 1.0), straight, strict=True):
        assert torch.equal(value, same.view(2, 3, 128))
    empty = [value[:0] for value in (h, logits, dy)]
    assert [value.shape for value in gradients(FusedSteUnitGate, *empty, 64, 16, 1.0, 1.0)] == [(0, 128)] * 3


NOT_FINITE = """
import torch
from bankwise.kernels.triton.gate import FusedSteUnitGate
logits = torch.zeros(2, 128, device="cuda")
logits[1, 70] = float("nan")
FusedSteUnitGate.apply(logits, logits, 64, 16, 1.0, 1.0)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(bad):
    if DEVICE == "cuda":
        # A device assertion ends the process's use of the GPU.
        finished = subprocess.run([sys.executable, "-c", NOT_FINITE], capture_output=True, text=True, timeout=300)
        assert finished.returncode != 0
        assert "router logits are not finite" in finished.stdout + finished.stderr
        return
    logits = torch.zeros(2, 128)
    logits[1, 70] = bad
    with pytest.raises(RoutingError, match="1 of 256 router logits are not finite"):
        FusedSteUnitGate.apply(torch.ones(2, 128), logits, 64, 16, 1.0, 1.0)


def test_operators_are_well_formed_for_torch():
    h, logits, dy = draws(2, 128, "normal", 1).bfloat16(), draws(2, 128, "normal", 2), draws(2, 128, "normal", 3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bankwise.unit_gate.default, (h, logits, 64, 16, 1.0), test_utils=checks)
    saved = torch.ops.bankwise.unit_gate(h, logits, 64, 16, 1.0)[1:]
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.bankwise.unit_gate_backward.default,
            (dy.bfloat16(), h, logits, *saved, 64, 1.0, *wanted),
            test_utils=checks,
        )


def test_limits_raise():
    h = draws(2, 128, "normal")
    for size, active in ((64, 65), (64, 0), (128, 16), (48, 16)):
        with pytest.raises(KernelError, match=f"cannot keep {active} of every {size} in 128 channels"):
            FusedSteUnitGate.apply(h, h, size, active, 1.0, 1.0)
    with pytest.raises(KernelError, match=r"the router logits are torch\.float32 \[2, 64\]"):
        FusedSteUnitGate.apply(h, h[:, :64], 64, 16, 1.0, 1.0)
    with pytest.raises(KernelError, match=r"the router logits are torch\.bfloat16"):
        FusedSteUnitGate.apply(h, h.bfloat16(), 64, 16, 1.0, 1.0)


def make_layer(**settings):
    torch.manual_seed(0)
    return SparseSwiGLU(32, 192, SparsityConfig(predictor_rank=16, **settings), 0).to(DEVICE)


def step(run, layer, x):
    layer.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach()] + [value.grad.clone() for value in layer.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_is_that_of_the_reference(monkeypatch, compiled):
    layer, x = make_layer(), draws(7, 32, "normal")
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    expected = step(layer, layer, x)
    monkeypatch.setenv("BANKWISE_KERNEL", "triton")
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    launched = []
    for name in ("gate_forward_kernel", "gate_backward_kernel"):
        monkeypatch.setattr(gate, name, Watched(getattr(gate, name), name, launched))
    actual = step(run, layer, x)
    assert launched == ["gate_forward_kernel", "gate_backward_kernel"]
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)


class Watched:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def test_what_the_fused_gate_cannot_do_runs_the_reference_or_raises(monkeypatch):
    layer, x = make_layer().double(), draws(3, 32, "normal").double()
    if DEVICE == "cuda":
        layer(x)
    monkeypatch.setenv("BANKWISE_KERNEL", "triton")
    with pytest.raises(KernelError, match=r"the fused gate cannot run: the activation is torch\.float64"):
        layer(x)
    wide = SparseSwiGLU(32, 256, SparsityConfig(bank_size=128, predictor_rank=16), 0).to(DEVICE)
    with pytest.raises(KernelError, match="bank_size=128 is above 64"):
        wide(x.float())
