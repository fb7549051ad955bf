"""Changes of the rotary position embedding between stages."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bankwise.config import RopeChange
from bankwise.errors import ConfigError


def changed_rope(config: Any, change: RopeChange, seq_len: int) -> dict[str, Any]:
    """The config values that `change` sets for rows of `seq_len` tokens; empty where nothing changes.

    Raises `ConfigError` where the model could not place `seq_len` tokens afterwards.
    """
    context = int(config.max_position_embeddings)
    if change.kind == "keep":
        if seq_len > context:
            raise ConfigError(
                f"seq_len={seq_len} is longer than the model's context of {context}; shorten it, or extend the "
                f"context with rope.kind theta or yarn"
            )
        return {}
    rope = dict(config.rope_parameters)
    if change.kind == "theta":
        return {
            "rope_parameters": rope | {"rope_theta": change.theta}, "max_position_embeddings": max(context, seq_len)
        }  # fmt: skip
    original = change.original_context or context
    reach = round(original * change.factor)
    if seq_len > reach:
        raise ConfigError(
            f"seq_len={seq_len} is longer than rope.factor={change.factor:g} times the context of {original}; "
            f"use rope.factor={seq_len / original:g}"
        )
    rope |= {"rope_type": change.kind, "factor": change.factor}
    if change.kind == "yarn":
        rope |= {
            "original_max_position_embeddings": original, "beta_fast": change.beta_fast, "beta_slow": change.beta_slow
        }  # fmt: skip
    return {"rope_parameters": rope, "max_position_embeddings": max(context, reach)}


def change_rope(model: PreTrainedModel, change: RopeChange, seq_len: int) -> None:
    """Give `model` the position embedding of the stage, in its config too, so that the checkpoint carries it."""
    changes = changed_rope(model.config, change, seq_len)
    if not changes:
        return
    for name, value in changes.items():
        setattr(model.config, name, value)
    base: nn.Module = model.base_model
    rotary: Any = base.rotary_emb
    base.rotary_emb = type(rotary)(config=model.config).to(rotary.inv_freq.device)
