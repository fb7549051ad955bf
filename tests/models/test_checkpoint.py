"""What is saved is what is loaded; a damaged checkpoint is one clear error; a failed save costs nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import bankwise
from bankwise import SparsityConfig
from bankwise.errors import BankwiseError, ModelLoadError
from bankwise.ffn import sparse_layers
from bankwise.models import SPARSE_FAMILIES
from bankwise.models.checkpoint import is_sparse_checkpoint, load_checkpoint, save_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def upcycled(dense, **settings):
    return bankwise.upcycle(dense, SparsityConfig(**{"predictor_rank": 16} | settings), progress=False)


@torch.no_grad()
def same_logits(left, right):
    ids = torch.arange(40).view(2, 20)
    return torch.equal(left(ids).logits, right(ids).logits)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def checkpoint(tiny_dense, tokenizer, tmp_path):
    return save_checkpoint(upcycled(tiny_dense()), tokenizer, tmp_path / "checkpoint")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_checkpoint_loads_with_the_same_logits(family, tied, tiny_dense, tokenizer, tmp_path):
    model = upcycled(tiny_dense(family, tie_word_embeddings=tied), active_per_bank=[8, 16], bank_layout="random")
    folder = save_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    loaded, loaded_tokenizer = load_checkpoint(folder)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_logits(loaded, model)
    assert loaded.config.sparsity == model.config.sparsity
    assert loaded_tokenizer("hello").input_ids == tokenizer("hello").input_ids
    for one, other in zip(sparse_layers(loaded), sparse_layers(model), strict=True):
        assert torch.equal(one.predictor.bank_layout, other.predictor.bank_layout)
    assert same_logits(AutoModelForCausalLM.from_pretrained(folder), model)
    assert same_logits(SPARSE_FAMILIES[family][1].from_pretrained(folder), model)


SETTINGS = [
    {"predictor_form": "linear"},
    {"center": "mean"},
    {"center": "learnable"},
    {"gate_mode": "affine"},
    {"gate_mode": "relu_rms"},
    {"gate_mode": "default_ema"},
    {"dense_layers": [0]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_tensor_of_every_variant_is_saved(settings, tiny_dense, tmp_path):
    model = upcycled(tiny_dense(), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in sparse_layers(model):
            for value in (*layer.parameters(), *layer.buffers()):
                if value.is_floating_point():
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert same_logits(loaded, model)


def test_sharded_checkpoint_loads_with_the_same_logits(tiny_dense, tokenizer, tmp_path):
    model = upcycled(tiny_dense())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_logits(load_checkpoint(tmp_path)[0], model)


def test_bfloat16_checkpoint_keeps_its_dtype_and_logits(tiny_dense, tokenizer, tmp_path):
    upcycled(tiny_dense()).save_pretrained(tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    loaded, _ = load_checkpoint(save_checkpoint(model, tokenizer, tmp_path / "bfloat16"))
    assert {value.dtype for value in loaded.parameters()} == {torch.bfloat16}
    assert sparse_layers(loaded)[0].predictor.bank_layout.dtype == torch.int64
    assert same_logits(loaded, model)


def test_checkpoint_loads_in_the_dtype_asked_for(checkpoint):
    assert {value.dtype for value in load_checkpoint(checkpoint, dtype=torch.bfloat16)[0].parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_auto_model_gives_the_base_model(family, tiny_dense, tmp_path):
    model, ids = upcycled(tiny_dense(family)), torch.arange(20)[None]
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert type(base) is type(model.model)
    expected = model.model(ids).last_hidden_state
    assert torch.equal(base(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, expected)
    assert type(AutoConfig.from_pretrained(tmp_path / "base")) is SPARSE_FAMILIES[family][0]


def test_saving_again_replaces_the_old_checkpoint(checkpoint, tiny_dense, tokenizer):
    other = upcycled(tiny_dense(seed=1))
    (checkpoint / "stale.txt").write_text("of the old checkpoint")
    assert save_checkpoint(other, tokenizer, checkpoint) == checkpoint
    assert same_logits(load_checkpoint(checkpoint)[0], other)
    assert not (checkpoint / "stale.txt").exists()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_failed_save_leaves_the_old_checkpoint(checkpoint, tiny_dense, tokenizer, monkeypatch):
    before = files_of(checkpoint)
    other = upcycled(tiny_dense(seed=1))

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(other, tokenizer, checkpoint)
    assert files_of(checkpoint) == before
    assert not same_logits(load_checkpoint(checkpoint)[0], other)
    save_checkpoint(other, tokenizer, checkpoint)  # what the failed attempt left is no obstacle
    assert same_logits(load_checkpoint(checkpoint)[0], other)


def test_a_failed_first_save_leaves_no_checkpoint(tiny_dense, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(upcycled(tiny_dense()), tokenizer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert not is_sparse_checkpoint(tmp_path / "checkpoint")


# Damage


def test_folders_without_a_sparse_checkpoint_are_refused(tiny_dense, tmp_path):
    (tmp_path / "empty").mkdir()
    tiny_dense().save_pretrained(tmp_path / "dense")
    for name in ("missing", "empty", "dense"):
        assert not is_sparse_checkpoint(tmp_path / name)
        with pytest.raises(
            ModelLoadError, match=rf"{name} holds no sparse checkpoint; make one with `bankwise upcycle`"
        ):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_unreadable_config_is_named(text, checkpoint):
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelLoadError, match=r"config.json is not a model config"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(share, checkpoint):
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelLoadError, match=r"checkpoint cannot be read"):
        load_checkpoint(checkpoint)


def test_absent_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"checkpoint cannot be read"):
        load_checkpoint(checkpoint)


def test_an_absent_shard_is_refused(tiny_dense, tokenizer, tmp_path):
    upcycled(tiny_dense()).save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_checkpoint(tmp_path)


NAMES = [
    "mlp.predictor.expand.weight",
    "mlp.predictor.bank_layout",
    "mlp.predictor.gate_log_noise",
    "mlp.gate_proj.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_removed_tensor_is_named(name, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights[f"model.layers.1.{name}"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"the checkpoint is damaged: \['model.layers.1.{name}'\]"):
        load_checkpoint(checkpoint)


def test_an_unknown_tensor_is_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.other"] = torch.zeros(2)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"damaged: \['model.layers.1.mlp.other'\]"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "changes", [{"predictor_rank": 32}, {"bank_size": 60}, {"gate_mode": "magic"}, {"unheard_of": 1}], ids=str
)
def test_a_sparsity_that_does_not_fit_the_weights_is_refused(changes, checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["sparsity"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(BankwiseError):
        load_checkpoint(checkpoint)
