"""Routing statistics equal a naive recomputation from explicit masks, and a broken mask is counted."""

import json
import math
from itertools import pairwise
from statistics import mean

import pytest
import torch
from torch.nn import functional

import bankwise
from bankwise import DataSource, SparsityConfig
from bankwise.config.evaluation import EvaluationPlan, PerplexityPlan, RoutingPlan
from bankwise.errors import ConfigError
from bankwise.evaluation import active_fraction, routing
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.routing import routing_statistics
from bankwise.evaluation.suites import routing as suite
from bankwise.ffn import sparse_layers
from bankwise.ffn.routing_statistics import usage_entropy, usage_gini

BANK, CHANNELS = 64, 256
SETTINGS = [
    {},
    {"active_per_bank": [8, 64, 16]},
    {"dense_layers": [1]},
    {"gate_mode": "stat_topk"},
    {"gate_mode": "sigmoid", "center": "mean"},
]


def upcycled(dense, windows=None, **settings):
    settings = {"predictor_rank": 16} | settings
    return bankwise.upcycle(dense, SparsityConfig(**settings), calibration=windows, progress=False)


@pytest.fixture(scope="module")
def windows(tokens):
    return {"a": tokens(3, 37, seed=5), "b": tokens(2, 9, seed=6)}


@torch.no_grad()
def layer_inputs(model, windows):
    """FFN inputs of every sparse layer: a list of windows [S, D], each from a forward pass of its own."""
    inputs = {layer.layer: [] for layer in sparse_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, values: inputs[layer.layer].append(values[0][0]))
        for layer in sparse_layers(model)
    ]
    for window in (window for part in windows.values() for window in part):
        model(window[None])
    for hook in hooks:
        hook.remove()
    return inputs


def bank_top(values, count):
    """Set of the largest channels of each bank."""
    chosen = set()
    for start in range(0, len(values), BANK):
        order = sorted(range(start, start + BANK), key=lambda i: (-values[i], i))
        chosen |= set(order[:count])
    return chosen


def naive(layer, inputs):
    """The figures of one layer from sets of channels, token by token."""
    k = layer.active_per_bank
    recall, retained, oracle_energy, global_energy, margins, shared, kept = [], [], [], [], [], 0, 0
    counts, unions = [0] * CHANNELS, {width: [] for width in (2, 4, 8, 16, 32)}
    tokens = sum(len(window) for window in inputs)
    for window in inputs:
        sets = []
        for x in window:
            h = functional.silu(layer.gate_proj(x)) * layer.up_proj(x)
            if layer.sparsity.center != "off":
                h = h - layer.center
            energy = (h.abs() * layer.down_proj.weight.square().sum(dim=0).sqrt()).tolist()
            logits = layer.logits(x[None])[0].tolist()
            own, oracle = bank_top(logits, k), bank_top(energy, k)
            margin = []
            for start in range(0, CHANNELS, BANK):
                values = sorted(logits[start : start + BANK], reverse=True)
                center = mean(values)
                std = math.sqrt(mean((value - center) ** 2 for value in values))
                if layer.sparsity.gate_mode == "stat_topk" and k < BANK:
                    threshold = center + 0.6744897501960817 * std
                    bank = range(start, start + BANK)
                    own = own - set(bank) | {i for i in bank if logits[i] > threshold}
                margin += [(values[k - 1] - values[k]) / std] if k < BANK else []
            margins += margin
            total = sum(e * e for e in energy)
            best = sorted(range(CHANNELS), key=lambda i: -energy[i])[: k * CHANNELS // BANK]
            recall.append(len(own & oracle) / len(oracle))
            for figure, chosen in ((retained, own), (oracle_energy, oracle), (global_energy, best)):
                figure.append(sum(energy[i] ** 2 for i in chosen) / total)
            for i in own:
                counts[i] += 1
            sets.append(own)
        for first, second in pairwise(sets):
            shared += len(first & second)
            kept += len(first)
        for width, values in unions.items():
            values += [
                len(set().union(*sets[start : start + width])) / CHANNELS for start in range(len(sets) - width + 1)
            ]
    rates = sorted((count / tokens for count in counts), reverse=True)
    shares = [rate / sum(rates) for rate in rates]
    pairs = sum(abs(a - b) for a in rates for b in rates)
    return {
        "layer": layer.layer,
        "recall": mean(recall),
        "retained_energy": mean(retained),
        "retained_energy_oracle": mean(oracle_energy),
        "retained_energy_global": mean(global_energy),
        "usage_entropy": -sum(share * math.log(share) for share in shares if share) / math.log(CHANNELS),
        "usage_gini": pairs / (2 * CHANNELS * sum(rates)),
        "dead": sum(rate < 1e-4 for rate in rates) / CHANNELS,
        "always_on": sum(rate > 0.999 for rate in rates) / CHANNELS,
        "overlap": shared / kept,
        "margin": mean(margins) if margins else None,
        "union": {str(width): mean(values) if values else None for width, values in unions.items()},
        "recall_by_position": {"0-1K": mean(recall)},
        "usage": [mean(rates[start : start + 4]) for start in range(0, CHANNELS, 4)],
    }


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(actual[name], value)
        elif value is None:
            assert actual[name] is None
        else:
            assert actual[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_figures_equal_a_naive_recomputation(settings, tiny_dense, windows):
    sparse = upcycled(tiny_dense(num_hidden_layers=3, scale=0.2), windows["a"], **settings)
    statistics = routing_statistics(sparse, windows, batch_size=2)
    inputs = layer_inputs(sparse, windows)
    layers = sparse_layers(sparse)
    assert len(statistics["layers"]) == len(layers) == (2 if "dense_layers" in settings else 3)
    for layer, figures in zip(layers, statistics["layers"], strict=True):
        assert_same(figures, naive(layer, inputs[layer.layer]))
    assert statistics["tokens"] == 3 * 37 + 2 * 9
    joined = torch.cat([functional.pad(part, (0, 37 - part.shape[1])) for part in windows.values()])
    expected = active_fraction(sparse, joined)
    if "gate_mode" not in settings:
        assert statistics["active_fraction"] == pytest.approx(expected, abs=1e-12)
    check = statistics["active_per_bank"]
    if settings.get("gate_mode") == "stat_topk":
        assert check == {"expected": None, "violations": 0, "checked": 0}
        assert statistics["active_fraction"] != 0.25
    else:
        k = settings.get("active_per_bank", 16)
        assert check == {"expected": k, "violations": 0, "checked": len(layers) * 129 * CHANNELS // BANK}
    assert json.loads(json.dumps(statistics, allow_nan=False)) == statistics


def test_windows_are_documents_and_batches_change_nothing(tiny_dense, tokens):
    sparse = upcycled(tiny_dense(scale=0.2))
    rows = tokens(4, 16)
    together = routing_statistics(sparse, {"a": rows}, batch_size=4)
    alone = routing_statistics(sparse, {"a": rows[:1], "b": rows[1:]}, batch_size=1)
    assert together["layers"][0]["union"]["16"] is not None
    assert together["layers"][0]["union"]["32"] is None
    for figures, others in zip(together["layers"], alone["layers"], strict=True):
        assert_same(figures, others)
    single = routing_statistics(sparse, {"a": tokens(4, 1)})["layers"][0]
    assert single["overlap"] is None
    assert set(single["union"].values()) == {None}


def test_position_buckets_and_chunks(monkeypatch, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(scale=0.2, max_position_embeddings=8192))
    rows = {"a": tokens(1, 2500)}
    layers = routing_statistics(sparse, rows)["layers"]
    for layer, figures in zip(sparse_layers(sparse), layers, strict=True):
        (x_SD,) = layer_inputs(sparse, rows)[layer.layer]
        mask = layer.active_mask(x_SD)
        energy = layer.dense_activation(x_SD).abs() * layer.down_proj.weight.norm(dim=0)
        top = energy.unflatten(-1, (-1, BANK)).topk(16).indices
        oracle = torch.zeros(2500, 4, BANK, dtype=torch.bool).scatter(-1, top, True).flatten(-2)
        hits = (mask & oracle).sum(dim=-1) / 64
        assert figures["recall_by_position"] == {
            "0-1K": pytest.approx(hits[:1024].mean().item(), abs=1e-5),
            "1-4K": pytest.approx(hits[1024:].mean().item(), abs=1e-5),
        }
        assert figures["recall"] == pytest.approx(hits.mean().item(), abs=1e-5)
        seen = (mask[1:] & mask[:-1]).sum() / mask[:-1].sum()
        assert figures["overlap"] == pytest.approx(seen.item(), abs=1e-6)
    monkeypatch.setattr(routing, "_CHUNK", 512)
    for figures, others in zip(routing_statistics(sparse, rows)["layers"], layers, strict=True):
        assert_same(figures, others)


def test_a_mask_with_a_wrong_count_is_a_violation(monkeypatch, tiny_dense, tokens):
    sparse = upcycled(tiny_dense())
    layer = sparse_layers(sparse)[1]
    own_mask = layer.active_mask

    def one_too_many(x_TD):
        mask_TF = own_mask(x_TD).clone()
        first_bank = mask_TF[..., :BANK]
        first_bank[3, first_bank[3].logical_not().nonzero()[0]] = True
        return mask_TF

    monkeypatch.setattr(layer, "active_mask", one_too_many)
    check = routing_statistics(sparse, {"a": tokens(2, 8)})["active_per_bank"]
    assert check == {"expected": 16, "violations": 2, "checked": 2 * 16 * 4}


@pytest.mark.parametrize("settings", [{}, {"center": "mean"}], ids=str)
def test_a_dropped_channel_that_reaches_the_output_is_a_violation(settings, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(), tokens(4, 16), **settings)
    layer = sparse_layers(sparse)[0]

    def leak(_down, arguments):
        gated_WSF = arguments[0].clone()
        dropped = ~layer.active_mask(seen[-1])[0, 5]
        gated_WSF[0, 5, dropped.nonzero()[0]] += 1
        return (gated_WSF,)

    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])),
        layer.down_proj.register_forward_pre_hook(leak),
    ]
    assert routing_statistics(sparse, {"a": tokens(1, 8)})["active_per_bank"]["violations"] == 1
    for hook in hooks:
        hook.remove()
    assert routing_statistics(sparse, {"a": tokens(1, 8)})["active_per_bank"]["violations"] == 0


@pytest.mark.usefixtures("bf16_products")
def test_bfloat16_is_near_float32(tiny_dense, tokens):
    sparse = upcycled(tiny_dense(scale=0.2), tokens(4, 32))
    rows = {"a": tokens(2, 32)}
    exact, low = routing_statistics(sparse, rows), routing_statistics(sparse, rows, bf16=True)
    assert low["active_per_bank"]["violations"] == 0
    for figures, others in zip(exact["layers"], low["layers"], strict=True):
        assert others["recall"] == pytest.approx(figures["recall"], abs=0.02)
    assert exact["layers"][1] != low["layers"][1]


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_the_model_as_it_was(training, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(), center="ema").train(training)
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    routing_statistics(sparse, {"a": tokens(2, 9)})
    assert all(module.training is training for module in sparse.modules())
    assert all(torch.equal(value, state[name]) for name, value in sparse.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sparse.modules())


@pytest.mark.parametrize(
    ("rates", "entropy", "gini"),
    [([0.25] * 8, 1.0, 0.0), ([1.0] + [0.0] * 7, 0.0, 7 / 8), ([0.5, 0.5, 0.0, 0.0], 0.5, 0.5)],
)
def test_entropy_and_gini_of_known_distributions(rates, entropy, gini):
    rate_F = torch.tensor(rates, dtype=torch.float64)
    assert usage_entropy(rate_F) == pytest.approx(entropy, abs=1e-12)
    assert usage_gini(rate_F) == pytest.approx(gini, abs=1e-12)


def test_a_model_without_sparse_layers_is_refused(tiny_dense, tokens):
    for model in (tiny_dense(), upcycled(tiny_dense(), dense_layers=[0, 1])):
        with pytest.raises(ConfigError, match="has no sparse layer"):
            routing_statistics(model, {"a": tokens()})


@pytest.fixture
def plan(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(12):
            (tmp_path / name / f"{index}.txt").write_text(f"document {index} of {name} " * 60)
    sources = [DataSource(path=str(tmp_path / name)) for name in ("a", "b")]
    return EvaluationPlan(
        perplexity=PerplexityPlan(data=sources, windows=8, seq_len=24, held_out_fraction=0.5),
        routing=RoutingPlan(windows=3),
    )


def test_suite_reports_means_over_the_layers(plan, tiny_dense, tokenizer):
    sparse = upcycled(tiny_dense(num_hidden_layers=4, scale=0.2), dense_layers=[2])
    assert suite.check(plan, tokenizer, 128) == []
    result = suite.run(Engine(sparse, tokenizer), plan)
    assert result.details["tokens"] == 2 * 3 * 24
    layers = result.details["layers"]
    measures = {measure.metric: measure for measure in result.measures}
    names = ["recall", "retained_energy", "usage_entropy", "dead", "always_on", "overlap", "union_8"]
    assert list(measures) == names  # no window holds 32 tokens
    for name, measure in measures.items():
        assert (measure.section, measure.task, measure.recovery) == ("routing", "all layers", "")
        assert measure.items == ("layer 0", "layer 1", "layer 3")
        values = [layer["union"]["8"] if name == "union_8" else layer[name] for layer in layers]
        scale = 1 if name == "usage_entropy" else 100
        assert measure.value == pytest.approx(scale * mean(values))
        assert measure.unit == ("" if name == "usage_entropy" else "%")
    assert {name: measures[name].better for name in ("recall", "dead", "usage_entropy", "union_8")} == {
        "recall": "higher",
        "dead": "lower",
        "usage_entropy": "",
        "union_8": "lower",
    }


def test_suite_measures_nothing_on_a_dense_model(plan, tiny_dense, tokenizer):
    result = suite.run(Engine(tiny_dense(), tokenizer), plan)
    assert result.measures == []
    assert result.details == {}


def test_suite_refuses_windows_beyond_the_context(plan, tokenizer):
    plan.perplexity.seq_len = 129
    (problem,) = suite.check(plan, tokenizer, 128)
    assert "129" in problem
    assert "128" in problem
