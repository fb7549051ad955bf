"""Fitting one layer: channel order, closed-form predictor, gradient refinement, and how good the result is.

Shapes: T tokens, D hidden, F channels.
"""

import torch
from torch import Tensor, nn

from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask, channel_recall, retained_energy
from bankwise.precision import bf16_autocast
from bankwise.upcycle.initialise import initialise_predictor, standardise_logits
from bankwise.upcycle.permutation import bank_order, permute_channels
from bankwise.upcycle.refine import refine_predictor
from bankwise.upcycle.statistics import LayerStatistics, channel_values

_MEASURED_TOKENS = 4096


def start_from_weights(
    layer: SparseSwiGLU, norm_D: Tensor, sparsity: SparsityConfig, settings: CalibrationConfig
) -> None:
    """Order and predictor of a layer without data; `norm_D` is the weight of the RMSNorm before it."""
    # Co-activation needs activations; the deal by mean energy is its start anyway.
    layout = "snake" if sparsity.bank_layout == "coact" else sparsity.bank_layout
    energy_F = LayerStatistics.from_norm(layer, norm_D).energy_F
    order_F = bank_order(energy_F[None], bank_size=layer.bank_size, layout=layout, seed=settings.seed)
    permute_channels(layer, order_F)
    layer.predictor.bank_layout.copy_(order_F)
    init = "svd_act" if settings.init in ("auto", "ridge") else settings.init  # ridge regresses on data
    initialise_predictor(layer, LayerStatistics.from_norm(layer, norm_D), init=init, ridge=settings.ridge)
    standardise_logits(layer, torch.randn(1024, norm_D.numel()).to(norm_D) * norm_D)


def fit_layer(
    layer: SparseSwiGLU,
    fit_TD: Tensor,
    check_TD: Tensor,
    sparsity: SparsityConfig,
    settings: CalibrationConfig,
    index: int,
) -> dict[str, float]:
    """Fit one layer on FFN inputs `fit_TD`; return its figures on `check_TD`, before and after."""
    # No weight cache: the permutation changes weights inside this block.
    with bf16_autocast(fit_TD.device, cache_enabled=False):
        measured: dict[str, float] = {"retained_global": _retained_global(layer, check_TD)}
        measured["retained_oracle_before"] = _measure(layer, check_TD, None)["retained_oracle"]
        if sparsity.bank_layout != "none":
            sample_TF = channel_values(layer, fit_TD[-_MEASURED_TOKENS:])[2]
            order_F = bank_order(
                sample_TF, bank_size=layer.bank_size, layout=sparsity.bank_layout, seed=settings.seed + index
            ).to(fit_TD.device)
            permute_channels(layer, order_F)
            if _measure(layer, check_TD, None)["retained_oracle"] < measured["retained_oracle_before"]:
                permute_channels(layer, order_F.argsort())
                order_F = torch.arange(order_F.numel(), device=fit_TD.device)
            layer.predictor.bank_layout.copy_(order_F)
        init = settings.init
        if init == "auto":
            init = "ridge" if sparsity.predictor_form == "linear" else "svd_act"
        statistics = LayerStatistics.collect(layer, fit_TD, with_energy_covariance=init == "ridge")
        initialise_predictor(layer, statistics, init=init, ridge=settings.ridge)
        standardise_logits(layer, fit_TD[:_MEASURED_TOKENS])
        start = _measure(layer, check_TD, layer.predictor)
        measured |= {"recall_start": start["recall"], "retained_start": start["retained"]}
        if settings.refine_epochs:
            refine_predictor(
                layer, fit_TD, epochs=settings.refine_epochs, lr=settings.refine_lr, seed=settings.seed + index
            )
            standardise_logits(layer, fit_TD[:_MEASURED_TOKENS])
        if sparsity.center != "off":
            layer.center.copy_(dropped_mean(layer, fit_TD))
        return measured | _measure(layer, check_TD, layer.predictor)


def _measure(layer: SparseSwiGLU, x_TD: Tensor, predictor: nn.Module | None) -> dict[str, float]:
    """Retained energy of the bank oracle and, for a predictor, its recall and retained energy (`method.md` 4.3)."""
    cut = {"bank_size": layer.bank_size, "active_per_bank": layer.active_per_bank}
    energy_TF = channel_values(layer, x_TD)[2]
    oracle_TF = bank_topk_mask(energy_TF, **cut)
    result = {"retained_oracle": retained_energy(energy_TF, oracle_TF).item()}
    if predictor is not None:
        mask_TF = bank_topk_mask(predictor(x_TD), **cut)
        result["recall"] = channel_recall(mask_TF, oracle_TF).item()
        result["retained"] = retained_energy(energy_TF, mask_TF).item()
        # What a choice that ignores the token and the channel would keep.
        result["retained_random"] = layer.active_per_bank / layer.bank_size
    return result


def _retained_global(layer: SparseSwiGLU, x_TD: Tensor) -> float:
    square_TF = channel_values(layer, x_TD)[2].square()
    kept = square_TF.shape[-1] * layer.active_per_bank // layer.bank_size
    return (square_TF.topk(kept, dim=-1).values.sum(dim=-1) / square_TF.sum(dim=-1).clamp_min(1e-30)).mean().item()


def dropped_mean(layer: SparseSwiGLU, x_TD: Tensor) -> Tensor:
    """c_F = E[h | not selected], the least-squares value of a dropped channel (`method.md` section 2.5)."""
    total_F = torch.zeros(layer.gate_proj.out_features, dtype=torch.float64, device=x_TD.device)
    count_F = torch.zeros_like(total_F)
    for part_TD in x_TD.split(_MEASURED_TOKENS):
        dropped_TF = ~layer.active_mask(part_TD)
        total_F += (layer.dense_activation(part_TD).double() * dropped_TF).sum(dim=0)
        count_F += dropped_TF.sum(dim=0)
    return total_F / count_F.clamp_min(1)
