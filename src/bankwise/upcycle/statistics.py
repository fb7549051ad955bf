"""Calibration statistics of one layer, accumulated in float64 (`method.md` section 3.1).

float32 accumulation left the covariance not positive definite there, so nothing here is float32 but the activations.

Shapes: T tokens, D hidden, F channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from bankwise.ffn import SparseSwiGLU, channel_energy

_CHUNK = 4096


@dataclass
class LayerStatistics:
    """Moments of the FFN input x and of the channels; everything float64."""

    mean_D: Tensor
    covariance_DD: Tensor
    gate_square_F: Tensor
    """E[silu(gate)^2]"""
    up_square_F: Tensor
    """E[up^2]"""
    energy_F: Tensor
    """E[e], e the contribution energy"""
    energy_covariance_DF: Tensor | None = None
    """Cov(x, e); only where it was asked for, it costs more than all the others together"""

    @classmethod
    @torch.no_grad()
    def collect(cls, layer: SparseSwiGLU, x_TD: Tensor, *, with_energy_covariance: bool) -> "LayerStatistics":
        """Statistics of a layer over FFN inputs x."""
        count = x_TD.shape[0]
        mean_D = x_TD.double().mean(dim=0)
        width, channels = x_TD.shape[1], layer.gate_proj.out_features
        covariance_DD = mean_D.new_zeros(width, width)
        energy_covariance_DF = mean_D.new_zeros(width, channels) if with_energy_covariance else None
        gate_F, up_F, energy_F = (mean_D.new_zeros(channels) for _ in range(3))
        for part_TD in x_TD.split(_CHUNK):
            centered_TD = part_TD.double() - mean_D
            gate_TF, up_TF, energy_TF = channel_values(layer, part_TD)
            covariance_DD += centered_TD.T @ centered_TD
            gate_F += gate_TF.double().square().sum(dim=0)
            up_F += up_TF.double().square().sum(dim=0)
            energy_F += energy_TF.double().sum(dim=0)
            if energy_covariance_DF is not None:
                energy_covariance_DF += centered_TD.T @ energy_TF.double()
        if energy_covariance_DF is not None:
            energy_covariance_DF /= count
        return cls(mean_D, covariance_DD / count, gate_F / count, up_F / count, energy_F / count, energy_covariance_DF)

    @classmethod
    def from_norm(cls, layer: SparseSwiGLU, norm_D: Tensor) -> "LayerStatistics":
        """Data-free guess: x uncorrelated, with the scale that the RMSNorm before the layer gives it."""
        variance_D = norm_D.detach().double().square()
        gate_F, up_F = (
            (projection.weight.detach().double().square() @ variance_D)
            for projection in (layer.gate_proj, layer.up_proj)
        )
        down_F = layer.down_proj.weight.detach().double().norm(dim=0)
        energy_F = (gate_F * up_F).sqrt() * down_F
        # A SiLU passes the positive half of a centred gate, hence half of its square.
        return cls(torch.zeros_like(variance_D), torch.diag(variance_D), gate_F / 2, up_F, energy_F)


@torch.no_grad()
def channel_values(layer: SparseSwiGLU, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) [T, F], up [T, F] and contribution energy [T, F] (float32), in the autocast dtype of the caller."""
    gate_TF = functional.silu(layer.gate_proj(x_TD))
    up_TF = layer.up_proj(x_TD)
    return gate_TF, up_TF, channel_energy(gate_TF * up_TF, layer.down_proj.weight)
