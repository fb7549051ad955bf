"""What changes over the steps of a stage: active channels, leak, the weight of the auxiliary loss, learning rates."""

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bankwise.config import Stage
from bankwise.ffn import sparse_layers


def active_channels(stage: Stage, step: int, *, active_per_bank: int, bank_size: int) -> int:
    """Channels of a bank that are active in `step` (from 0) of the stage, for a layer that ends at `active_per_bank`.

    `linear` and `cosine` fall from `k_start` over the first `k_share` of the steps, rounded to whole channels.
    """
    if stage.k_schedule == "dense":
        return bank_size
    if stage.k_schedule not in ("linear", "cosine"):
        return active_per_bank
    start = min(stage.k_start or bank_size, bank_size)
    return round(active_per_bank + (start - active_per_bank) * _remaining(stage, step))


def leak(stage: Stage, step: int) -> float:
    """Share of a dropped channel that still passes in `step`: 1 falling to 0 under `leak`, else 0."""
    return _remaining(stage, step) if stage.k_schedule == "leak" else 0.0


def aux_weight(stage: Stage, step: int) -> float:
    """Weight of the auxiliary routing loss in `step`: constant, or along a cosine to `aux_weight_end`."""
    if stage.aux_weight_end is None:
        return stage.aux_weight
    done = min(1.0, step / max(1, stage.steps - 1))
    return stage.aux_weight_end + (stage.aux_weight - stage.aux_weight_end) * (1 + math.cos(math.pi * done)) / 2


def scheduler_arguments(stage: Stage) -> dict[str, Any]:
    """The stage's learning-rate schedule as `TrainingArguments`: transformers' own schedulers."""
    warmup = round(stage.warmup * stage.steps)
    arguments: dict[str, Any] = {"warmup_steps": warmup}
    settings: dict[str, Any]
    if stage.lr_schedule == "cosine":
        kind, settings = "cosine_with_min_lr", {"min_lr_rate": stage.min_lr_ratio}
    elif stage.lr_schedule == "constant":
        kind, settings = "constant_with_warmup", {}
    else:
        # A line over all steps after the warm-up is wsd with nothing stable.
        decay = stage.steps - warmup if stage.lr_schedule == "linear" else round(stage.decay * stage.steps)
        kind = "warmup_stable_decay"
        settings = {"num_decay_steps": max(1, decay), "decay_type": "linear", "min_lr_ratio": stage.min_lr_ratio}
    return arguments | {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}


def _remaining(stage: Stage, step: int) -> float:
    """What is left of an anneal: 1 in its first step, 0 from its last one on."""
    done = min(1.0, step / max(1, round(stage.k_share * stage.steps) - 1))
    return (1 + math.cos(math.pi * done)) / 2 if stage.k_schedule == "cosine" else 1 - done


class ChannelSchedule(TrainerCallback):
    """Sets the active channels and the leak of every sparse layer before each step, and takes them back at the end."""

    def __init__(self, stage: Stage, model: nn.Module) -> None:
        self.stage = stage
        self.layers = sparse_layers(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self.layers:
            layer.scheduled_active = active_channels(
                self.stage, state.global_step, active_per_bank=layer.active_per_bank, bank_size=layer.bank_size
            )
            layer.leak = leak(self.stage, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for layer in self.layers:
            layer.scheduled_active, layer.leak = None, 0.0
