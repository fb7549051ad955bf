"""Closed forms of the predictor's start, against independent formulas in float64."""

import pytest
import torch
from torch.nn import functional

from bankwise.config import SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask, routing_loss
from bankwise.upcycle.initialise import initialise_predictor, low_rank_of_weight, reduced_rank_ridge, standardise_logits
from bankwise.upcycle.refine import refine_predictor
from bankwise.upcycle.statistics import LayerStatistics, channel_values

D, F, T = 12, 32, 400


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed=0):
    factor = draw(D, D, seed=seed)
    return factor @ factor.T + 0.1 * torch.eye(D, dtype=torch.float64)


def make_layer(form, rank=8, seed=0, bias=False):
    torch.manual_seed(seed)
    sparsity = SparsityConfig(bank_size=8, active_per_bank=2, predictor_rank=rank, predictor_form=form)
    layer = SparseSwiGLU(D, F, sparsity, 0, bias=bias)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(draw(*value.shape, seed=value.numel() + seed) * 0.5)
        for name, value in layer.predictor.start_values().items():
            getattr(layer.predictor, name).fill_(value)
    return layer


def inputs(seed=7):
    return (draw(T, D, seed=seed) @ torch.linalg.cholesky(covariance()).T + 0.3).float()


def recall(layer, x):
    cut = {"bank_size": layer.bank_size, "active_per_bank": layer.active_per_bank}
    oracle = bank_topk_mask(channel_values(layer, x)[2], **cut)
    return ((layer.active_mask(x) & oracle).sum() / oracle.sum()).item()


def start(layer, x, init, ridge=1e-2):
    statistics = LayerStatistics.collect(layer, x, with_energy_covariance=init == "ridge")
    initialise_predictor(layer, statistics, init=init, ridge=ridge)
    return statistics


def test_full_rank_ridge_is_the_closed_form_solution():
    cross = draw(D, F, seed=1)
    expand, reduce = reduced_rank_ridge(covariance(), cross, D)
    torch.testing.assert_close(expand @ reduce, torch.linalg.solve(covariance(), cross).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_ridge_of_low_rank_is_the_truncated_optimum(rank):
    matrix, cross = covariance(), draw(D, F, seed=1)
    # method.md section 3.3: P S Q^T = SVD(L^-1 G); V = Q_r S_r; U = (L^-T P_r)^T
    lower = torch.linalg.cholesky(matrix)
    p, s, qt = torch.linalg.svd(torch.linalg.inv(lower) @ cross, full_matrices=False)
    expected = (qt[:rank].T * s[:rank]) @ (torch.linalg.inv(lower).T @ p[:, :rank]).T
    expand, reduce = reduced_rank_ridge(matrix, cross, rank)
    assert expand.shape == (F, rank)
    assert reduce.shape == (rank, D)
    torch.testing.assert_close(expand @ reduce, expected, rtol=1e-8, atol=1e-8)

    def objective(product):
        return torch.trace(product @ matrix @ product.T) - 2 * torch.trace(product @ cross)

    best = objective(expand @ reduce)
    for seed in range(5):
        moved = (expand + 1e-3 * draw(F, rank, seed=seed)) @ (reduce + 1e-3 * draw(rank, D, seed=seed + 9))
        assert objective(moved) > best


@pytest.mark.parametrize("rank", [1, 5, D])
def test_low_rank_of_weight_is_the_whitened_truncated_svd(rank):
    weight, importance = draw(F, D, seed=2), draw(F, seed=3).abs() + 0.1
    # The symmetric root whitens as well as the Cholesky factor that the code takes.
    values, vectors = torch.linalg.eigh(covariance())
    root = vectors @ values.sqrt().diag() @ vectors.T
    u, s, vt = torch.linalg.svd(importance[:, None] * weight @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root) / importance[:, None]
    expand, reduce = low_rank_of_weight(weight, covariance(), importance, rank)
    torch.testing.assert_close(expand @ reduce, expected, rtol=1e-8, atol=1e-8)
    if rank == D:
        torch.testing.assert_close(expand @ reduce, weight, rtol=1e-8, atol=1e-8)


def test_statistics_are_the_moments_of_the_data():
    layer, x = make_layer("linear"), inputs()
    statistics = LayerStatistics.collect(layer, x, with_energy_covariance=True)
    wide = layer.double()
    gate, up = functional.silu(wide.gate_proj(x.double())), wide.up_proj(x.double())
    energy = (gate * up).abs() * wide.down_proj.weight.norm(dim=0)
    joint = torch.cov(torch.cat([x.double(), energy], dim=1).T, correction=0)
    expected = {
        "mean_D": x.double().mean(0),
        "covariance_DD": joint[:D, :D],
        "energy_covariance_DF": joint[:D, D:],
        "gate_square_F": gate.square().mean(0),
        "up_square_F": up.square().mean(0),
        "energy_F": energy.mean(0),
    }
    for name, value in expected.items():
        assert getattr(statistics, name).dtype == torch.float64
        torch.testing.assert_close(getattr(statistics, name), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("rank", [3, D])
def test_ridge_start_predicts_the_energy(rank):
    layer, x = make_layer("linear", rank), inputs()
    start(layer, x, "ridge", ridge=1e-9)
    energy = channel_values(layer, x)[2].double()
    centred, target = x.double() - x.double().mean(0), energy - energy.mean(0)
    fitted = layer.logits(x).double().detach()
    torch.testing.assert_close(fitted.mean(0), energy.mean(0), rtol=1e-4, atol=1e-4)
    if rank == D:
        best = energy.mean(0) + centred @ torch.linalg.lstsq(centred, target).solution
        torch.testing.assert_close(fitted, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", ["svd_act", "svd_gate"])
@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_gate_start_predicts_the_gate(bias, init):
    layer, x = make_layer("linear", D, bias=bias), inputs()
    start(layer, x, init)
    torch.testing.assert_close(layer.logits(x), layer.gate_proj(x), rtol=1e-3, atol=1e-3)


def test_truncated_gate_start_is_the_nearest_to_the_gate_on_the_data():
    x, errors = inputs(), {}
    for init in ("svd_act", "svd_gate"):
        layer = make_layer("linear", 4)
        start(layer, x, init, ridge=1e-9)
        errors[init] = (layer.logits(x) - layer.gate_proj(x)).square().mean().item()
    assert errors["svd_act"] < 0.9 * errors["svd_gate"]


@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_product_start_finds_the_oracles_channels(bias):
    layer, x = make_layer("gated_product", 2 * D, bias=bias), inputs()
    start(layer, x, "svd_act")
    energy = channel_values(layer, x)[2]
    large = energy > 0.1
    torch.testing.assert_close(layer.logits(x)[large], 2 * energy[large].log(), rtol=1e-2, atol=1e-2)
    assert recall(layer, x) > 0.99


def test_product_start_carries_the_variance_that_its_rank_misses():
    layer, x = make_layer("gated_product", 8), inputs()
    start(layer, x, "svd_act", ridge=1e-9)
    predictor = layer.predictor
    code = functional.linear(x, predictor.reduce.weight[:4])
    missed = layer.gate_proj(x) - functional.linear(code, predictor.expand.weight[:, :4], predictor.gate_offset)
    assert missed.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(missed.var(0, correction=0), predictor.gate_log_noise.exp(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_zero_start_ranks_channels_the_same_for_every_token(form):
    layer, x = make_layer(form), inputs()
    start(layer, x, "zero")
    logits = layer.logits(x)
    assert torch.equal(logits, logits[:1].expand_as(logits))
    if form == "linear":
        torch.testing.assert_close(logits[0], channel_values(layer, x)[2].mean(0), rtol=1e-5, atol=1e-5)
    assert layer.predictor.reduce.weight.abs().max() > 0  # or neither matrix could ever learn


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_rank_above_the_hidden_size_equals_full_rank(form):
    x = inputs()
    exact, padded = make_layer(form, 2 * D), make_layer(form, 4 * D)
    for layer in (exact, padded):
        start(layer, x, "svd_act")
    torch.testing.assert_close(padded.logits(x), exact.logits(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("form", "init"), [("linear", "ridge"), ("linear", "zero"), ("gated_product", "svd_act")])
def test_standardising_moves_the_cut_to_zero_and_no_channel(form, init):
    layer, x = make_layer(form), inputs()
    start(layer, x, init)
    mask = layer.active_mask(x)
    standardise_logits(layer, x)
    assert torch.equal(layer.active_mask(x), mask)
    banks = layer.logits(x).unflatten(-1, (-1, 8))
    assert banks.topk(2).values[..., -1].mean().abs() < 1e-4
    if form == "linear":
        assert abs(banks.std(-1, correction=0).mean() - 1) < 1e-4


@pytest.mark.parametrize(("form", "init"), [("linear", "ridge"), ("linear", "zero"), ("gated_product", "svd_act")])
def test_refinement_lowers_the_routing_loss_on_new_inputs(form, init):
    layer, x = make_layer(form), inputs()
    start(layer, x, init)
    standardise_logits(layer, x)
    new = inputs(seed=8)
    trunk = {name: value.clone() for name, value in layer.state_dict().items() if ".proj" in name}

    @torch.no_grad()
    def loss():
        return routing_loss(layer.logits(new), channel_values(layer, new)[2], bank_size=8, active_per_bank=2).item()

    before = loss()
    refine_predictor(layer, x, epochs=40, lr=1e-2, seed=0)
    assert loss() < 0.95 * before
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in trunk.items())
    assert all(value.grad is None for value in layer.parameters())
