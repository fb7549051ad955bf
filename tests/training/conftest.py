"""Windows that can be learnt, sparse models converted from weights alone, and a trainer that keeps its record."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny_run import TokenWindows
from transformers import PreTrainedModel, TrainerCallback

from bankwise.config import CalibrationConfig, SparsityConfig, Stage
from bankwise.models.modeling import use_chunked_loss
from bankwise.training import UpcyclingTrainer
from bankwise.training.telemetry import TelemetryPlan
from bankwise.upcycle import convert


@pytest.fixture(scope="session")
def windows() -> Callable[..., torch.Tensor]:
    """Factory: rows that count upwards in steps of 1 to 3 through 40 tokens."""

    def draw(rows: int = 16, length: int = 16) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        start = torch.randint(40, (rows, 1), generator=generator)
        step = torch.randint(1, 4, (rows, 1), generator=generator)
        return (start + step * torch.arange(length)) % 40

    return draw


@pytest.fixture(scope="session")
def sparse(tiny_dense: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Factory: a tiny dense model converted from its weights; the same arguments give the same weights."""

    def make(*, init: str = "auto", sparsity: dict[str, Any] | None = None, **changes: Any) -> PreTrainedModel:
        settings = CalibrationConfig(tokens=0, init=init)
        config = SparsityConfig(**{"predictor_rank": 16} | (sparsity or {}))
        return convert(tiny_dense(**changes), config, None, settings, progress=False).model

    return make


class Training:
    """One stage, trained; `rows` are the lines of metrics.jsonl."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: torch.Tensor,
        folder: Path,
        *,
        callback: TrainerCallback | None = None,
        name: str = "sparse",
        teacher: PreTrainedModel | None = None,
        telemetry_steps: int = 0,
        probe: torch.Tensor | None = None,
        arguments: dict[str, Any] | None = None,
        tokens_before: int = 0,
        **stage: Any,
    ) -> None:
        if name == "companion":
            use_chunked_loss(model)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"seq_len": windows.shape[1], "micro_batch": 2, "warmup": 0.0, "log_steps": 1, "bf16": False}
        settings |= {"batch_tokens": 2 * windows.shape[1]} | stage
        self.stage = Stage(**settings)
        self.model = model
        self.folder = folder
        needed = self.stage.steps * self.stage.batch_tokens // self.stage.seq_len
        plan = None
        if telemetry_steps:
            read = windows[:3] if probe is None else probe
            plan = TelemetryPlan(windows_WS=read, every=telemetry_steps, file=folder / "telemetry.jsonl")
        self.trainer = UpcyclingTrainer(
            model,
            self.stage,
            TokenWindows(windows.repeat(-(-needed // len(windows)), 1)[:needed]),
            folder / "work",
            name=name,
            teacher=teacher,
            metrics_file=folder / "metrics.jsonl",
            telemetry=plan,
            arguments=arguments,
            tokens_before=tokens_before,
            quiet=True,
        )
        if callback is not None:
            self.trainer.add_callback(callback)

    def run(self, resume_from: Path | None = None) -> "Training":
        self.trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.lines("metrics.jsonl")

    def lines(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / file).read_text().splitlines()]


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., Training]:
    """Factory of `Training`, each in a folder of its own."""
    made: list[Training] = []

    def make(model: PreTrainedModel, windows: torch.Tensor, **settings: Any) -> Training:
        made.append(Training(model, windows, settings.pop("folder", tmp_path / str(len(made))), **settings))
        return made[-1]

    return make
