"""Gate modes: what a kept channel is multiplied by, and which gradient the router gets.

`gate_activation` is the definition in plain autograd, for every mode of `method.md` section 2.4. `SteUnitGate` is the
fast path of the default mode `ste_unit`: the same forward and gradients in a third of the passes over memory
(docs/research-log.md, "Cost of a training step").

Shapes: T any leading dimensions (tokens), F FFN channels, N banks, B channels per bank, K active per bank.
"""

from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from bankwise.ffn.bank import BankCut, cut_banks, to_routing_dtype, token_chunks


def gate_activation(
    h_TF: Tensor,
    logits_TF: Tensor,
    *,
    gate_mode: str,
    bank_size: int,
    active_per_bank: int,
    gate_norm: str = "2sigma",
    ste_alpha: float = 1.0,
    ste_tau: float = 1.0,
    h_grad: str = "masked",
    gate_weight_F: Tensor | None = None,
    default_F: Tensor | None = None,
) -> Tensor:
    """Gated activation [T, F] of h (dense SwiGLU activation, less its centre where centring is on).

    `gate_weight_F` is s of `affine` or gamma of `relu_rms`; `default_F` the running mean that `default_ema` puts in
    place of dropped channels in the router's gradient. The output has the dtype of `h_TF`; the gate is float32.
    """
    cut = cut_banks(logits_TF, bank_size=bank_size, active_per_bank=active_per_bank)
    kept_TF = selected_channels(logits_TF, cut, gate_mode, bank_size, active_per_bank)
    gate_TF = _gate_value(
        to_routing_dtype(logits_TF),
        cut,
        gate_mode,
        bank_size,
        active_per_bank,
        gate_norm,
        ste_alpha,
        ste_tau,
        gate_weight_F,
    )
    if gate_mode == "default_ema":
        assert default_F is not None
        # Forward is mask * h; the second factor has value 0, and carries the router's gradient only.
        stand_in_TF = torch.where(kept_TF, h_TF.detach(), default_F.to(h_TF.dtype))
        gated_TF = h_TF * kept_TF + ((gate_TF - gate_TF.detach()) * stand_in_TF).to(h_TF.dtype)
    else:
        gated_TF = (gate_TF * h_TF).to(h_TF.dtype)
    if h_grad == "straight":
        # Adds 0 to the value and (1 - gate) to dh, so that the gradient of h is that of the ungated activation.
        gated_TF = gated_TF + (h_TF - h_TF.detach()) * (1 - gate_TF.detach()).to(h_TF.dtype)
    return gated_TF


def selected_channels(logits_TF: Tensor, cut: BankCut, gate_mode: str, bank_size: int, active_per_bank: int) -> Tensor:
    """bool [T, F]: the channels that are read. `stat_topk` keeps a varying number, every other mode K in each bank."""
    if gate_mode == "stat_topk" and active_per_bank < bank_size:
        logits_TF = to_routing_dtype(logits_TF.detach())
        return logits_TF > _statistical_threshold(logits_TF, bank_size, active_per_bank)
    return cut.mask_TF


def _gate_value(
    logits_TF: Tensor,
    cut: BankCut,
    gate_mode: str,
    bank_size: int,
    active_per_bank: int,
    gate_norm: str,
    ste_alpha: float,
    ste_tau: float,
    gate_weight_F: Tensor | None,
) -> Tensor:
    mask_TF = cut.mask_TF
    if gate_mode in ("hard", "detached"):
        return mask_TF.to(logits_TF.dtype)
    if gate_mode in ("ste_unit", "default_ema"):
        if cut.threshold_TN1 is None:
            return mask_TF.to(logits_TF.dtype)
        p_TF = _boundary_probability(logits_TF, cut.threshold_TN1, bank_size, ste_tau)
        return mask_TF + ste_alpha * (p_TF - p_TF.detach())
    if gate_mode == "sigmoid":
        if gate_norm == "bank_mean_1":
            # sigma / sum(sigma) as a softmax of log sigma: finite where every sigma of a bank underflows.
            log_sigma_TF = functional.logsigmoid(logits_TF).masked_fill(~mask_TF, float("-inf"))
            return active_per_bank * log_sigma_TF.unflatten(-1, (-1, bank_size)).softmax(dim=-1).flatten(-2)
        sigma_TF = mask_TF * torch.sigmoid(logits_TF)
        return 2 * sigma_TF if gate_norm == "2sigma" else sigma_TF
    if gate_mode == "affine":
        assert gate_weight_F is not None
        return mask_TF * (1 + to_routing_dtype(gate_weight_F) * (torch.sigmoid(logits_TF) - 0.5))
    if gate_mode == "relu_rms":
        assert gate_weight_F is not None
        q_TF = mask_TF * torch.relu(logits_TF)
        rho_T1 = (q_TF.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return to_routing_dtype(gate_weight_F) * q_TF / rho_T1
    assert gate_mode == "stat_topk"
    if active_per_bank == bank_size:
        return mask_TF.to(logits_TF.dtype)
    return torch.relu(logits_TF - _statistical_threshold(logits_TF, bank_size, active_per_bank))


def _boundary_probability(logits_TF: Tensor, threshold_TN1: Tensor, bank_size: int, ste_tau: float) -> Tensor:
    logits_TNB = logits_TF.unflatten(-1, (-1, bank_size))
    from_cut_TNB = logits_TNB - threshold_TN1
    return torch.sigmoid(from_cut_TNB / bank_width(from_cut_TNB.detach(), ste_tau)).flatten(-2)


def bank_width(from_cut_TNB: Tensor, ste_tau: float) -> Tensor:
    """tau_b = tau * population standard deviation of each bank, [T, N, 1]; torch.std is 15 times slower on a CPU.

    Takes the logits less their bank's threshold: the difference of squares would lose a spread of 1 around 4096.
    """
    mean_TN1 = from_cut_TNB.mean(dim=-1, keepdim=True)
    square_TN1 = torch.linalg.vector_norm(from_cut_TNB, dim=-1, keepdim=True).square() / from_cut_TNB.shape[-1]
    return ste_tau * (square_TN1 - mean_TN1.square()).clamp_min(1e-12).sqrt()


@torch.compiler.assume_constant_result
def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _statistical_threshold(logits_TF: Tensor, bank_size: int, active_per_bank: int) -> Tensor:
    quantile = _normal_quantile(1 - active_per_bank / bank_size)
    logits_TNB = logits_TF.unflatten(-1, (-1, bank_size))
    mean_TN1 = logits_TNB.mean(dim=-1, keepdim=True)
    # The small constant keeps the gradient of the square root finite in a bank of equal logits.
    std_TN1 = (logits_TNB.var(dim=-1, correction=0, keepdim=True) + 1e-12).sqrt()
    return (mean_TN1 + quantile * std_TN1).expand_as(logits_TNB).flatten(-2)


class SteUnitGate(torch.autograd.Function):
    """gate_activation(..., gate_mode="ste_unit", h_grad="masked") without the intermediate tensors of autograd.

    The mask is kept for the backward pass as one bit a channel (on a CPU, where that costs 1% of the gate).

    forward: h * mask. backward: dh = mask * dy; dz = alpha * p (1 - p) / tau_b * h * dy for all channels.
    """

    @staticmethod
    def forward(
        ctx: Any, h_TF: Tensor, logits_TF: Tensor, bank_size: int, active_per_bank: int, alpha: float, tau: float
    ) -> Tensor:
        shape = h_TF.shape
        h_TF, logits_TF = h_TF.reshape(-1, shape[-1]), logits_TF.reshape(-1, shape[-1])
        gated_TF = torch.empty_like(h_TF)
        masks = []
        is_cut = active_per_bank < bank_size
        threshold_TN1 = to_routing_dtype(logits_TF).new_empty(h_TF.shape[0], shape[-1] // bank_size, int(is_cut))
        for part in token_chunks(h_TF.shape[0], h_TF.device):
            cut = cut_banks(logits_TF[part], bank_size=bank_size, active_per_bank=active_per_bank)
            masks.append(_packed_mask(cut.mask_TF))
            if cut.threshold_TN1 is not None:
                threshold_TN1[part] = cut.threshold_TN1
            torch.mul(h_TF[part], cut.mask_TF.to(h_TF.dtype), out=gated_TF[part])
        ctx.settings = bank_size, is_cut, alpha, tau
        packed = torch.cat(masks) if masks else torch.empty_like(h_TF, dtype=torch.bool)
        ctx.save_for_backward(h_TF, logits_TF, packed, threshold_TN1)
        return gated_TF.view(shape)

    @staticmethod
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        h_TF, logits_TF, packed, threshold_TN1 = ctx.saved_tensors
        bank_size, is_cut, alpha, tau = ctx.settings
        shape = dy_TF.shape
        dy_TF = dy_TF.reshape(h_TF.shape)
        dh_TF = torch.empty_like(h_TF) if ctx.needs_input_grad[0] else None
        dz_TF = torch.empty_like(logits_TF) if ctx.needs_input_grad[1] and is_cut else None
        for part in token_chunks(h_TF.shape[0], h_TF.device):
            if dh_TF is not None:
                dh_TF[part] = dy_TF[part] * _unpacked_mask(packed[part], dy_TF.shape[-1]).to(dy_TF.dtype)
            if dz_TF is not None:
                logits_TNB = to_routing_dtype(logits_TF[part]).unflatten(-1, (-1, bank_size))
                from_cut_TNB = logits_TNB - threshold_TN1[part]
                scale_TN1 = 1 / bank_width(from_cut_TNB, tau)
                p_TNB = from_cut_TNB.mul_(scale_TN1).sigmoid_()
                slope_TF = (1 - p_TNB).mul_(p_TNB).mul_(alpha * scale_TN1).flatten(-2)
                dz_TF[part] = slope_TF.mul_((h_TF[part] * dy_TF[part]).to(slope_TF.dtype))
        return (
            None if dh_TF is None else dh_TF.view(shape),
            None if dz_TF is None else dz_TF.view(shape),
            None,
            None,
            None,
            None,
        )


def _packed_mask(mask_TF: Tensor) -> Tensor:
    """uint8 [T, F / 8, rounded up] with a bit for each channel; off a CPU, or where torch compiles, the mask itself."""
    if mask_TF.device.type != "cpu" or torch.compiler.is_compiling():
        return mask_TF
    return torch.from_numpy(np.packbits(mask_TF.numpy(), axis=-1))


def _unpacked_mask(packed: Tensor, num_channels: int) -> Tensor:
    """The mask [T, F] that `_packed_mask` was given."""
    if packed.dtype == torch.bool:
        return packed
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=num_channels)).view(torch.bool)
