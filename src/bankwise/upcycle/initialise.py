"""Closed-form starts of the predictor (`method.md` section 3.3). Linear algebra in float64.

Shapes: D hidden, F channels, R rank.
"""

import torch
from torch import Tensor

from bankwise.ffn import SparseSwiGLU
from bankwise.upcycle.statistics import LayerStatistics


def low_rank_of_weight(
    weight_FD: Tensor, covariance_DD: Tensor, importance_F: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """(V [F, R], U [R, D]): the rank-R matrix nearest to `weight` as the input sees it.

    Minimises sum_i importance_i^2 E[((W - V U) x)_i^2] for inputs of this covariance: the truncated SVD of
    diag(importance) W L with covariance = L L^T.
    """
    factor_DD = torch.linalg.cholesky(covariance_DD)
    scaled_FD = (importance_F[:, None] * weight_FD) @ factor_DD
    # Right singular vectors from the D x D Gram matrix: the F x D decomposition costs six times as much.
    vectors_DR = torch.linalg.eigh(scaled_FD.T @ scaled_FD).eigenvectors.flip(-1)[:, :rank]
    expand_FR = (scaled_FD @ vectors_DR) / importance_F[:, None]
    reduce_RD = torch.linalg.solve_triangular(factor_DD.T, vectors_DR, upper=True).T
    return expand_FR, reduce_RD


def reduced_rank_ridge(covariance_DD: Tensor, cross_DF: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(V [F, R], U [R, D]): the rank-R linear map with the least squared error, for Cov(x) and Cov(x, target)."""
    factor_DD = torch.linalg.cholesky(covariance_DD)
    whitened_DF = torch.linalg.solve_triangular(factor_DD, cross_DF, upper=False)
    vectors_DR = torch.linalg.eigh(whitened_DF @ whitened_DF.T).eigenvectors.flip(-1)[:, :rank]
    reduce_RD = torch.linalg.solve_triangular(factor_DD.T, vectors_DR, upper=True).T
    return (vectors_DR.T @ whitened_DF).T.contiguous(), reduce_RD


@torch.no_grad()
def initialise_predictor(layer: SparseSwiGLU, statistics: LayerStatistics, *, init: str, ridge: float) -> None:
    """Write the start values of one layer's predictor; `init` as in `CalibrationConfig.init`, but not `auto`."""
    form = layer.predictor.form
    width = statistics.mean_D.numel()
    covariance_DD = statistics.covariance_DD
    damped_DD = covariance_DD + ridge * covariance_DD.diagonal().mean() * torch.eye(width).to(covariance_DD)
    if init == "svd_gate":
        damped_DD = torch.eye(width).to(covariance_DD)
    if form == "linear":
        _initialise_linear(layer, statistics, damped_DD, init)
    else:
        _initialise_product(layer, statistics, damped_DD, init)


def _initialise_linear(layer: SparseSwiGLU, statistics: LayerStatistics, damped_DD: Tensor, init: str) -> None:
    predictor, rank = layer.predictor, layer.predictor.reduce.out_features
    gate_FD = layer.gate_proj.weight.double()
    if init == "ridge":
        assert statistics.energy_covariance_DF is not None
        expand_FR, reduce_RD = reduced_rank_ridge(damped_DD, statistics.energy_covariance_DF, rank)
        bias_F = statistics.energy_F - expand_FR @ (reduce_RD @ statistics.mean_D)
    elif init == "zero":
        # The matrices keep their random start so that both can learn; V = 0 makes the logits the mean energies.
        expand_FR, reduce_RD = torch.zeros_like(predictor.expand.weight), predictor.reduce.weight
        bias_F = statistics.energy_F
    else:
        importance_F = torch.ones_like(gate_FD[:, 0])
        expand_FR, reduce_RD = low_rank_of_weight(gate_FD, damped_DD, importance_F, rank)
        bias_F = gate_FD @ statistics.mean_D - expand_FR @ (reduce_RD @ statistics.mean_D)
        if layer.gate_proj.bias is not None:
            bias_F = bias_F + layer.gate_proj.bias.double()
    _copy_padded(predictor.expand.weight, expand_FR, dim=1)
    _copy_padded(predictor.reduce.weight, reduce_RD, dim=0)
    predictor.expand.bias.copy_(bias_F)


def _initialise_product(layer: SparseSwiGLU, statistics: LayerStatistics, damped_DD: Tensor, init: str) -> None:
    predictor, half = layer.predictor, layer.predictor.reduce.out_features // 2
    down_F = layer.down_proj.weight.double().norm(dim=0)
    for first, projection, other_square_F, offset_F, log_noise_F in (
        (0, layer.gate_proj, statistics.up_square_F, predictor.gate_offset, predictor.gate_log_noise),
        (half, layer.up_proj, statistics.gate_square_F, predictor.up_offset, predictor.up_log_noise),
    ):
        weight_FD = projection.weight.double()
        # A channel's rebuilding error matters as much as what it is multiplied by.
        importance_F = (other_square_F.sqrt() * down_F).clamp_min(1e-12)
        if init == "zero":
            expand_FR, reduce_RD = torch.zeros_like(predictor.expand.weight[:, :half]).double(), None
        else:
            expand_FR, reduce_RD = low_rank_of_weight(weight_FD, damped_DD, importance_F, half)
            _copy_padded(predictor.reduce.weight[first : first + half], reduce_RD, dim=0)
        _copy_padded(predictor.expand.weight[:, first : first + half], expand_FR, dim=1)
        rebuilt_FD = torch.zeros_like(weight_FD) if reduce_RD is None else expand_FR @ reduce_RD
        missed_FD = weight_FD - rebuilt_FD
        offset_F.copy_(missed_FD @ statistics.mean_D + (0 if projection.bias is None else projection.bias.double()))
        variance_F = ((missed_FD @ statistics.covariance_DD) * missed_FD).sum(dim=-1)
        # At full rank nothing is missed; the floor keeps the logarithm finite.
        log_noise_F.copy_(variance_F.clamp_min(1e-8).log())
    predictor.expand.bias.copy_(2 * down_F.clamp_min(1e-12).log())


@torch.no_grad()
def standardise_logits(layer: SparseSwiGLU, x_TD: Tensor) -> None:
    """Shift the logits so that the banks are cut at 0 on average, and scale linear ones to a within-bank std of 1.

    Neither changes which channels are kept; it puts every gate mode into its working range.
    """
    predictor = layer.predictor
    logits_TNB = predictor(x_TD).unflatten(-1, (-1, layer.bank_size))
    if predictor.form == "linear":
        scale = 1 / logits_TNB.std(dim=-1, correction=0).mean().clamp_min(1e-12)
        predictor.expand.weight.mul_(scale)
        predictor.expand.bias.mul_(scale)
        logits_TNB = logits_TNB * scale
    cut_TN = logits_TNB.topk(layer.active_per_bank, dim=-1).values[..., -1]
    predictor.expand.bias.sub_(cut_TN.mean())


def _copy_padded(target: Tensor, values: Tensor, dim: int) -> None:
    # A rank above the hidden size has no more directions to offer: the rest keeps a zero effect.
    if values.shape[dim] < target.shape[dim]:
        target.zero_()
    target.narrow(dim, 0, values.shape[dim]).copy_(values)
