"""What the tests of the Triton kernels share: the device, poisoned memory, references in float64.

The device is a GPU where there is one; elsewhere tensors of the CPU in Triton's interpreter (`conftest.py` of the
repository turns it on).
"""

from collections.abc import Iterator

import pytest
import torch
from kernels.kernel_cases import Case, make_input, make_layer
from torch import Tensor
from torch.nn import functional

from bankwise.ffn import SparseSwiGLU, bank_topk_mask_reference
from bankwise.kernels import dispatch
from bankwise.kernels.cpu.packing import pack
from bankwise.kernels.triton import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draws(tokens: int, size: int, kind: str, seed: int = 0) -> Tensor:
    """Logits [tokens, size] of a kind that is hard to order."""
    values = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    signs = values.round().clamp(-1, 1)
    return {
        "normal": values,
        "bfloat16": values.bfloat16().float(),
        "integers": values.round(),
        "zeros": torch.zeros_like(values),
        "signed zeros": signs * 0.0,
        "largest": values.clamp(-1, 1) * 3.4e38,
        "denormal": values * 1e-42,
        "offset": values + 4096,
        "all scales": signs * values.abs().exp() ** 20,
    }[kind].to(DEVICE)


KINDS = [
    "normal", "bfloat16", "integers", "zeros", "signed zeros", "largest", "denormal", "offset", "all scales",
]  # fmt: skip


def packed_case(case: Case) -> tuple[SparseSwiGLU, Tensor]:
    """A layer packed for the Triton kernels, and its input."""
    layer = make_layer(case).to(DEVICE)
    pack(layer, kernel="triton")
    return layer, make_input(case).to(DEVICE)


@torch.no_grad()
def select(layer: SparseSwiGLU, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """logits_TF and the mask of the channels that the kernels chose; checks what every choice must hold."""
    size, active = layer.bank_size, layer.active_per_bank
    predictor = decode.Predictor.of(layer.predictor)
    active_TA, bad_TN, logits_TF = decode.select_channels(x_TD, predictor, size, active, keep_logits=True)
    assert logits_TF is not None
    assert active_TA.dtype == torch.int32
    assert (bad_TN == (~logits_TF.isfinite()).unflatten(-1, (-1, size)).sum(-1)).all()
    banks = torch.arange(logits_TF.shape[1] // size, device=DEVICE).repeat_interleave(active)
    assert (active_TA // size == banks).all()
    mask_TF = torch.zeros_like(logits_TF, dtype=torch.bool).scatter_(1, active_TA.long(), True)
    assert (mask_TF.unflatten(-1, (-1, size)).sum(-1) == active).all()
    return logits_TF, mask_TF


@torch.no_grad()
def errors(case: Case) -> tuple[float, float]:
    """Relative error of the kernels and of plain PyTorch in the same dtype, against float64, all with one mask."""
    layer, x_TD = packed_case(case)
    _, mask_TF = select(layer, x_TD)
    actual = dispatch.run_packed(layer, layer.packed, x_TD)
    assert actual.shape == x_TD.shape
    assert actual.dtype == x_TD.dtype
    plain = layer.down_proj(layer.dense_activation(x_TD) * mask_TF)
    linears = (layer.gate_proj, layer.up_proj, layer.down_proj)
    bias = [None if linear.bias is None else linear.bias.double() for linear in linears]
    weight = [linear.weight.double() for linear in linears]
    gate_TF = functional.linear(x_TD.double(), weight[0], bias[0])
    h_TF = functional.silu(gate_TF) * functional.linear(x_TD.double(), weight[1], bias[1])
    exact = functional.linear(h_TF * mask_TF, weight[2], bias[2])
    return relative_rms(actual, exact), relative_rms(plain, exact)


@torch.no_grad()
def relative_rms(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def reference_mask(logits_TF: Tensor, layer: SparseSwiGLU) -> Tensor:
    return bank_topk_mask_reference(logits_TF, bank_size=layer.bank_size, active_per_bank=layer.active_per_bank)
