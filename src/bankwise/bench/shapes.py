"""Named model shapes. Weights are random, so nothing is downloaded; only shapes and dtypes set the time of a step."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from bankwise.config import SparsityConfig
from bankwise.config.sparsity import PredictorForm
from bankwise.errors import ConfigError
from bankwise.models.public import public_config


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's sizes."""

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    rank: int
    """R of the predictor."""
    vocab: int = 32768
    """32K for the Qwen shapes instead of 152K: with the full head a step would time the head."""
    tied: bool = True

    def sparsity(self, form: PredictorForm) -> SparsityConfig:
        """16 of 64 channels with a predictor of this shape's rank."""
        return SparsityConfig(predictor_rank=self.rank, predictor_form=form)


def _shape(name: str, rank: int, vocab: int = 32768) -> Shape:
    config = public_config(name)
    return Shape(
        family=config.model_type,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        rank=rank,
        vocab=vocab,
        tied=config.tie_word_embeddings,
    )


SHAPES = {
    "qwen2.5-7b": _shape("Qwen/Qwen2.5-7B", rank=512),
    "qwen2.5-1.5b": _shape("Qwen/Qwen2.5-1.5B", rank=256),
    "smollm2-135m": _shape("HuggingFaceTB/SmolLM2-135M", rank=128, vocab=49152),
}


def named_shape(name: str) -> Shape:
    """The shape called `name`."""
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is not known; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def random_model(
    shape: Shape, dtype: torch.dtype, sparsity: SparsityConfig | None, *, seed: int = 0
) -> PreTrainedModel:
    """A model of this shape with random weights: sparse with `sparsity`, else the dense family's own class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from bankwise.models import SPARSE_FAMILIES

    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if sparsity is None:
        config = AutoConfig.for_model(shape.family, **sizes)
    else:
        config = SPARSE_FAMILIES[shape.family][0](**sizes, sparsity=sparsity.to_dict())
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()
