"""The router of a training step in fused CPU operators: the product form's logits, and the default gate.

Both are defined in plain PyTorch (`bankwise.ffn.predictor`, `bankwise.ffn.gates`), where each step of the formula is a
pass over [T, F] in memory; here each direction is one pass. Sums over tokens are added in an order that does not depend
on the number of threads. Saved for the gate's backward, beside its inputs: 1 bit per channel of mask, threshold and
width of each bank (F/8 + F/8 bytes per token for banks of 64, where the reference saves F + F/16).

Shapes: T tokens, D hidden, F channels, R rank, N banks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ProductLogits(torch.autograd.Function):
    """Logits [T, F] of the product form from the code [T, R], its matrix [F, R] and its five vectors [F], float32.

    The offsets and the bias are added inside the operator: `addmm` would write them to [T, F] first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        code_TR: Tensor,
        expand_FR: Tensor,
        gate_offset_F: Tensor,
        up_offset_F: Tensor,
        gate_log_noise_F: Tensor,
        up_log_noise_F: Tensor,
        bias_F: Tensor,
    ) -> Tensor:
        half = code_TR.shape[-1] // 2
        gate_TF = code_TR[:, :half] @ expand_FR[:, :half].T
        up_TF = code_TR[:, half:] @ expand_FR[:, half:].T
        vectors = gate_offset_F, up_offset_F, gate_log_noise_F, up_log_noise_F
        ctx.save_for_backward(code_TR, expand_FR, gate_TF, up_TF, *vectors)
        ctx.set_materialize_grads(False)
        return torch.ops.bankwise.energy_logits(gate_TF, up_TF, *vectors, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TF: Tensor | None) -> tuple[Tensor | None, ...]:
        code_TR, expand_FR, *rest = ctx.saved_tensors
        if dz_TF is None:
            # Nothing reads the logits (K = B). The reference, whose bias is a node of its own, gives the same zeros.
            return torch.zeros_like(code_TR), torch.zeros_like(expand_FR), *map(torch.zeros_like, rest[2:]), None
        half = code_TR.shape[-1] // 2
        is_rounded = _products_round_to_bf16()
        dgate_TF, dup_TF, *dvectors = torch.ops.bankwise.energy_logits_backward(dz_TF.contiguous(), *rest, is_rounded)
        dcode_TR = dexpand_FR = None
        with_dcode, with_dexpand = ctx.needs_input_grad[:2]
        if with_dcode:
            dcode_TR = torch.empty_like(code_TR)
            rows_FR = expand_FR.to(dgate_TF.dtype)
            dcode_TR[:, :half] = dgate_TF @ rows_FR[:, :half]
            dcode_TR[:, half:] = dup_TF @ rows_FR[:, half:]
        if with_dexpand:
            dexpand_FR = torch.empty_like(expand_FR)
            code_TR = code_TR.to(dgate_TF.dtype)
            dexpand_FR[:, :half] = dgate_TF.T @ code_TR[:, :half]
            dexpand_FR[:, half:] = dup_TF.T @ code_TR[:, half:]
        return dcode_TR, dexpand_FR, *dvectors


def _products_round_to_bf16() -> bool:
    """Whether float32 products round their inputs to bfloat16 now (`ffn.precision`).

    Then the gradients are written in bfloat16, and their products too: the gradients of the dense weights are no finer
    under autocast, and a product of bfloat16 tensors takes half the time of a rounding float32 one.
    """
    return torch.get_float32_matmul_precision() == "medium" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class CpuSteUnitGate(torch.autograd.Function):
    """`SteUnitGate` for K < B with the same arguments and gradients."""

    @staticmethod
    def forward(
        ctx: Any, h_TF: Tensor, logits_TF: Tensor, bank_size: int, active_per_bank: int, alpha: float, tau: float
    ) -> Tensor:
        h_TF, logits_TF = h_TF.contiguous(), logits_TF.contiguous()
        gated_TF, *per_bank = torch.ops.bankwise.unit_gate_cpu(h_TF, logits_TF, bank_size, active_per_bank, tau)
        ctx.settings = bank_size, alpha
        ctx.save_for_backward(h_TF, logits_TF, *per_bank)
        return gated_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        with_dh, with_dz = ctx.needs_input_grad[:2]
        dh_TF, dz_TF = torch.ops.bankwise.unit_gate_cpu_backward(
            dy_TF.contiguous(), *ctx.saved_tensors, *ctx.settings, with_dh, with_dz
        )
        return dh_TF if with_dh else None, dz_TF if with_dz else None, None, None, None, None
