"""Costs by formula equal counted parameters, and the figures of the method."""

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import bankwise
from bankwise import SparsityConfig
from bankwise.models import BankwiseLlamaConfig
from bankwise.models.cost import token_cost

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
RANK, WIDTH, CHANNELS, LAYERS = 16, 64, 256, 3


def counted(model):
    """Numbers of all parameters and buffers but the embedding and what is never read to predict."""
    state = {name: value for name, value in model.state_dict().items() if "bank_layout" not in name}
    return sum(value.numel() for name, value in state.items() if "embed_tokens" not in name)


def matrices(model):
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}],
    ids=str,
)
def test_dense_cost_is_all_weights_but_the_embedding(family, settings, tiny_dense):
    dense = tiny_dense(family, num_hidden_layers=LAYERS, **settings)
    cost = token_cost(dense.config, dtype_bytes=2)
    assert cost.weight_bytes == cost.dense_weight_bytes == 2 * counted(dense)
    assert cost.flops == cost.dense_flops == 2 * matrices(dense)
    ffn = sum(value.numel() for name, value in dense.named_parameters() if ".mlp." in name)
    assert cost.ffn_bytes == cost.dense_ffn_bytes == 2 * ffn
    assert cost.predictor_bytes == 0
    assert cost.ffn_bytes_fraction == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predictor_form": "linear"},
        {"gate_mode": "affine", "center": "mean"},
        {"gate_mode": "relu_rms", "dense_layers": [1]},
    ],
    ids=str,
)
def test_sparse_cost_at_full_k_is_all_weights_but_the_embedding(family, settings, tiny_dense):
    sparse = bankwise.upcycle(
        tiny_dense(family, num_hidden_layers=LAYERS),
        SparsityConfig(predictor_rank=RANK, active_per_bank=64, **settings),
        progress=False,
    )
    cost = token_cost(sparse.config, dtype_bytes=4)
    assert cost.weight_bytes == 4 * counted(sparse)
    assert cost.flops == 2 * matrices(sparse)
    router = sum(value.numel() for name, value in sparse.named_parameters() if ".predictor." in name)
    assert cost.predictor_bytes == 4 * router
    assert cost.dense_weight_bytes < cost.weight_bytes


@pytest.mark.parametrize(
    ("settings", "share", "routers"),
    [
        ({}, 0.25, 3),
        ({"active_per_bank": [8, 32, 64]}, (8 + 32 + 64) / 192, 3),
        ({"active_per_bank": [8, 32, 64], "dense_layers": [0]}, (64 + 32 + 64) / 192, 2),
        ({"dense_layers": [0, 1, 2]}, 1.0, 0),
    ],
    ids=str,
)
def test_dropped_channels_cost_nothing(settings, share, routers):
    config = BankwiseLlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=261,
        sparsity=SparsityConfig(predictor_rank=RANK, **settings).to_dict(),
    )
    cost = token_cost(config, dtype_bytes=2)
    ffn, router = LAYERS * 3 * WIDTH * CHANNELS, routers * RANK * (WIDTH + CHANNELS)
    assert cost.ffn_bytes == pytest.approx(2 * share * ffn, abs=1)
    assert cost.predictor_bytes == 2 * (router + routers * 5 * CHANNELS)
    assert cost.dense_weight_bytes - cost.weight_bytes == pytest.approx(2 * (1 - share) * ffn - cost.predictor_bytes)
    assert cost.dense_flops - cost.flops == pytest.approx(2 * ((1 - share) * ffn - router))
    assert cost.ffn_bytes_fraction == pytest.approx(share + router / ffn)


def test_a_measured_share_replaces_that_of_the_config(tiny_dense):
    config = tiny_dense().config
    half = token_cost(config, dtype_bytes=2, active_fraction=0.5)
    assert half.ffn_bytes == half.dense_ffn_bytes / 2
    assert half.ffn_bytes_fraction == 0.5


SHAPES = {  # method.md section 8.1: config, rank, predictor / FFN, FFN bound, decode bound
    "SmolLM2-135M": (LlamaConfig, (576, 1536, 30, 9, 3, 64, 49152), 128, 0.102, 2.84, 1.62),
    "Qwen2.5-0.5B": (Qwen2Config, (896, 4864, 24, 14, 2, 64, 151936), 128, 0.056, 3.26, 1.79),
    "Qwen2.5-7B": (Qwen2Config, (3584, 18944, 28, 28, 4, 128, 152064), 512, 0.057, 3.26, 2.27),
    "Qwen3-8B": (Qwen3Config, (4096, 12288, 36, 32, 8, 128, 151936), 256, 0.028, 3.60, 2.08),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bounds_of_public_models_are_those_of_the_method(name):
    config_class, shape, rank, predictor_share, ffn_bound, decode_bound = SHAPES[name]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = config_class(**dict(zip((*names, "head_dim", "vocab_size"), shape, strict=True)))
    config.sparsity = SparsityConfig(predictor_rank=rank, predictor_form="linear").to_dict()
    cost = token_cost(config, dtype_bytes=2)
    assert cost.predictor_bytes / cost.dense_ffn_bytes == pytest.approx(predictor_share, abs=2e-3)
    assert 1 / cost.ffn_bytes_fraction == pytest.approx(ffn_bound, abs=0.01)
    assert cost.dense_weight_bytes / cost.weight_bytes == pytest.approx(decode_bound, abs=0.02)
