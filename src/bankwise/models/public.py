"""Shapes of public models, as their config files state them, so that a run can be planned where no hub is reached.

Only `bankwise run --dry-run` and the benchmarks read them, and they say so; training reads the model's own config.
"""

from typing import Any

from transformers import AutoConfig

_QWEN2: dict[str, Any] = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936}

_SHAPES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "rope_theta": 1e5,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "tie_word_embeddings": True, "max_position_embeddings": 32768, "rope_theta": 1e6,
    },
    "Qwen/Qwen2.5-1.5B": _QWEN2 | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "rope_theta": 1e6,
    },
    "Qwen/Qwen2.5-7B": _QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_theta": 1e6,
    },
    "Qwen/Qwen3-8B-Base": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "rope_theta": 1e6,
    },
}  # fmt: skip

PUBLIC_MODELS = tuple(_SHAPES)


def public_config(name: str) -> Any:
    """Config of a public model with the sizes of its config file; the rest is the family's default."""
    values = dict(_SHAPES[name])
    rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    return AutoConfig.for_model(values.pop("model_type"), **values, rope_parameters=rope)
