"""`SteUnitGate` of `bankwise.ffn.gates` as one kernel each way: selection, mask, threshold and gate in one pass.

The forward saves, beside its inputs, one 64-bit word of mask, the threshold and the width for each bank: F/8 + F/8
bytes per token where the reference saves F + F/16. Logits that are not finite stop a GPU's stream with a device
assertion, as `bankwise.ffn.bank` does there; in Triton's interpreter they raise `RoutingError`.

Shapes: T leading dimensions (tokens), F channels, N banks (F / B), B channels per bank, K active per bank.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from bankwise.errors import KernelError, RoutingError
from bankwise.kernels.triton.gate_kernels import gate_backward_kernel, gate_forward_kernel
from bankwise.kernels.triton.support import check_banks, launch_on

BANKS_PER_PROGRAM = 16


@torch.library.custom_op("bankwise::unit_gate", mutates_args=())
def unit_gate(
    h_TF: Tensor, logits_TF: Tensor, bank_size: int, active: int, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gated_TF, and per bank the mask's word, the threshold and the width (the last two undefined for K = B)."""
    check_banks(h_TF.shape[-1], bank_size, active)
    if logits_TF.shape != h_TF.shape or logits_TF.dtype != torch.float32:
        raise KernelError(
            f"the router logits are {logits_TF.dtype} {list(logits_TF.shape)}; the fused gate takes float32 in the "
            f"activation's shape, {list(h_TF.shape)}"
        )
    _raise_unless_finite(logits_TF)
    gated_TF, words_TN, threshold_TN, width_TN = _fake_unit_gate(h_TF, logits_TF, bank_size, active, tau)
    num_rows = words_TN.numel()
    if num_rows:
        with launch_on(h_TF.device):
            gate_forward_kernel[(triton.cdiv(num_rows, BANKS_PER_PROGRAM),)](
                h_TF.contiguous(), logits_TF.contiguous(), gated_TF, words_TN, threshold_TN, width_TN, num_rows, tau,
                B=bank_size, K=active, BLOCK_B=triton.next_power_of_2(bank_size), BLOCK_M=BANKS_PER_PROGRAM,
                debug=True, sanitize_overflow=False, enable_fp_fusion=True,
            )  # fmt: skip
    return gated_TF, words_TN, threshold_TN, width_TN


@unit_gate.register_fake
def _fake_unit_gate(
    h_TF: Tensor, logits_TF: Tensor, bank_size: int, active: int, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*h_TF.shape[:-1], h_TF.shape[-1] // bank_size)
    gated_TF = torch.empty_like(h_TF, memory_format=torch.contiguous_format)
    return (
        gated_TF,
        h_TF.new_empty(shape, dtype=torch.int64),
        h_TF.new_empty(shape, dtype=torch.float32),
        h_TF.new_empty(shape, dtype=torch.float32),
    )


@torch.library.custom_op("bankwise::unit_gate_backward", mutates_args=())
def unit_gate_backward(
    dy_TF: Tensor, h_TF: Tensor, logits_TF: Tensor, words_TN: Tensor, threshold_TN: Tensor, width_TN: Tensor,
    bank_size: int, alpha: float, with_dh: bool, with_dz: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dh_TF and dz_TF; one that is not wanted is empty."""
    dh_TF, dz_TF = _fake_unit_gate_backward(
        dy_TF, h_TF, logits_TF, words_TN, threshold_TN, width_TN, bank_size, alpha, with_dh, with_dz
    )
    num_rows = words_TN.numel()
    if num_rows and (with_dh or with_dz):
        with launch_on(h_TF.device):
            gate_backward_kernel[(triton.cdiv(num_rows, BANKS_PER_PROGRAM),)](
                dy_TF.contiguous(), h_TF.contiguous(), logits_TF.contiguous(), words_TN, threshold_TN, width_TN,
                dh_TF, dz_TF, num_rows, alpha, B=bank_size, BLOCK_B=triton.next_power_of_2(bank_size),
                BLOCK_M=BANKS_PER_PROGRAM, WITH_DH=with_dh, WITH_DZ=with_dz, enable_fp_fusion=True,
            )  # fmt: skip
    return dh_TF, dz_TF


@unit_gate_backward.register_fake
def _fake_unit_gate_backward(
    dy_TF: Tensor, h_TF: Tensor, logits_TF: Tensor, words_TN: Tensor, threshold_TN: Tensor, width_TN: Tensor,
    bank_size: int, alpha: float, with_dh: bool, with_dz: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(h_TF, memory_format=torch.contiguous_format) if with_dh else h_TF.new_empty(0),
        torch.empty_like(logits_TF, memory_format=torch.contiguous_format) if with_dz else logits_TF.new_empty(0),
    )


class FusedSteUnitGate(torch.autograd.Function):
    """`SteUnitGate` with the same arguments and gradients: h * mask; dz through the bank's boundary probability."""

    @staticmethod
    def forward(
        ctx: Any, h_TF: Tensor, logits_TF: Tensor, bank_size: int, active_per_bank: int, alpha: float, tau: float
    ) -> Tensor:
        gated_TF, *per_bank = torch.ops.bankwise.unit_gate(h_TF, logits_TF, bank_size, active_per_bank, tau)
        ctx.settings = bank_size, active_per_bank < bank_size, alpha
        ctx.save_for_backward(h_TF, logits_TF, *per_bank)
        return gated_TF

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        bank_size, is_cut, alpha = ctx.settings
        with_dh, with_dz = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and is_cut
        dh_TF, dz_TF = torch.ops.bankwise.unit_gate_backward(
            dy_TF, *ctx.saved_tensors, bank_size, alpha, with_dh, with_dz
        )
        return dh_TF if with_dh else None, dz_TF if with_dz else None, None, None, None, None


def _raise_unless_finite(logits_TF: Tensor) -> None:
    # On a GPU looking would stall the stream: there the kernel asserts.
    if logits_TF.device.type == "cpu" and not logits_TF.isfinite().all():
        raise RoutingError(
            f"{int((~logits_TF.isfinite()).sum())} of {logits_TF.numel()} router logits are not finite, so no channels "
            "can be chosen; the FFN input or the predictor weights hold NaN or infinity"
        )
