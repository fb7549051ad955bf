"""Training checkpoints that are whole or not there, and what a resumed training needs of them.

A checkpoint `checkpoint-N` is written to a hidden folder, gets a manifest with the size and SHA-256 of every file, is
forced to disk and renamed in one step. Only a folder that agrees with its manifest is whole. With several processes
each writes its own files, the main one renames, and all go on together. The folder must be one that all processes
see, unless `save_on_each_node` is set.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bankwise.errors import TrainingError
from bankwise.files import put_folder, remove_folder, write_json, write_text
from bankwise.manifest import damage, write_manifest
from bankwise.processes import from_main

LONGEST_UNSAVED_S = 1800.0
"""Most seconds of training that a kill takes away from a stage without `save_steps`."""

_OWN_STATE = "own_state.json"
_PREFIX = "checkpoint-"

# What torch.save says, which writes past Python and names no errno.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")

logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and of which the last `keep_checkpoints` stay (0: all)."""

    keep_checkpoints = 0
    left_behind: frozenset[str] = frozenset()
    """Names of the checkpoints in the folder that this training neither started from nor wrote, such as damaged ones:
    they are no reason to delete another."""
    _written_to: Path | None = None

    def own_state(self) -> dict[str, Any]:
        """What the checkpoint holds beside the Trainer's own files, for JSON; all processes call this together."""
        return {}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_to is None else str(self._written_to)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in the background, and would lose a folder that is renamed meanwhile.
        if self._written_to is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in the Trainer. Raises `TrainingError` where the disk takes no more, even with old checkpoints gone."""
        folder = Path(self._get_output_dir(trial))
        name = f"{_PREFIX}{self.state.global_step}"
        partial = folder / f".{name}.partial"
        save = super()._save_checkpoint
        # Before the first file: a process that cannot write one must not leave the others waiting.
        own_state = self.own_state()
        freed = False

        def prepare() -> None:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)

        def write() -> None:
            self._written_to = partial
            try:
                save(model, trial)
                if self.args.should_save:
                    write_json(partial / name / _OWN_STATE, own_state)
            finally:
                self._written_to = None

        def publish() -> None:
            if self.args.should_save:
                write_manifest(partial / name)
                put_folder(partial / name, folder / name)
                partial.rmdir()
                self.left_behind -= {name}

        def make_room() -> None:
            nonlocal freed
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                freed = bool(remove_old_checkpoints(self.own_checkpoints(folder), keep=1))

        while reason := self._together(prepare) or self._together(write) or self._together(publish):
            self._together(make_room)
            if not any(gather_object([freed])):
                raise TrainingError(_no_room(folder, name, reason, self.own_checkpoints(folder)))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save and self.keep_checkpoints:
            remove_old_checkpoints(self.own_checkpoints(folder), keep=self.keep_checkpoints)

    def own_checkpoints(self, folder: Path) -> list[Path]:
        """The whole checkpoints that this training started from or wrote, oldest first."""
        return [checkpoint for checkpoint in whole_checkpoints(folder) if checkpoint.name not in self.left_behind]

    def _together(self, work: Callable[[], None]) -> str | None:
        """Why `work` could not write on one of the processes; None where all are done."""
        reason = None
        try:
            work()
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = write_failure(error)
            # Where the weights are spread over the processes, the others wait for a part of them and cannot answer.
            if reason is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise
        return next((reason for reason in gather_object([reason]) if reason is not None), None)


class SaveInTime(TrainerCallback):
    """Asks for a checkpoint as soon as the last one, or the start of the training, is `LONGEST_UNSAVED_S` ago."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.saved = time.monotonic()

    on_save = on_train_begin

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if from_main(lambda: time.monotonic() - self.saved > LONGEST_UNSAVED_S):
            control.should_save = True


def write_failure(error: Exception) -> str | None:
    """Why a file could not be written, in a few words; None where `error` is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError) and "I/O error: " in str(error):
        return str(error).partition("I/O error: ")[2].partition(" (os error")[0]
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITER):
        return "torch.save could not write all of a file, which most likely means that no space is left"
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps of the stage up to the checkpoint, by its name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def read_own_state(checkpoint: Path) -> dict[str, Any]:
    """What `CheckpointingTrainer.own_state` gave when the checkpoint was written."""
    state: dict[str, Any] = json.loads((checkpoint / _OWN_STATE).read_text(encoding="utf-8"))
    return state


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that agrees with its manifest; each newer one is named in a warning."""
    damaged: list[tuple[Path, str]] = []
    last = None
    for checkpoint in reversed(_checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            last = checkpoint
            break
        damaged.append((checkpoint, reason))
    way_out = "it has no whole checkpoint before it" if last is None else f"going back to {last.name}"
    for checkpoint, reason in damaged:
        logger.warning("%s is damaged (%s); %s", checkpoint, reason, way_out)
    return last


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a stage with all their files, oldest first, by names and sizes."""
    return [checkpoint for checkpoint in _checkpoints(folder) if damage(checkpoint, contents=False) is None]


def later_checkpoints(folder: Path, step: int) -> frozenset[str]:
    """Names of the checkpoints after `step`, whole or not."""
    return frozenset(checkpoint.name for checkpoint in _checkpoints(folder) if checkpoint_step(checkpoint) > step)


def remove_old_checkpoints(checkpoints: list[Path], keep: int) -> list[Path]:
    """Delete all but the last `keep` of a stage's checkpoints; returns the deleted ones."""
    old = checkpoints[:-keep]
    for checkpoint in old:
        remove_folder(checkpoint)
    return old


def remove_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a stage, damaged ones too."""
    for checkpoint in _checkpoints(folder):
        remove_folder(checkpoint)


def trim_record(file: Path, model: str, tokens: int, *, starting: str | None = None) -> None:
    """Drop the lines that a training of `model` wrote after `tokens` tokens, and a last line that was torn.

    The training that goes on from there writes them again; one that starts the stage `starting` there also those of
    this stage at `tokens`.
    """
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    kept = "".join(line for line in lines if not _is_after(json.loads(line), model, tokens, starting))
    if kept != text:
        write_text(file, kept)


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Add one row to a record. Raises `TrainingError` where the disk takes no more."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise TrainingError(
            f"{file} could not be written ({error.strerror}); free some space there and go on with --resume "
            "(resume=True)"
        ) from error


def _is_after(row: dict[str, Any], model: str, tokens: int, starting: str | None) -> bool:
    at = row.get("tokens", 0)
    is_start = starting is not None and at == tokens and row.get("stage") == starting
    return row.get("model") == model and (at > tokens or is_start)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def _no_room(folder: Path, name: str, reason: str, whole: list[Path]) -> str:
    if not whole:
        return (
            f"{name} could not be written to {folder} ({reason}), and the stage has no whole one before it; free some "
            "space there and go on with --resume (resume=True), which starts the stage again"
        )
    size = sum(path.stat().st_size for path in whole[-1].rglob("*") if path.is_file())
    return (
        f"{name} could not be written to {folder} ({reason}); the last whole checkpoint is {whole[-1]}. Free "
        f"{size / 1e6:,.1f} MB there and go on with --resume (resume=True)"
    )
