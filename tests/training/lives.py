"""A training of two stages, and its lives: processes that are killed at a chosen moment and go on where the last ended.

The moments of a training are the starts of its steps and the points in its writing where a kill does most harm.
"""

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from training.tiny_run import TokenWindows
from transformers import AutoModelForCausalLM

from bankwise import files
from bankwise.config import Stage
from bankwise.errors import Interrupted
from bankwise.models.checkpoint import save_checkpoint
from bankwise.training import UpcyclingTrainer, train_stages, trainer

STEPS = 6
_STAGE = {
    "tokens": STEPS * 64,
    "seq_len": 16,
    "batch_tokens": 64,
    "micro_batch": 2,
    "lr": 1e-3,
    "warmup": 0.3,
    "save_steps": 2,
    "log_steps": 3,
    "bf16": False,
}
Patch = Callable[[Any, str, Any], None]


def stages(**changes: Any) -> list[Stage]:
    return [Stage(name=name, **_STAGE | changes) for name in ("first", "second")]


def train(folder: Path, **changes: Any) -> Path:
    """Start or go on; `folder` holds the model under start/ and the rows as windows.pt. Returns the trained model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    rows = TokenWindows(torch.load(folder / "windows.pt"))
    settings = {"metrics_file": folder / "metrics.jsonl", "quiet": True, "resume": True}
    train_stages(model, stages(**changes), lambda number: rows, folder / "work", **settings)
    if PartialState().is_main_process:
        save_checkpoint(model, None, folder / "checkpoint")
    return folder / "checkpoint"


class Moments:
    """Counts the moments of each kind (`step`, `half a file`, `fsync`, `rename`, `half a line`) and of all (`any`)."""

    def __init__(self, kind: str = "any", kill_at: int = 0) -> None:
        self.kind, self.kill_at = kind, kill_at
        self.count = dict.fromkeys(("any", "step", "half a file", "fsync", "rename", "half a line"), 0)

    def pass_by(self, kind: str, damage: Callable[[], None] = lambda: None) -> None:
        for each in (kind, "any"):
            self.count[each] += 1
            if each == self.kind and self.count[each] == self.kill_at:
                damage()
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, patch: Patch) -> None:
        step, save, fsync, replace = UpcyclingTrainer.training_step, torch.save, os.fsync, os.replace
        append_line = trainer.append_line

        def watched_step(*args: Any) -> Any:
            self.pass_by("step")
            return step(*args)

        def watched_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(value, path, *args, **kwargs)
            self.pass_by("half a file", lambda: os.truncate(path, Path(path).stat().st_size // 2))

        def watched_fsync(descriptor: int) -> None:
            self.pass_by("fsync")
            fsync(descriptor)

        def watched_replace(*args: Any) -> None:
            self.pass_by("rename")
            replace(*args)

        def watched_line(file: Path, row: dict[str, Any]) -> None:
            self.pass_by("half a line", lambda: append_half(file))
            append_line(file, row)

        patch(UpcyclingTrainer, "training_step", watched_step)
        patch(torch, "save", watched_save)
        patch(files.os, "fsync", watched_fsync)
        patch(files.os, "replace", watched_replace)
        patch(trainer, "append_line", watched_line)


def append_half(file: Path) -> None:
    with file.open("a") as stream:
        stream.write('{"model": "sparse", "stage": "fir')


def live(folder: Path, kind: str, kill_at: int) -> int:
    """Train in a new process that is killed in the moment `kill_at` of this kind; returns the exit code."""
    processes = multiprocessing.get_context("forkserver")
    # The server imports once and has no threads, so its children start at once.
    processes.set_forkserver_preload(["training.lives"])
    process = processes.Process(target=_life, args=(folder, kind, kill_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _life(folder: Path, kind: str, kill_at: int) -> None:
    torch.set_num_threads(1)
    Moments(kind, kill_at).watch(setattr)
    train(folder)


def live_in_two(folder: Path, port: int, stop_at: int = 0) -> list[int]:
    """Train in two processes; the second one gets SIGTERM in its pass `stop_at`. Returns their exit codes."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["training.lives"])
    both = [processes.Process(target=_rank, args=(folder, rank, port, stop_at)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    return [process.exitcode or 0 for process in both]


def _rank(folder: Path, rank: int, port: int, stop_at: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    PartialState(cpu=True)
    step, passes = UpcyclingTrainer.training_step, itertools.count(1)

    def stopped(*args: Any) -> Any:
        if rank == 1 and next(passes) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    UpcyclingTrainer.training_step = stopped  # type: ignore[method-assign]
    try:
        train(folder)
    except Interrupted as error:
        sys.exit(error.exit_code)
