"""All stages of a training, one after the other, resumable at the stage and step where it stopped."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from bankwise.config import Stage
from bankwise.data import RowCollator
from bankwise.processes import copy_whole, from_main, shards_models
from bankwise.training.checkpointing import checkpoint_step, last_whole_checkpoint, remove_checkpoints
from bankwise.training.optimizer import has_trainable_predictors
from bankwise.training.rope import change_rope
from bankwise.training.telemetry import TelemetryPlan
from bankwise.training.trackers import own_tracker_run
from bankwise.training.trainer import UpcyclingTrainer


def stages_of(model: PreTrainedModel, stages: Sequence[Stage]) -> Iterator[tuple[int, Stage]]:
    """Number and stage of the stages that train something of `model`: a dense one has no predictor to train alone,
    nor has a control whose predictors are frozen or not in use."""
    has_predictors = has_trainable_predictors(model)
    return ((number, stage) for number, stage in enumerate(stages) if has_predictors or stage.trains != "predictor")


def trained_tokens(model: PreTrainedModel, stages: Sequence[Stage]) -> int:
    """Tokens that `model` has read after all its stages: whole optimiser steps."""
    return sum(stage.whole_tokens for _, stage in stages_of(model, stages))


def train_stages(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    rows: Callable[[int], Dataset],
    work: Path,
    *,
    teacher: PreTrainedModel | None = None,
    telemetry: Callable[[Stage], TelemetryPlan] | None = None,
    resume: bool = False,
    **settings: Any,
) -> int:
    """Train `model` in place on each of its stages; returns the tokens it has read.

    Every process of a launch calls it; afterwards each holds the whole trained model. `rows(i)` are the training rows
    of stage i, `telemetry(stage)` says how its routing is read, and `settings` go to `UpcyclingTrainer`. Checkpoints go
    to `work/stage-i`; with `resume` the training goes on from the last whole one.
    """
    own = [number for number, _ in stages_of(model, stages)]
    first, last = _last_checkpoint(own, work) if resume else (0, None)
    tokens = 0
    for number, stage in enumerate(stages):
        # Of a stage that the model skips too: it stays for the stages after it.
        change_rope(model, stage.rope, stage.seq_len)
        if number not in own:
            continue
        is_done = number < first or (number == first and last is not None and checkpoint_step(last) == stage.steps)
        if is_done and number == first:
            assert last is not None
            finished = AutoModelForCausalLM.from_pretrained(last, dtype=model.dtype)
            model.load_state_dict(finished.state_dict())
        if not is_done:
            # FSDP and DeepSpeed take a model apart for good, so they get a copy.
            is_apart = shards_models(settings.get("arguments") or {})
            trained = copy.deepcopy(model.train()) if is_apart else model
            named = dataclasses.replace(stage, name=stage.name or str(number))
            trainer = UpcyclingTrainer(
                trained,
                named,
                rows(number),
                work / f"stage-{number}",
                collate=RowCollator(stage.packing),
                teacher=teacher if stage.has_teacher else None,
                telemetry=None if telemetry is None else telemetry(named),
                tokens_before=tokens,
                **settings,
            )
            with own_tracker_run():
                trainer.train(resume_from_checkpoint=str(last) if number == first and last is not None else None)
            if is_apart:
                copy_whole(trained, model)
            model.zero_grad(set_to_none=True)
        tokens += stage.whole_tokens
    return tokens


def clear_finished(model: PreTrainedModel, stages: Sequence[Stage], work: Path) -> None:
    """Once the trained model is on disk: remove what only served to finish its last stage, and empty folders.

    Those are checkpoints that no `save_steps` asked for, unless all are to stay.
    """
    for number, stage in list(stages_of(model, stages))[-1:]:
        if not stage.save_steps and stage.keep_checkpoints:
            remove_checkpoints(work / f"stage-{number}")
    for folder in (*sorted(work.rglob("*"), reverse=True), work, work.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _last_checkpoint(own: list[int], work: Path) -> tuple[int, Path | None]:
    """Number of the stage that goes on, and its checkpoint: what the main process finds, in all processes."""

    def search() -> tuple[int, Path | None]:
        for number in reversed(own):
            last = last_whole_checkpoint(work / f"stage-{number}")
            if last is not None:
                return number, last
        return 0, None

    return from_main(search)
