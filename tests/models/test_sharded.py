"""A model held by two processes, under `fully_shard` or the tensor-parallel plan, equals the model of one process."""

import json
import re
from pathlib import Path

import pytest
import torch
from ranks import run_two

import bankwise
from bankwise import SparsityConfig
from bankwise.ffn import sparse_layers

MODELS = {
    "product": ("qwen3", {}, {}),
    "linear": ("llama", {"predictor_form": "linear", "center": "learnable"}, {"mlp_bias": True}),
    "affine": ("mistral", {"gate_mode": "affine", "center": "mean", "dense_layers": [0]}, {}),
    "tied": ("qwen2", {"gate_mode": "sigmoid", "active_per_bank": [64, 8]}, {"tie_word_embeddings": True}),
    "refused-banks": ("llama", {"bank_size": 256, "active_per_bank": 64}, {}),
    "refused-gate": ("llama", {"gate_mode": "relu_rms"}, {}),
    "refused-ema": ("llama", {"center": "ema"}, {}),
}
TENSOR_PARALLEL = ["tp-product", "tp-linear", "tp-affine", "tp-tied"]
FULLY_SHARDED = [f"fsdp-{name}{tail}" for name in ("product", "linear", "tied") for tail in ("", "-tail")]


@pytest.fixture(scope="module")
def results(tiny_dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for name, (family, sparsity, changes) in MODELS.items():
        config = SparsityConfig(**{"predictor_rank": 16, "bank_size": 64} | sparsity)
        model = bankwise.upcycle(tiny_dense(family, **changes), config, progress=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in sparse_layers(model):
                for value in (*layer.parameters(), *layer.buffers()):
                    if value.is_floating_point():
                        value.add_(torch.randn(value.shape, generator=generator) * 0.02)
        model.save_pretrained(folder / "models" / name)
    run_two(Path(__file__).with_name("sharded_ranks.py"), folder)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", TENSOR_PARALLEL)
def test_tensor_parallel_ranks_select_within_their_own_banks(case, results):
    assert all(result[case]["own_banks"] for result in results)


@pytest.mark.parametrize("case", TENSOR_PARALLEL + FULLY_SHARDED)
def test_logits_and_gradients_equal_those_of_one_process(case, results):
    for result in results:
        assert result[case]["logits"] < 1e-5
        assert result[case]["gradients"] < 1e-5


@pytest.mark.parametrize("case", TENSOR_PARALLEL)
def test_a_tensor_parallel_model_generates_the_same_tokens(case, results):
    assert all(result[case]["generated"] for result in results)


@pytest.mark.parametrize("case", TENSOR_PARALLEL + FULLY_SHARDED)
def test_the_saved_checkpoint_holds_the_whole_model(case, results):
    assert all(result[case]["saved"] for result in results)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut bank", "would cut a bank: 256 channels are 1 banks of 256"),
        ("coupled banks", "gate_mode='relu_rms' couples the banks"),
        ("recording", "routing losses and statistics"),
        ("running mean", "running means .* use center='learnable'"),
    ],
)
def test_what_tensor_parallelism_cannot_do_is_refused(case, message, results):
    for result in results:
        assert re.search(message, result["refused"][case])


@pytest.mark.parametrize("case", FULLY_SHARDED)
def test_the_decode_kernels_leave_weights_alone_that_fsdp_shards(case, results):
    assert not any(result[case]["repacked"] for result in results)
