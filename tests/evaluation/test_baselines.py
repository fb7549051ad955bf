"""Baselines keep what their definitions say, per token, in every family, and leave the dense model as it was."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

import bankwise
from bankwise import DataSource, SparsityConfig
from bankwise.data import held_out_windows, mixed_windows
from bankwise.errors import ConfigError, ModelLoadError
from bankwise.evaluation import window_losses
from bankwise.evaluation.baselines import BASELINES, apply_baseline, rules
from bankwise.evaluation.baselines.thresholds import MagnitudeHistogram
from bankwise.ffn.selection import hash_scores

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
CALIBRATED = ["cats", "teal"]
BANKED = ["gate_topk", "oracle_bank", "random_fixed", "random_per_token"]
KEPT, BANK, CHANNELS = 16, 64, 256


@pytest.fixture(scope="module")
def windows(tokens):
    return tokens(8, 64, seed=5)


def applied(dense, name, windows, **settings):
    return apply_baseline(dense, name, calibration=windows, **settings)


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, **inputs).logits


def inputs(seed=3, rows=2, length=6):
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(seed))


def top(values, count):
    """Indices of the largest values; of equal ones the lower index."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def top_of_banks(values):
    return {bank + index for bank in range(0, CHANNELS, BANK) for index in top(values[bank : bank + BANK], KEPT)}


def naive_channels(name, x_D, mlp, threshold=None):
    """Channels that one token keeps, from its own activations, one number at a time."""
    gate = mlp.gate_proj(x_D).tolist()
    silu = [value / (1 + math.exp(-value)) for value in gate]
    up = mlp.up_proj(x_D).tolist()
    norms = [column.square().sum().sqrt().item() for column in mlp.down_proj.weight.T]
    energy = [abs(s * u) * norm for s, u, norm in zip(silu, up, norms, strict=True)]
    if name == "cats":
        return {index for index, value in enumerate(silu) if abs(value) >= threshold}
    if name == "oracle_global":
        return set(top(energy, CHANNELS // 4))
    return top_of_banks(gate if name == "gate_topk" else energy)


def naive_output(x_D, mlp, channels):
    total = torch.zeros(64)
    for channel in channels:
        gate, up = mlp.gate_proj.weight[channel] @ x_D, mlp.up_proj.weight[channel] @ x_D
        total += gate / (1 + torch.exp(-gate)) * up * mlp.down_proj.weight[:, channel]
    return total


@torch.no_grad()
@pytest.mark.parametrize("name", ["cats", "gate_topk", "oracle_bank", "oracle_global"])
def test_output_is_that_of_the_kept_channels_alone(name, tiny_dense, windows):
    dense = tiny_dense(scale=0.2)
    with applied(dense, name, windows):
        for block in dense.model.layers:
            threshold = block.mlp.rule.__closure__[0].cell_contents.threshold if name == "cats" else None
            x_WSD = inputs()
            output_WSD = block.mlp(x_WSD)
            for x_D, output_D in zip(x_WSD.flatten(0, 1), output_WSD.flatten(0, 1), strict=True):
                channels = naive_channels(name, x_D, block.mlp, threshold)
                assert 0 < len(channels) < CHANNELS
                torch.testing.assert_close(output_D, naive_output(x_D, block.mlp, channels), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_teal_drops_small_inputs_of_each_matrix(tiny_dense, windows):
    dense = tiny_dense(scale=0.2)
    with applied(dense, "teal", windows):
        for block in dense.model.layers:
            mlp = block.mlp
            for x_D in inputs().flatten(0, 1):
                kept_D = torch.tensor([v if abs(v) >= mlp.input_threshold else 0.0 for v in x_D.tolist()])
                h_F = functional.silu(mlp.gate_proj.weight @ kept_D) * (mlp.up_proj.weight @ kept_D)
                kept_F = torch.tensor([v if abs(v) >= mlp.hidden_threshold else 0.0 for v in h_F.tolist()])
                assert 0 < (kept_F != 0).sum() < CHANNELS
                torch.testing.assert_close(mlp(x_D), mlp.down_proj.weight @ kept_F, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_thresholds_keep_the_fraction_in_every_layer_of_the_running_model(fraction, tiny_dense, windows):
    dense = tiny_dense(scale=0.2)
    shares = {"cats": [], "x": [], "h": []}
    with applied(dense, "cats", windows, fraction=fraction) as baseline:
        for block in dense.model.layers:
            rule = block.mlp.rule
            block.mlp.rule = lambda *values, rule=rule: shares["cats"].append(rule(*values)) or shares["cats"][-1]
        logits(dense, windows)
        assert baseline.active_fraction == pytest.approx(fraction, abs=1e-3)
        assert baseline.ffn_bytes_fraction == pytest.approx(1 / 3 + 2 * fraction / 3, abs=1e-3)
    with applied(dense, "teal", windows, fraction=fraction) as baseline:
        for block in dense.model.layers:
            block.mlp.gate_proj.register_forward_pre_hook(lambda _, values: shares["x"].append(values[0] != 0))
            block.mlp.down_proj.register_forward_pre_hook(lambda _, values: shares["h"].append(values[0] != 0))
        logits(dense, windows)
        assert baseline.active_fraction == pytest.approx(fraction, abs=5e-3)
        assert baseline.ffn_bytes_fraction == baseline.active_fraction
    for masks in shares.values():
        assert len(masks) == 2
        for mask in masks:
            assert mask.float().mean().item() == pytest.approx(fraction, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_layer_is_calibrated_behind_layers_that_are_thresholded_already(name, tiny_dense, windows):
    dense = tiny_dense(scale=0.2, mlp_bias=True)
    first, second = (block.mlp for block in dense.model.layers)
    first.gate_proj.bias.fill_(2.0)
    outputs = []
    hook = first.register_forward_hook(lambda _, values, output: outputs.append(output))
    logits(dense, windows)
    hook.remove()
    # The second gate sees how much of the mean output of the first layer is left, which is less without the dropped.
    direction_D = outputs[0].flatten(0, 1).mean(dim=0)
    second.gate_proj.weight += 2 * direction_D / direction_D.norm()
    reading = []
    with applied(dense, name, windows):
        dense.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, values: reading.append(values[0] != 0))
        logits(dense, windows)
        dense.model.layers[0].mlp = first
        logits(dense, windows)
    behind_sparse, behind_dense = (mask.float().mean().item() for mask in reading)
    assert behind_sparse == pytest.approx(0.25, abs=0.01)
    assert abs(behind_dense - 0.25) > 0.03


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9, 1.0])
def test_histogram_cut_is_the_quantile(fraction):
    values = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-4, 4, 7)[:, None]
    histogram = MagnitudeHistogram()
    for part in values:
        histogram.add(part)
    cut = histogram.cut(fraction)
    ranked = sorted(values.abs().flatten().tolist(), reverse=True)
    exact = ranked[math.ceil(fraction * len(ranked)) - 1]
    assert cut.threshold <= exact
    assert cut.threshold == pytest.approx(exact, rel=2e-4)
    assert cut.kept_share == (values.abs() >= cut.threshold).double().mean().item()


def test_random_scores_are_the_documented_hash():
    def mixed(value):
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    ids, positions = torch.tensor([0, 7, 49151]), torch.tensor([0, 3, 100_000])
    channels = torch.tensor([-(2**63), -5, 0, 12345678901234])
    keys = rules.token_keys(ids, positions)
    assert [key % 2**64 for key in keys.tolist()] == [
        mixed(i ^ (p << 32)) for i, p in zip(ids.tolist(), positions.tolist(), strict=True)
    ]
    expected = [[(mixed((k ^ c) % 2**64) >> 40) / 2**24 for c in channels.tolist()] for k in keys.tolist()]
    assert hash_scores(keys, channels).tolist() == expected


def random_masks(dense, name, ids, **settings):
    """The mask of each layer as [rows, columns, F]; what a layer drops is exactly 0 at `down`."""
    seen = []
    with apply_baseline(dense, name, **settings):
        hooks = [
            block.mlp.down_proj.register_forward_pre_hook(lambda _, values: seen.append(values[0] != 0))
            for block in dense.model.layers
        ]
        logits(dense, ids)
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("name", ["random_fixed", "random_per_token"])
def test_random_masks_depend_on_the_seed_and_the_layer_and_keep_k_of_each_bank(name, tiny_dense, tokens):
    dense, ids = tiny_dense(), tokens(4, 120)
    masks = random_masks(dense, name, ids, seed=1)
    assert (masks.unflatten(-1, (-1, BANK)).sum(dim=-1) == KEPT).all()
    assert torch.equal(masks, random_masks(dense, name, ids, seed=1))
    assert not torch.equal(masks, random_masks(dense, name, ids, seed=2))
    assert not torch.equal(masks[0], masks[1])
    is_fixed = bool((masks == masks[:, :1, :1]).all())
    assert is_fixed == (name == "random_fixed")


def test_random_per_token_draws_uniformly_and_independently_of_neighbours(tiny_dense, tokens):
    masks = random_masks(tiny_dense(), "random_per_token", tokens(8, 128))[0].float()
    rate = masks.flatten(0, 1).mean(dim=0)
    deviation = math.sqrt(0.25 * 0.75 / 1024)
    assert (rate - 0.25).abs().max() < 4.5 * deviation
    overlap = (masks[:, 1:] * masks[:, :-1]).sum() / masks[:, 1:].sum()
    assert overlap.item() == pytest.approx(0.25, abs=0.01)
    assert (masks[0] * masks[1]).sum().item() / masks[0].sum().item() == pytest.approx(0.25, abs=0.03)


def test_random_per_token_refuses_embeddings(tiny_dense, tokens):
    dense = tiny_dense()
    with apply_baseline(dense, "random_per_token"):
        logits(dense, tokens())
        with pytest.raises(ConfigError, match="input_ids"):
            logits(dense, None, inputs_embeds=torch.randn(1, 3, 64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BASELINES)
def test_removing_restores_the_dense_model_bit_for_bit(name, family, tiny_dense, tokens, windows):
    dense = tiny_dense(family, scale=0.2)
    ids, state, modules = tokens(), {k: v.clone() for k, v in dense.state_dict().items()}, list(dense.modules())
    places = [value.data_ptr() for value in dense.parameters()]
    expected = logits(dense, ids)
    with applied(dense, name, windows) as baseline:
        assert baseline.model is dense
        assert baseline.name == name
        assert baseline.description
        changed = logits(dense, ids)
        assert (changed - expected).abs().max() > 1e-2
        assert dense.state_dict().keys() == state.keys()
        assert [value.data_ptr() for value in dense.parameters()] == places
    assert torch.equal(logits(dense, ids), expected)
    assert list(dense.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    assert not dense.model._forward_pre_hooks
    assert not dense.model.rotary_emb._forward_pre_hooks
    baseline.remove()
    assert torch.equal(logits(dense, ids), expected)


@pytest.mark.parametrize("name", BASELINES)
def test_everything_kept_is_the_dense_model(name, tiny_dense, tokens, windows):
    dense = tiny_dense()
    expected = logits(dense, tokens())
    with applied(dense, name, windows, fraction=1.0) as baseline:
        assert torch.equal(logits(dense, tokens()), expected)
        assert baseline.active_fraction == 1.0
        assert baseline.ffn_bytes_fraction == 1.0


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BASELINES)
def test_cache_padding_and_generation_change_no_token(name, family, tiny_dense, tokens, windows):
    dense = tiny_dense(family, scale=0.15)
    ids = tokens(2, 18)
    with applied(dense, name, windows):
        whole = logits(dense, ids)
        cache = DynamicCache(config=dense.config)
        parts = [dense(part, past_key_values=cache, use_cache=True).logits for part in ids.split([9, 1, 1, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits(dense, ids[1:]), whole[1:], rtol=1e-4, atol=1e-4)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
        alone = dense.generate(ids[:1], **settings)
        greedy = ids[:1]
        for _ in range(6):
            greedy = torch.cat([greedy, logits(dense, greedy)[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(alone, greedy)
        padded = torch.cat([torch.full((1, 5), 258), ids[:1]], dim=1)
        both = torch.cat([padded, tokens(1, 23, seed=9)])
        mask = (both != 258).long()
        assert torch.equal(dense.generate(both, attention_mask=mask, **settings)[:1, 5:], alone)


@torch.no_grad()
@pytest.mark.parametrize("name", BASELINES)
def test_bfloat16_and_autocast_run_near_float32(name, tiny_dense, tokens, windows):
    dense, ids = tiny_dense(), tokens()
    with applied(dense, name, windows):
        expected = logits(dense, ids)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = logits(dense, ids)
    low = tiny_dense().bfloat16()
    with applied(low, name, windows) as baseline:
        in_bfloat16 = logits(low, ids)
        assert baseline.active_fraction == pytest.approx(0.25, abs=0.01)
    for other in (under_autocast, in_bfloat16):
        assert other.dtype == torch.bfloat16
        assert (
            functional.cosine_similarity(other.float().flatten(), expected.flatten(), dim=0) > 0.97
        )  # some cuts fall elsewhere


def test_order_of_the_baselines_on_a_real_model(smollm2):
    source = [DataSource(path="package:pydoc")]
    calibration = mixed_windows(
        source, smollm2.tokenizer, seq_len=64, num_windows=4, split="train", held_out_fraction=0.05
    )
    (held_out,) = held_out_windows(
        source, smollm2.tokenizer, seq_len=64, num_windows=3, held_out_fraction=0.05
    ).values()
    losses = {"dense": window_losses(smollm2.model, held_out).mean().item()}
    for name in BASELINES:
        with apply_baseline(smollm2.model, name, calibration=calibration):
            losses[name] = window_losses(smollm2.model, held_out).mean().item()
    oracle = losses["oracle_global"]
    assert losses["dense"] < oracle < losses["dense"] + 0.5
    assert oracle < losses["oracle_bank"] + 0.02
    assert losses["oracle_bank"] + 1 < losses["cats"] < losses["gate_topk"]
    assert losses["cats"] < losses["teal"] < losses["random_per_token"]
    assert losses["gate_topk"] + 2 < min(losses["random_fixed"], losses["random_per_token"])
    assert window_losses(smollm2.model, held_out).mean().item() == losses["dense"]


def test_catalogue_has_the_bytes_of_the_method():
    read = {name: baseline.ffn_bytes_of(0.25) for name, baseline in BASELINES.items()}
    assert read == {
        "cats": pytest.approx(0.5),
        "teal": 0.25,
        "gate_topk": pytest.approx(0.5),
        "oracle_bank": 1.0,
        "oracle_global": 1.0,
        "random_fixed": 0.25,
        "random_per_token": 0.25,
    }
    assert [name for name, baseline in BASELINES.items() if baseline.needs_calibration] == CALIBRATED


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cat", {}, "'cat' is not known; use one of cats, teal,"),
        ("cats", {}, "'cats' has thresholds to calibrate"),
        ("teal", {"calibration": torch.zeros(5, dtype=torch.long)}, "give token ids"),
        ("cats", {"fraction": 0.0, "calibration": torch.zeros(2, 5, dtype=torch.long)}, "outside"),
        *((name, {"fraction": 0.26}, "use fraction=0.265625") for name in BANKED),
        *((name, {"bank_size": 60}, "bank_size=60 does not divide") for name in BANKED),
        ("oracle_global", {"fraction": 1 / 3}, "FFN channels"),
        ("random_fixed", {"fraction": 1.5}, "no whole number from 1 to 64"),
    ],
)
def test_impossible_settings_are_refused_and_change_nothing(name, settings, message, tiny_dense):
    dense = tiny_dense()
    modules = list(dense.modules())
    with pytest.raises(ConfigError, match=message):
        apply_baseline(dense, name, **settings)
    assert list(dense.modules()) == modules
    assert not dense.model._forward_pre_hooks


def test_sparse_models_and_second_baselines_are_refused(tiny_dense):
    dense = tiny_dense()
    sparse = bankwise.upcycle(dense, SparsityConfig(predictor_rank=16), progress=False)
    with pytest.raises(ModelLoadError, match="sparse already"):
        apply_baseline(sparse, "gate_topk")
    with apply_baseline(dense, "gate_topk"), pytest.raises(ConfigError, match="remove"):
        apply_baseline(dense, "random_fixed")
    with apply_baseline(dense, "random_fixed"):
        pass
