"""Decoding of a few tokens on a GPU: five kernels that read only the weights of active channels.

    reduce    code = U x                                      one program for a few rows of U
    select    logits = V code + b, then the active channels   one program for each bank; logits stay in registers
    activate  h = silu(gate x) * up x of the active channels  one program for a few channels
    gather    parts of y, each over a share of the channels   one program for a block of columns and a share
    finish    y = sum of the parts + bias, in order           no atomics: equal inputs give equal bits

Every shape follows from those of the inputs and nothing waits for the GPU, so a CUDA graph can record it. Products and
sums are float32 whatever the weights are. Each token is worked on alone, and how the work is split does not depend on
the number of tokens: a token's output is the same bits alone and among others. Logits that are not finite stop the
stream with a device assertion; in Triton's interpreter they raise `RoutingError`.

Shapes: T tokens (at most 8), D hidden, F channels, N banks of B channels, K active per bank, A = N K active channels,
        R predictor rank, P a row of D padded (the packed layout of `bankwise.kernels.cpu.packing`), S shares.
"""

from typing import NamedTuple, Self

import torch
import triton
from torch import Tensor

from bankwise import ffn
from bankwise.errors import KernelError, RoutingError
from bankwise.kernels.triton.decode_kernels import (
    activate_kernel,
    finish_kernel,
    gather_kernel,
    reduce_kernel,
    select_kernel,
)
from bankwise.kernels.triton.support import MAX_TOKENS, check_banks, launch_on

MAX_SHARES = 64


class Predictor(NamedTuple):
    """Tensors of a predictor; the last four only in the form `gated_product`."""

    reduce_RD: Tensor
    expand_FR: Tensor
    bias_F: Tensor
    gate_offset_F: Tensor | None = None
    up_offset_F: Tensor | None = None
    gate_log_noise_F: Tensor | None = None
    up_log_noise_F: Tensor | None = None

    @classmethod
    def of(cls, module: ffn.Predictor) -> Self:
        """The tensors of this module."""
        own = (getattr(module, name, None) for name in ("gate_offset", "up_offset", "gate_log_noise", "up_log_noise"))
        return cls(module.reduce.weight, module.expand.weight, module.expand.bias, *own)


def select_channels(
    x_TD: Tensor, predictor: Predictor, bank_size: int, active: int, *, keep_logits: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """active_TA (int32 channels, bank after bank), bad_TN (int32: logits that are not finite), logits_TF if kept."""
    (tokens, hidden), (rank, ffn_size) = x_TD.shape, predictor.expand_FR.T.shape
    banks = ffn_size // bank_size
    code_TR = x_TD.new_empty(tokens, rank, dtype=torch.float32)
    active_TA = x_TD.new_empty(tokens, banks * active, dtype=torch.int32)
    bad_TN = x_TD.new_empty(tokens, banks, dtype=torch.int32)
    logits_TF = x_TD.new_empty(tokens, ffn_size, dtype=torch.float32) if keep_logits else None
    if tokens == 0:
        return active_TA, bad_TN, logits_TF
    block_D = _block(hidden, 1024)
    block_R = 4096 // block_D
    reduce_kernel[(tokens, triton.cdiv(rank, block_R))](
        x_TD, predictor.reduce_RD, code_TR, hidden, rank, x_TD.stride(0), predictor.reduce_RD.stride(0),
        BLOCK_R=block_R, BLOCK_D=block_D, enable_fp_fusion=True,
    )  # fmt: skip
    is_gated = predictor.gate_offset_F is not None
    half = rank // 2 if is_gated else rank
    select_kernel[(tokens, banks)](
        code_TR, *predictor[1:], active_TA, bad_TN, logits_TF, rank, banks, predictor.expand_FR.stride(0),
        B=bank_size, K=active, BLOCK_B=triton.next_power_of_2(bank_size), BLOCK_R=_block(half, 64),
        GATED=is_gated, KEEP_LOGITS=keep_logits, enable_fp_fusion=True,
    )  # fmt: skip
    return active_TA, bad_TN, logits_TF


def run_channels(
    x_TD: Tensor,
    packed_F3P: Tensor,
    active_TA: Tensor,
    bad_TN: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    down_bias_D: Tensor | None,
) -> Tensor:
    """y_TD from the weights of the active channels alone."""
    (tokens, hidden), num_active, banks = x_TD.shape, active_TA.shape[1], bad_TN.shape[1]
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    if tokens == 0:
        return y_TD
    row = packed_F3P.stride(1)
    h_TA = x_TD.new_empty(tokens, num_active, dtype=torch.float32)
    block_D = _block(hidden, 1024)
    block_A = 4096 // block_D
    activate_kernel[(tokens, triton.cdiv(num_active, block_A))](
        x_TD, packed_F3P, active_TA, gate_bias_F, up_bias_F, h_TA, num_active, hidden, x_TD.stride(0), row,
        BLOCK_A=block_A, BLOCK_D=block_D, GATE_BIAS=gate_bias_F is not None, UP_BIAS=up_bias_F is not None,
        enable_fp_fusion=True,
    )  # fmt: skip
    block_D = _block(hidden, 256)
    num_blocks = triton.cdiv(hidden, block_D)
    shares, per_share = split_channels(num_active, num_blocks)
    parts_TSD = x_TD.new_empty(tokens, shares, hidden, dtype=torch.float32)
    gather_kernel[(tokens, num_blocks, shares)](
        h_TA, packed_F3P, active_TA, parts_TSD, num_active, hidden, row, per_share, shares,
        BLOCK_A=16, BLOCK_D=block_D, enable_fp_fusion=True,
    )  # fmt: skip
    block_D = _block(hidden, 64)
    finish_kernel[(tokens, triton.cdiv(hidden, block_D))](
        parts_TSD, bad_TN, down_bias_D, y_TD, hidden, banks, shares,
        BLOCK_N=triton.next_power_of_2(banks), BLOCK_S=triton.next_power_of_2(shares), BLOCK_D=block_D,
        BIAS=down_bias_D is not None, debug=True, sanitize_overflow=False, enable_fp_fusion=True,
    )  # fmt: skip
    return y_TD


def split_channels(num_active: int, num_blocks: int) -> tuple[int, int]:
    """Number of shares and channels of each, for about 512 programs: some for every multiprocessor of a large GPU."""
    shares = min(MAX_SHARES, max(1, 512 // num_blocks))
    per_share = triton.cdiv(triton.cdiv(num_active, shares), 16) * 16
    return triton.cdiv(num_active, per_share), per_share


@torch.library.custom_op("bankwise::ffn_decode_gpu", mutates_args=())
def ffn_decode_gpu(
    x: Tensor, packed_F3P: Tensor, scales_F3: Tensor | None, reduce_RD: Tensor, expand_FR: Tensor, bias_F: Tensor,
    gate_offset_F: Tensor | None, up_offset_F: Tensor | None,
    gate_log_noise_F: Tensor | None, up_log_noise_F: Tensor | None,
    gate_bias_F: Tensor | None, up_bias_F: Tensor | None, down_bias_D: Tensor | None,
    bank_size: int, active: int,
) -> Tensor:  # fmt: skip
    """y [..., D] of a sparse feed-forward layer, from its packed weights and its predictor.

    The arguments are those of the CPU operator; int8 weights, which have scales, are refused.
    """
    if scales_F3 is not None:
        raise KernelError("the GPU kernels take no int8 weights; decode on the CPU, or with weights='as_is'")
    x_TD = x.reshape(-1, x.shape[-1]).contiguous()
    if x_TD.shape[0] > MAX_TOKENS:
        raise KernelError(f"{x_TD.shape[0]} tokens at once; the decode kernels take at most {MAX_TOKENS}")
    check_banks(bias_F.shape[0], bank_size, active)
    if packed_F3P.shape[0] != bias_F.shape[0] or not x.shape[-1] == reduce_RD.shape[1] <= packed_F3P.shape[2]:
        raise KernelError(
            f"x ends in {x.shape[-1]} columns, for a predictor of {reduce_RD.shape[1]} columns and {bias_F.shape[0]} "
            f"channels and weights packed as {list(packed_F3P.shape)}; they must belong to one layer"
        )
    predictor = Predictor(reduce_RD, expand_FR, bias_F, gate_offset_F, up_offset_F, gate_log_noise_F, up_log_noise_F)
    with launch_on(x.device):
        active_TA, bad_TN, _ = select_channels(x_TD, predictor, bank_size, active)
        if x.device.type == "cpu":
            _raise_unless_finite(bad_TN, x_TD.shape[0] * bias_F.shape[0])
        y_TD = run_channels(x_TD, packed_F3P, active_TA, bad_TN, gate_bias_F, up_bias_F, down_bias_D)
    return y_TD.view(x.shape)


@ffn_decode_gpu.register_fake
def _fake_ffn_decode_gpu(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _raise_unless_finite(bad_TN: Tensor, num_logits: int) -> None:
    # In the interpreter alone: on a GPU looking would stall the stream, and there the last kernel asserts.
    if bad := int(bad_TN.sum()):
        raise RoutingError(
            f"{bad} of {num_logits} router logits are not finite, so no channels can be chosen; the FFN input or the "
            "predictor weights hold NaN or infinity"
        )


def _block(size: int, largest: int) -> int:
    """The power of two that covers `size`, within 16 and `largest`."""
    return max(16, min(largest, triton.next_power_of_2(size)))
