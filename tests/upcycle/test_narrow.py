"""Dense-4x is an ordinary dense model with the strongest channels of the dense one."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import bankwise
from bankwise import DataSource, SparsityConfig
from bankwise.data import held_out_windows, mixed_windows
from bankwise.errors import ConfigError, ModelLoadError
from bankwise.evaluation import window_losses
from bankwise.upcycle.narrow import narrow_dense

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@torch.no_grad()
def dense_energies(model, windows):
    """E[e] of every layer from the model's own forward pass, in its own precision."""
    seen = {}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda mlp, values: seen.setdefault(mlp, values[0]))
        for block in model.model.layers
    ]
    model(windows)
    for hook in hooks:
        hook.remove()
    energies = []
    for block in model.model.layers:
        mlp = block.mlp
        h = functional.silu(mlp.gate_proj(seen[mlp])) * mlp.up_proj(seen[mlp])
        energies.append((h.abs() * mlp.down_proj.weight.norm(dim=0)).flatten(0, 1).mean(dim=0))
    return energies


def kept_rows(dense, narrow, layer):
    """Channels of `dense` that are the rows of `narrow`, in the order of `narrow`."""
    wide, small = dense.model.layers[layer].mlp, narrow.model.layers[layer].mlp
    rows = [
        next(i for i, row in enumerate(wide.gate_proj.weight) if torch.equal(row, kept))
        for kept in small.gate_proj.weight
    ]
    assert torch.equal(small.up_proj.weight, wide.up_proj.weight[rows])
    assert torch.equal(small.down_proj.weight, wide.down_proj.weight[:, rows])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_channels_of_largest_mean_energy(family, tiny_dense, tokens):
    dense = tiny_dense(family, scale=0.2)
    windows = tokens(6, 48)
    narrow = narrow_dense(dense, 0.25, calibration=windows)
    for layer, energy in enumerate(dense_energies(dense, windows)):
        rows = kept_rows(dense, narrow, layer)
        assert len(rows) == 64
        assert rows == sorted(rows)
        best = energy.topk(64)
        # bfloat16 hidden states may swap channels that are near the cut, and only those.
        assert energy[rows].sum() > 0.999 * best.values.sum()
        assert len(set(rows) & set(best.indices.tolist())) >= 62
        assert len(set(rows) & set(range(64))) < 32


def test_without_calibration_the_weights_decide(tiny_dense):
    dense = tiny_dense(num_hidden_layers=1)
    mlp = dense.model.layers[0].mlp
    strong = list(range(3, 256, 4))
    with torch.no_grad():
        mlp.down_proj.weight[:, strong] *= 50
    assert kept_rows(dense, narrow_dense(dense), 0) == strong


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_fraction_one_is_the_dense_model(family, calibrated, tiny_dense, tokens):
    dense = tiny_dense(family)
    narrow = narrow_dense(dense, 1.0, calibration=tokens(2, 16) if calibrated else None)
    assert type(narrow) is type(dense)
    assert torch.equal(logits(narrow, tokens()), logits(dense, tokens()))


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"mlp_bias": True}], ids=str)
def test_saves_and_loads_as_an_ordinary_dense_model(settings, tiny_dense, tokens, tmp_path):
    dense = tiny_dense(**settings)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    expected, modules = logits(dense, tokens()), list(dense.modules())
    narrow = narrow_dense(dense, 0.5, calibration=tokens(2, 16))
    assert narrow.config.intermediate_size == 128
    assert narrow.config.model_type == "llama"
    assert not narrow.training
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in dense.parameters())
    narrow.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded, tokens()), logits(narrow, tokens()))
    with torch.no_grad():
        for value in narrow.parameters():
            value.zero_()
    assert dense.config.intermediate_size == 256
    assert list(dense.modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert torch.equal(logits(dense, tokens()), expected)


def test_keeps_the_dtype(tiny_dense, tokens):
    narrow = narrow_dense(tiny_dense().bfloat16(), calibration=tokens(2, 16))
    assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}
    assert logits(narrow, tokens()).isfinite().all()


@pytest.mark.parametrize("fraction", [0.0, -0.25, 0.3, 1.25, 0.25 + 1 / 1024])
def test_fractions_without_whole_channels_are_refused(fraction, tiny_dense):
    with pytest.raises(ConfigError, match=r"of 256 FFN channels is .*; use fraction="):
        narrow_dense(tiny_dense(), fraction)


def test_sparse_models_and_wrong_windows_are_refused(tiny_dense, tokens):
    dense = tiny_dense()
    with pytest.raises(ModelLoadError, match="sparse already"):
        narrow_dense(bankwise.upcycle(dense, SparsityConfig(predictor_rank=16), progress=False))
    with pytest.raises(ConfigError, match="give token ids"):
        narrow_dense(dense, calibration=tokens(2, 16)[0])


def test_calibration_finds_better_channels_of_a_real_model(smollm2):
    source = [DataSource(path="package:pydoc")]
    split = {"seq_len": 64, "held_out_fraction": 0.05}
    windows = mixed_windows(source, smollm2.tokenizer, num_windows=4, split="train", **split)
    (held_out,) = held_out_windows(source, smollm2.tokenizer, num_windows=2, **split).values()
    losses = {
        calibrated: window_losses(
            narrow_dense(smollm2.model, 0.25, calibration=windows if calibrated else None), held_out
        ).mean()
        for calibrated in (False, True)
    }
    assert losses[True] + 2 < losses[False]
