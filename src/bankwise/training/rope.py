"""Changes of the rotary position embedding between stages."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bankwise.config import RopeChange, Stage
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
    start = change.original_context or context
    reach = round(start * change.factor)
    if seq_len > reach:
        raise ConfigError(
            f"seq_len={seq_len} is longer than rope.factor={change.factor:g} times the context of {start}; "
            f"use rope.factor={seq_len / start:g}"
        )
    original, factor = start, change.factor
    before = rope.get("rope_type", "default")
    if before in ("linear", "yarn") and before != change.kind:
        raise ConfigError(
            f"rope.kind={change.kind!r} on a model whose context was extended by {before!r} already: use that again"
        )
    if before == change.kind and not change.original_context:
        original, factor = rope.get("original_max_position_embeddings", context), rope["factor"] * factor
    rope |= {"rope_type": change.kind, "factor": factor}
    if change.kind == "yarn":
        rope |= {
            "original_max_position_embeddings": original, "beta_fast": change.beta_fast, "beta_slow": change.beta_slow
        }  # fmt: skip
    return {"rope_parameters": rope, "max_position_embeddings": max(context, reach)}


def check_rope(config: Any, stages: Sequence[Stage]) -> None:
    """Raise `ConfigError`, with the number of the stage, where a model of `config` could not place a stage's rows."""
    config = copy.deepcopy(config)
    for number, stage in enumerate(stages):
        try:
            changes = changed_rope(config, stage.rope, stage.seq_len)
        except ConfigError as error:
            raise ConfigError(f"stages.{number}: {error}") from error
        for name, value in changes.items():
            setattr(config, name, value)


def check_teacher(config: Any, stages: Sequence[Stage]) -> None:
    """Raise `ConfigError` where a stage's rows are longer than what the dense teacher, which stays as it is, reads."""
    context = int(config.max_position_embeddings)
    for number, stage in enumerate(stages):
        if stage.has_teacher and stage.teacher == "dense" and stage.seq_len > context:
            raise ConfigError(
                f"stages.{number}: seq_len={stage.seq_len} is longer than the context of the dense teacher, {context}, "
                "which no rope change reaches; use teacher='companion', kd_weight=0 or a shorter seq_len"
            )


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
