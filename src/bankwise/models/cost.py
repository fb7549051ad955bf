"""Sizes and costs of a model from its config alone: weights of its matrices, FLOPs and bytes of one decoded token.

`token_cost` is for batch 1. The row of the embedding is not counted, the LM head is (`method.md` section 8.1).
Attention over the cache is not counted: it depends on the length of the text, and sparsity does not change it. What
training costs is built on the same sizes in `bankwise.training.budget`.
"""

from dataclasses import dataclass
from typing import Any

from bankwise.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class MatrixSizes:
    """Weights of the matrices of a model: of one layer, and of the LM head. A token multiplies with each once."""

    attention: int
    """Query, key, value and output projection."""
    gate_up: int
    down: int
    reduce: int
    """Of the predictor; 0 in a dense model."""
    expand: int
    head: int


def matrix_sizes(config: Any) -> MatrixSizes:
    """Sizes of a dense or sparse model; those of a sparse layer where the model has any."""
    width, channels = config.hidden_size, config.intermediate_size
    sparsity = sparsity_of(config)
    rank = 0 if sparsity is None else sparsity.resolve_rank(width, channels)
    return MatrixSizes(
        attention=_attention(config)[0],
        gate_up=2 * width * channels,
        down=width * channels,
        reduce=rank * width,
        expand=rank * channels,
        head=config.vocab_size * width,
    )


def sparsity_of(config: Any) -> SparsityConfig | None:
    """The sparsity of a model config; None for a dense model."""
    return SparsityConfig.from_dict(config.sparsity) if getattr(config, "sparsity", None) else None


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """Cost of a token if only active channels are read, and that of the dense model of the same shape."""

    flops: int
    """Two for each weight of a matrix that is read."""
    weight_bytes: int
    ffn_bytes: int
    """Of these, weights of the FFN itself."""
    predictor_bytes: int
    """Of these, weights of the predictors."""
    dense_flops: int
    dense_weight_bytes: int
    dense_ffn_bytes: int
    ffn_bytes_fraction: float
    """rho + pi: share of channels that is read, plus the predictors' matrices as a share of the dense FFN's.

    The oracles read every channel before they choose, and no selection but `predictor` reads the predictors.
    """


def token_cost(config: Any, *, dtype_bytes: int, active_fraction: float | None = None) -> TokenCost:
    """Cost of a token of a dense or sparse model.

    `active_fraction`: share of all FFN channels that a token reads, over all layers, plain dense ones included;
    None: as the config says (`stat_topk` reads a share that only a measurement knows).
    """
    width, channels, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    sparsity, sizes = sparsity_of(config), matrix_sizes(config)
    kept = [1.0] * layers
    router_matrices = router_vectors = layer_vectors = 0
    if sparsity is not None:
        sparse = [layer for layer in range(layers) if layer not in sparsity.dense_layers]
        for layer in sparse:
            kept[layer] = sparsity.active_in_layer(layer) / sparsity.bank_size
        if sparsity.reads_all_channels:
            active_fraction = 1.0
        if sparsity.selection == "predictor":
            router_matrices = len(sparse) * (sizes.reduce + sizes.expand)
            router_vectors = len(sparse) * channels * (5 if sparsity.predictor_form == "gated_product" else 1)
        has_gate_weight, has_center = sparsity.gate_mode in ("affine", "relu_rms"), sparsity.center != "off"
        layer_vectors = len(sparse) * channels * (has_gate_weight + has_center)
    if active_fraction is None:
        active_fraction = sum(kept) / layers

    has_bias = _family(config) == "llama" and config.mlp_bias
    per_channel = 3 * width + (2 if has_bias else 0)
    down_bias = layers * width if has_bias else 0
    read_channels = round(active_fraction * layers * channels)
    ffn = read_channels * per_channel + down_bias + layer_vectors
    dense_ffn = layers * channels * per_channel + down_bias

    attention_vectors = _attention(config)[1]
    rest_matrices = layers * sizes.attention + sizes.head
    rest = rest_matrices + layers * (attention_vectors + 2 * width) + width  # two norms a layer, and the last one
    return TokenCost(
        flops=2 * (rest_matrices + read_channels * 3 * width + router_matrices),
        weight_bytes=dtype_bytes * (rest + ffn + router_matrices + router_vectors),
        ffn_bytes=dtype_bytes * ffn,
        predictor_bytes=dtype_bytes * (router_matrices + router_vectors),
        dense_flops=2 * (rest_matrices + layers * (sizes.gate_up + sizes.down)),
        dense_weight_bytes=dtype_bytes * (rest + dense_ffn),
        dense_ffn_bytes=dtype_bytes * dense_ffn,
        ffn_bytes_fraction=active_fraction + router_matrices / (layers * channels * 3 * width),
    )


def _attention(config: Any) -> tuple[int, int]:
    """Weights of the matrices and of the vectors (biases, norms of queries and keys) of one layer's attention."""
    width = config.hidden_size
    head = head_size(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    family = _family(config)
    vectors = 2 * head if family == "qwen3" else 0
    if family == "qwen2":
        vectors += queries + 2 * keys
    elif family in ("llama", "qwen3") and config.attention_bias:
        vectors += queries + 2 * keys + width
    return 2 * width * queries + 2 * width * keys, vectors


def _family(config: Any) -> str:
    """Dense family; settings of another family that a config may hold mean nothing to it."""
    return str(config.model_type).removeprefix("bankwise_")
