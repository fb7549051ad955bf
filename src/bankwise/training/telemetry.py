"""Routing statistics during training: a line in telemetry.jsonl, scalars for the trackers, warnings (`method.md` 4.3).

At the start of a stage, every `every` steps and at its end, all processes read the same probe batch (a sharded model is
whole only when all take part), and the main one writes. Reading costs at most `MOST_COST` of the time: the probe is
sized for less than that, the cost is measured, and where it is higher the readings become rarer. Start and end always
have one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bankwise.config import Stage
from bankwise.errors import TrainingError
from bankwise.ffn import RoutingRecord, SparseSwiGLU
from bankwise.training.checkpointing import append_line, trim_record
from bankwise.training.controls import COMPANION
from bankwise.training.failure_signs import FailureSigns
from bankwise.training.probe import RoutingProbe

if TYPE_CHECKING:
    from bankwise.training.trainer import UpcyclingTrainer

logger = logging.getLogger(__name__)

MOST_COST = 0.03
"""Share of the run's time that readings may take."""

_PROBE_SHARE = 0.01  # of a process's training tokens between readings; a token read costs about half of one trained on
_MOST_PROBE_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class TelemetryPlan:
    """What is read, how often, and where the lines go."""

    windows_WS: Tensor
    every: int
    """Optimiser steps between readings."""
    file: Path


def probe_size(stage: Stage, every: int, processes: int = 1) -> int:
    """Number of probe windows whose reading every `every` steps stays within the allowed cost; at least one."""
    tokens = min(_MOST_PROBE_TOKENS, _PROBE_SHARE * every * int(stage.batch_tokens) / processes)
    return max(1, int(tokens // stage.seq_len))


class Telemetry(TrainerCallback):
    """Reads the routing of the trainer's model on the plan's probe batch.

    A line holds, by layer, the figures of `RoutingProbe` and `router_gradient`: the norm of the loss's gradient at the
    logits of the step's tokens, from the model's loss (`lm`; None where the layer passes none) and from the auxiliary
    loss as weighted (`aux`). Use (`dead`, `always_on`, `usage_gini`) is counted over the `usage_tokens` probe tokens
    that were read since the stage started or was resumed; churn is None in the first line after that. `companion_gap`
    is the training loss above the companion's on the same rows, mean over the logged steps since the reading before;
    None without a companion in the record, and in a stage whose active channels change.
    """

    def __init__(self, trainer: UpcyclingTrainer, layers: Sequence[SparseSwiGLU], plan: TelemetryPlan) -> None:
        self.trainer, self.plan, self.stage = trainer, plan, trainer.stage
        self.interval = plan.every
        self._layers = [layer.layer for layer in layers]
        self._probe = RoutingProbe(plan.windows_WS)
        self._signs = FailureSigns(
            [layer.bank_size for layer in layers], [layer.active_per_bank for layer in layers]
        )  # fmt: skip
        self._gradients: dict[str, dict[int, Tensor]] = {"lm": {}, "aux": {}}
        self._companion_losses: dict[int, float] = {}
        self.gaps: list[float] = []
        """Of the logged steps since the last reading; kept in checkpoints."""
        self._spent = 0.0
        self._has_said_rarer = False

    def is_due(self, step: int) -> bool:
        """Whether the routing is read when `step` ends."""
        return step % self.interval == 0 or step == self.stage.steps

    def add_gradients(self, record: RoutingRecord) -> None:
        """Take in the gradients of one backward pass of the step that ends with a reading."""
        for kind, sums in (("lm", record.lm_gradients), ("aux", record.aux_gradients)):
            for layer, squared in sums.items():
                self._gradients[kind][layer] = self._gradients[kind].get(layer, 0) + squared

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        # Only the main process is sure to see the file, and all must see the same signs, for one of them stops the run.
        before: list[Any] = [None]
        if self.trainer.is_world_process_zero():
            now = self.trainer.tokens_at(state.global_step)
            is_start = state.global_step == 0
            trim_record(self.plan.file, self.trainer.name, now, starting=self.stage.name if is_start else None)
            lines = _lines_before(self.plan.file, self.trainer.name, self.trainer.tokens_at(0), now)
            before = [(lines, self._read_companion())]
        lines, self._companion_losses = broadcast_object_list(before)[0]
        for line in lines:
            self._signs.look(line)
        if state.global_step == 0:
            self._read(0)  # what recall falls from, and masks change from

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_due(state.global_step):
            self._read(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "ce" in logs and state.global_step in self._companion_losses:
            self.gaps.append(logs["ce"] - self._companion_losses[state.global_step])

    def _read_companion(self) -> dict[int, float]:
        """Cross entropy of the companion in this stage, by step."""
        file = self.trainer.metrics_file
        if file is None or self.stage.k_schedule != "fixed":
            return {}
        return {line["step"]: line["ce"] for line in _lines_of(file, COMPANION) if line["stage"] == self.stage.name}

    def _read(self, step: int) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        started = time.perf_counter()
        steps = step - self._first_step
        step_seconds = (started - self._started - self._spent) / max(1, steps)
        trainer = self.trainer
        reading = self._probe.read(
            trainer.accelerator.unwrap_model(trainer.model_wrapped),
            trainer.model_wrapped,
            batch_size=self.stage.micro_batch,
            loss_chunk=self.stage.loss_chunk,
        )
        probe_seconds = time.perf_counter() - started
        self._spent += probe_seconds
        # The same numbers on every process, for they decide when all of them read next.
        squared = {kind: [sums.get(i) for i in self._layers] for kind, sums in self._gradients.items()}
        self._gradients = {"lm": {}, "aux": {}}
        known = [value for values in squared.values() for value in values if value is not None]
        times = torch.tensor([step_seconds, probe_seconds, self._spent], device=trainer.args.device)
        step_seconds, probe_seconds, spent, *reduced = self._mean_over_processes(
            torch.cat([times, torch.stack(known)]) if known else times
        )
        remaining = iter(reduced)
        line: dict[str, Any] = {
            **self._place(step),
            **reading,
            "companion_gap": mean(self.gaps) if self.gaps else None,
            "router_gradient": {kind: self._norms(kind, values, remaining) for kind, values in squared.items()},
            "interval": self.interval,
            "step_seconds": step_seconds if steps else None,
            "probe_seconds": probe_seconds,
            "cost_share": spent / (spent + steps * step_seconds) if steps else None,
        }
        self.gaps = []
        self._write(line)
        trainer.log(_scalars(line))
        self._look(line)
        if steps:
            self._set_interval(probe_seconds, step_seconds)

    def _norms(self, kind: str, values: list[Any], remaining: Iterator[float]) -> list[float | None]:
        """Norms by layer; `remaining` gives the reduced squares of those that are known."""
        norms = [None if value is None else math.sqrt(next(remaining)) for value in values]
        has_loss = kind == "aux" or self.stage.ce_weight or self.stage.has_teacher
        return norms if has_loss else [None] * len(norms)

    def _mean_over_processes(self, values: Tensor) -> list[float]:
        """[3 times, squared gradients]: times as their mean; squares as of the loss over all processes' tokens."""
        reduced = self.trainer.accelerator.reduce(values, "mean")
        # A process weights its loss by their number W, since gradients are averaged: the sum over W of squares / W^2.
        reduced[3:] /= self.trainer.args.world_size
        return reduced.tolist()

    def _look(self, line: dict[str, Any]) -> None:
        for warned in self._signs.look(line):
            self._write({"warning": warned.sign, "message": warned.message, **self._place(line["step"])})
            if warned.stops:
                raise TrainingError(
                    f"training of the {self.trainer.name} model stopped at {self.trainer.place(line['step'])}: "
                    f"{warned.message}"
                )
            if self.trainer.is_world_process_zero():
                logger.warning("%s model, step %d: %s", self.trainer.name, line["step"], warned.message)

    def _set_interval(self, probe_seconds: float, step_seconds: float) -> None:
        every = self.plan.every
        steps = math.ceil(probe_seconds * (1 - MOST_COST) / (MOST_COST * step_seconds))
        self.interval = every * max(1, math.ceil(steps / every))
        if self.interval > every and not self._has_said_rarer and self.trainer.is_world_process_zero():
            self._has_said_rarer = True
            logger.warning(
                "reading the routing takes %.2g s and a step %.2g s; it is read every %d steps instead of %d, so that "
                "it costs at most %.0f %% of the run",
                probe_seconds,
                step_seconds,
                self.interval,
                every,
                100 * MOST_COST,
            )

    def _place(self, step: int) -> dict[str, Any]:
        return {
            "model": self.trainer.name,
            "stage": self.stage.name,
            "step": step,
            "tokens": self.trainer.tokens_at(step),
        }

    def _write(self, line: dict[str, Any]) -> None:
        if self.trainer.is_world_process_zero():
            append_line(self.plan.file, line)


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """What the trackers show of a line: the mean over layers and the worst layer."""
    worst: dict[str, Callable[[list[float]], float]] = {
        "recall": min, "retained_energy": min, "margin": min, "margin_p5": min, "churn": max, "dead": max
    }  # fmt: skip
    values = {
        f"telemetry/{name}": line[name] for name in ("loss", "companion_gap", "cost_share") if line[name] is not None
    }
    for name, worst_of in worst.items():
        known = [value for value in line[name] if value is not None]
        if known:
            values |= {f"telemetry/{name}": mean(known), f"telemetry/{name}_worst_layer": worst_of(known)}
    for kind, norms in line["router_gradient"].items():
        known = [norm for norm in norms if norm is not None]
        if known:
            values[f"telemetry/router_gradient_{kind}"] = mean(known)
    return values


def _lines_before(file: Path, model: str, first: int, last: int) -> list[dict[str, Any]]:
    """The lines that an interrupted training of this model wrote between two token counts, each step once."""
    if last == first:
        return []
    kept = {
        line["tokens"]: line
        for line in _lines_of(file, model)
        if first <= line["tokens"] <= last and "warning" not in line
    }
    return [kept[tokens] for tokens in sorted(kept)]


def _lines_of(file: Path, model: str) -> list[dict[str, Any]]:
    """The lines of one model in a record, none where there is no file yet."""
    if not file.is_file():
        return []
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["model"] == model]
