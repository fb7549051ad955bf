"""`SteUnitGate` of `bankwise.ffn.gates` as one kernel each way: selection, mask, threshold and gate in one pass.

The forward saves, beside its inputs, one 64-bit word of mask, the threshold and the width for each bank: F/8 + F/8
bytes per token where the reference saves F + F/16. Logits that are not finite stop a GPU's stream with a device
assertion, as `bankwise.ffn.bank` does there; in Triton's interpreter they raise `RoutingError`.

Shapes: T tokens, F channels, N banks (F / B), B channels per bank, K active per bank, M banks of one program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bankwise.errors import RoutingError
from bankwise.kernels.triton.selection import is_finite, keep_largest, logits_of, order_keys

MAX_BANK = 64
"""Channels of a bank whose mask fits in one word."""

BANKS_PER_PROGRAM = 16


@triton.jit
def gate_forward_kernel(
    h_TF, logits_TF, gated_TF, words_TN, threshold_TN, width_TN, num_rows, tau,
    B: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_B = tl.arange(0, BLOCK_B)
    is_row_M = rows_M < num_rows
    is_real_MB = is_row_M[:, None] & (channels_B[None, :] < B)
    places_MB = rows_M[:, None] * B + channels_B[None, :]
    logits_MB = tl.load(logits_TF + places_MB, mask=is_real_MB, other=0.0)
    tl.device_assert(is_finite(logits_MB), "bankwise: router logits are not finite")
    h_MB = tl.load(h_TF + places_MB, mask=is_real_MB, other=0.0)
    if K == B:
        mask_MB = is_real_MB
    else:
        keys_MB = tl.where(is_real_MB, order_keys(logits_MB), 0)
        mask_MB, kth_M, next_M = keep_largest(keys_MB, K)
        threshold_M = (logits_of(kth_M) + logits_of(next_M)) / 2
        from_cut_MB = tl.where(is_real_MB, logits_MB - threshold_M[:, None], 0.0)
        mean_M = tl.sum(from_cut_MB, axis=1) / B
        moved_MB = tl.where(is_real_MB, from_cut_MB - mean_M[:, None], 0.0)
        variance_M = tl.sum(moved_MB * moved_MB, axis=1) / B
        width_M = tau * tl.sqrt(tl.maximum(variance_M, 1e-12))
        tl.store(threshold_TN + rows_M, threshold_M, mask=is_row_M)
        tl.store(width_TN + rows_M, width_M, mask=is_row_M)
    # Each bit is set once, so that the sum is the word.
    words_M = tl.sum(mask_MB.to(tl.int64) << channels_B[None, :].to(tl.int64), axis=1)
    tl.store(words_TN + rows_M, words_M, mask=is_row_M)
    tl.store(gated_TF + places_MB, tl.where(mask_MB, h_MB, 0.0), mask=is_real_MB)


@triton.jit
def gate_backward_kernel(
    dy_TF, h_TF, logits_TF, words_TN, threshold_TN, width_TN, dh_TF, dz_TF, num_rows, alpha,
    B: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, WITH_DH: tl.constexpr, WITH_DZ: tl.constexpr,
):  # fmt: skip
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_B = tl.arange(0, BLOCK_B)
    is_row_M = rows_M < num_rows
    is_real_MB = is_row_M[:, None] & (channels_B[None, :] < B)
    places_MB = rows_M[:, None] * B + channels_B[None, :]
    dy_MB = tl.load(dy_TF + places_MB, mask=is_real_MB, other=0.0)
    if WITH_DH:
        words_M = tl.load(words_TN + rows_M, mask=is_row_M, other=0)
        mask_MB = ((words_M[:, None] >> channels_B[None, :].to(tl.int64)) & 1) != 0
        tl.store(dh_TF + places_MB, tl.where(mask_MB, dy_MB, 0.0), mask=is_real_MB)
    if WITH_DZ:
        h_MB = tl.load(h_TF + places_MB, mask=is_real_MB, other=0.0).to(tl.float32)
        logits_MB = tl.load(logits_TF + places_MB, mask=is_real_MB, other=0.0)
        threshold_M = tl.load(threshold_TN + rows_M, mask=is_row_M, other=0.0)
        width_M = tl.load(width_TN + rows_M, mask=is_row_M, other=1.0)
        p_MB = tl.sigmoid((logits_MB - threshold_M[:, None]) / width_M[:, None])
        slope_MB = alpha * (1 - p_MB) * p_MB / width_M[:, None]
        tl.store(dz_TF + places_MB, slope_MB * (h_MB * dy_MB.to(tl.float32)), mask=is_real_MB)


@torch.library.custom_op("bankwise::unit_gate", mutates_args=())
def unit_gate(
    h_TF: Tensor, logits_TF: Tensor, bank_size: int, active: int, tau: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gated_TF, and per bank the mask's word, the threshold and the width (the last two undefined for K = B)."""
    _raise_unless_finite(logits_TF)
    gated_TF, words_TN, threshold_TN, width_TN = _fake_unit_gate(h_TF, logits_TF, bank_size, active, tau)
    num_rows = words_TN.numel()
    if num_rows:
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


def unsupported_gate(h_TF: Tensor, logits_TF: Tensor, bank_size: int) -> str | None:
    """Why these kernels cannot run the gate, or None."""
    if h_TF.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the activation is {h_TF.dtype} (supported: float32, bfloat16, float16)"
    if logits_TF.dtype != torch.float32:
        return f"the router logits are {logits_TF.dtype} (supported: float32)"
    if bank_size > MAX_BANK:
        return f"bank_size={bank_size} is above {MAX_BANK}"
    return None


def _raise_unless_finite(logits_TF: Tensor) -> None:
    # On a GPU looking would stall the stream: there the kernel asserts.
    if logits_TF.device.type == "cpu" and not logits_TF.isfinite().all():
        raise RoutingError(
            f"{int((~logits_TF.isfinite()).sum())} of {logits_TF.numel()} router logits are not finite, so no channels "
            "can be chosen; the FFN input or the predictor weights hold NaN or infinity"
        )
