"""One stage of training: how long, on what, what learns, and by which losses."""

import math
from dataclasses import dataclass, field
from typing import Literal

from bankwise.config.amounts import parse_tokens
from bankwise.config.data import DataSource, Packing
from bankwise.errors import ConfigError


@dataclass(kw_only=True)
class RopeChange:
    """Change of the rotary position embedding that a stage starts with; it stays for the stages after it."""

    kind: Literal["keep", "theta", "linear", "yarn"] = "keep"
    """`keep`: as the model has it. `theta`: another base. `linear`: positions divided by `factor`. `yarn`: YaRN."""

    theta: float = 0.0
    """New base (`theta`); 0: keep."""

    factor: float = 1.0
    """Times by which the context grows (`linear`, `yarn`); a second change of the same kind multiplies."""

    original_context: int = 0
    """Context that the model was trained at (`yarn`), which `factor` then counts from; 0: the context that it has."""

    beta_fast: float = 32.0
    """YaRN: rotations above which a dimension is left alone."""

    beta_slow: float = 1.0
    """YaRN: rotations below which a dimension is interpolated in full."""

    def __post_init__(self) -> None:
        if self.kind == "theta" and not self.theta > 0:
            raise ConfigError(f"rope.kind='theta' needs rope.theta > 0, got {self.theta}; SmolLM2 at 32K: about 1e6")
        if self.kind != "theta" and self.theta:
            raise ConfigError(f"rope.theta={self.theta:g} belongs to rope.kind='theta', but kind is {self.kind!r}")
        if self.kind not in ("linear", "yarn") and self.factor != 1:
            raise ConfigError(
                f"rope.factor={self.factor:g} belongs to rope.kind 'linear' or 'yarn', but kind is {self.kind!r}"
            )
        if self.kind in ("linear", "yarn") and not self.factor > 1:
            raise ConfigError(f"rope.kind={self.kind!r} needs rope.factor > 1, got {self.factor}")


@dataclass(kw_only=True)
class Stage:
    """One stage of training."""

    name: str = ""
    """What the stage is called in logs; empty: its number."""

    tokens: int | str = "64k"
    """Training tokens; whole optimiser steps, rounded up."""

    seq_len: int = 512
    """Tokens of one training sequence."""

    batch_tokens: int | str = 1024
    """Tokens of one optimiser step, all processes together."""

    micro_batch: int = 2
    """Sequences of one forward pass of one process; batch_tokens / (seq_len * micro_batch * processes) passes are
    accumulated."""

    data: list[DataSource] | None = None
    """Text of this stage; empty: the recipe's."""

    packing: Packing = field(default_factory=Packing)
    """How documents become rows."""

    rope: RopeChange = field(default_factory=RopeChange)
    """Change of the position embedding at the start of the stage."""

    trains: str = "all"
    """Parameters that learn: `all`, `ffn` (the feed-forward layers with their predictors), `predictor` (the predictors
    only), or `layer: i` (the feed-forward and the predictor of one layer)."""

    k_schedule: Literal["fixed", "linear", "cosine", "leak", "dense"] = "fixed"
    """Active channels over the stage. `fixed`: the model's. `linear`, `cosine`: from `k_start` down to the model's.
    `leak`: the model's, dropped channels still pass a share that falls from 1 to 0. `dense`: all channels, so that
    predictors are warmed up on the dense model (with trains: predictor)."""

    k_start: int = 0
    """Active channels per bank at the start of `linear` and `cosine`; 0: the whole bank."""

    k_share: float = 1.0
    """Share of the stage's steps over which channels or leak fall."""

    lr: float = 1e-4
    """Peak learning rate of the model."""

    predictor_lr: float = 1e-3
    """Peak learning rate of the predictors; no weight decay."""

    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rates fall after the warm-up: along a cosine, in a line, not at all, or (`wsd`) in a line over
    the last `decay` of the steps."""

    warmup: float = 0.05
    """Share of the steps over which the learning rates rise from 0."""

    min_lr_ratio: float = 0.1
    """Learning rates at the end, relative to the peak (`constant`: no effect)."""

    decay: float = 0.2
    """Share of the steps over which the learning rates of `wsd` fall."""

    weight_decay: float = 0.0
    """AdamW weight decay of the model's matrices."""

    ce_weight: float = 1.0
    """Weight of the cross entropy."""

    kd_weight: float = 0.0
    """Weight of KL(teacher || student) over the vocabulary, in nats."""

    state_weight: float = 0.0
    """Weight of the distance to the teacher's hidden states: |student - teacher|^2 / |teacher|^2 of a token, mean over
    layers. With this and `kd_weight` at 0 no teacher is run."""

    teacher: Literal["dense", "companion"] = "dense"
    """Who teaches: the dense model as it was loaded, or its companion trained on the same tokens."""

    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of the teacher, which is whole on every device: 4 or 2 bytes per parameter."""

    aux_weight: float = 0.1
    """Weight of the auxiliary routing loss (mean over layers)."""

    aux_weight_end: float | None = None
    """Weight that it falls to along a cosine by the end of the stage; empty: no fall."""

    aux_loss: Literal["kl", "bce"] = "kl"
    """Form of the auxiliary routing loss."""

    aux_scope: Literal["all", "selected"] = "all"
    """Channels that the auxiliary routing loss looks at."""

    aux_token_fraction: float = 0.0625
    """Share of the tokens that the auxiliary routing loss and the statistics read: every n-th token, n = 1 / share
    rounded. The loss runs the predictor a second time, so its cost follows the share."""

    max_grad_norm: float = 1.0
    """Gradient clipping."""

    bf16: bool = True
    """bfloat16 autocast, where the device multiplies bfloat16 matrices in hardware; routing stays in float32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    loss_chunk: int = 512
    """Tokens whose logits exist at one time."""

    save_steps: int = 0
    """Steps between checkpoints from which the stage can resume, beside the one at its end. 0: one every half hour;
    those of the last stage are removed once its model is on disk, unless all stay."""

    keep_checkpoints: int = 2
    """Whole checkpoints of the stage that stay on disk, the newest ones. 0: all."""

    log_steps: int = 5
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        self.tokens, self.batch_tokens = parse_tokens(self.tokens), parse_tokens(self.batch_tokens)
        per_pass = self.seq_len * self.micro_batch
        if not self.data and self.data is not None:
            self.data = None
        _check_trains(self.trains)
        if self.seq_len < 2 or self.micro_batch < 1 or self.loss_chunk < 1:
            raise ConfigError(
                f"seq_len={self.seq_len} must be at least 2, micro_batch={self.micro_batch} and "
                f"loss_chunk={self.loss_chunk} at least 1"
            )
        if self.tokens < 1 or self.batch_tokens < 1:
            raise ConfigError(f"tokens={self.tokens} and batch_tokens={self.batch_tokens} must be at least 1")
        if self.batch_tokens % per_pass:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is not a multiple of seq_len * micro_batch = {per_pass}; "
                f"use {max(1, round(self.batch_tokens / per_pass)) * per_pass}"
            )
        if not 0 < self.aux_token_fraction <= 1:
            raise ConfigError(f"aux_token_fraction={self.aux_token_fraction} is outside (0, 1]")
        for name in (
            "ce_weight", "kd_weight", "state_weight", "aux_weight", "aux_weight_end", "lr", "predictor_lr",
            "weight_decay", "max_grad_norm",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value} must be a number that is not negative; 0 switches it off")
        if not (self.ce_weight or self.has_teacher or self.trains == "predictor"):
            raise ConfigError(
                "ce_weight, kd_weight and state_weight are all 0, so nothing would train the model; set one of them"
            )
        for name in ("k_share", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is outside (0, 1]")
        if not 0 <= self.warmup < 1 or not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"warmup={self.warmup} must be in [0, 1) and min_lr_ratio={self.min_lr_ratio} in [0, 1]")
        if self.k_start < 0:
            raise ConfigError(f"k_start={self.k_start} is negative; 0 starts with the whole bank")
        if self.k_start and self.k_schedule not in ("linear", "cosine"):
            raise ConfigError(f"k_start={self.k_start} belongs to k_schedule linear or cosine, not {self.k_schedule}")
        if self.trains == "predictor" and not (self.aux_weight or self.ce_weight or self.has_teacher):
            raise ConfigError("every loss has weight 0, so nothing would train the predictors; set aux_weight")
        if self.k_schedule == "dense" and self.trains == "predictor" and not self.aux_weight:
            raise ConfigError(
                "with all channels active only the auxiliary loss reaches the predictors; set aux_weight, usually 1"
            )
        if self.log_steps < 1 or self.save_steps < 0 or self.keep_checkpoints < 0:
            raise ConfigError(
                f"log_steps={self.log_steps} must be at least 1, save_steps={self.save_steps} and "
                f"keep_checkpoints={self.keep_checkpoints} at least 0"
            )

    def accumulation(self, processes: int = 1) -> int:
        """Forward passes of one optimiser step on each process. Raises `ConfigError` where it is no whole number."""
        per_pass = self.seq_len * self.micro_batch * processes
        if int(self.batch_tokens) % per_pass:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} cannot be shared by {processes} processes of {self.micro_batch} "
                f"sequences of {self.seq_len} tokens; use a multiple of {per_pass}"
            )
        return int(self.batch_tokens) // per_pass

    @property
    def has_teacher(self) -> bool:
        """Whether a part of the loss needs a teacher."""
        return bool(self.kd_weight or self.state_weight)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return -(-int(self.tokens) // int(self.batch_tokens))

    @property
    def whole_tokens(self) -> int:
        """Tokens that the stage reads: those of whole optimiser steps."""
        return self.steps * int(self.batch_tokens)

    @property
    def rows(self) -> int:
        """Sequences that the stage reads."""
        return self.whole_tokens // self.seq_len

    @property
    def trained_layer(self) -> int | None:
        """The one layer that learns, where `trains` names one."""
        return int(self.trains.split(":")[1]) if self.trains.startswith("layer:") else None


def _check_trains(trains: str) -> None:
    kind, _, layer = trains.partition(":")
    if kind == "layer" and layer.strip().isdigit():
        return
    if trains not in ("all", "ffn", "predictor"):
        raise ConfigError(f"trains={trains!r} is not known; use all, ffn, predictor, or layer: 7")
