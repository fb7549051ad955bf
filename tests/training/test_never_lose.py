"""A run that is killed, stopped, short of disk or damaged ends where the uninterrupted one does."""

import errno
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.lives import STEPS, Moments, append_half, live, train
from transformers import TrainerCallback

from bankwise.errors import Interrupted, TrainingError
from bankwise.models.checkpoint import save_checkpoint
from bankwise.training import UpcyclingTrainer, checkpointing
from bankwise.training.checkpointing import MANIFEST, last_whole_checkpoint


@pytest.fixture
def folder(sparse, windows, tmp_path):
    """Where a training starts."""
    save_checkpoint(sparse(), None, tmp_path / "start")
    torch.save(windows(rows=STEPS * 4), tmp_path / "windows.pt")
    return tmp_path


@pytest.fixture(scope="module")
def whole(sparse, windows, tmp_path_factory):
    """The uninterrupted training, and how many moments it has."""
    folder = tmp_path_factory.mktemp("whole")
    save_checkpoint(sparse(), None, folder / "start")
    torch.save(windows(rows=STEPS * 4), folder / "windows.pt")
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments()
        moments.watch(patch.setattr)
        train(folder)
    return folder, moments.count


def record(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same(folder: Path, whole: Path) -> None:
    assert record(folder) == record(whole)
    ours, theirs = (load_file(path / "checkpoint" / "model.safetensors") for path in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert left(folder) == left(whole)


def left(folder: Path) -> list[str]:
    """Every file under `folder`; none of them half-written."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert not [name for name in names if name.endswith((".partial", ".old"))]
    return names


class AtStep(TrainerCallback):
    """Does something at the end of a step of a stage."""

    def __init__(self, name, step, work):
        self.name, self.step, self.work = name, step, work

    def on_step_end(self, args, state, control, **kwargs):
        if self.name in args.output_dir and state.global_step == self.step:
            self.work()


def at_step(monkeypatch, name: str, step: int, work) -> None:
    before = UpcyclingTrainer.__init__

    def init(self, *args, **kwargs):
        before(self, *args, **kwargs)
        # Ahead of the trainer's own callbacks, as if it had come during the step.
        self.callback_handler.callbacks.insert(0, AtStep(name, step, work))

    monkeypatch.setattr(UpcyclingTrainer, "__init__", init)


# SIGKILL


@pytest.mark.parametrize(
    ("kind", "number"),
    [("step", 16), ("step", 2 * STEPS + 9), ("half a file", 6), ("fsync", 40), ("rename", 4), ("half a line", 2)],
)
def test_a_run_killed_once_goes_on_from_the_last_whole_checkpoint(folder, whole, kind, number):
    assert number < whole[1][kind]
    assert live(folder, kind, number) == -signal.SIGKILL
    assert not (folder / "checkpoint").exists()
    train(folder)
    assert_same(folder, whole[0])


def test_a_run_killed_again_and_again_ends_the_same(folder, whole):
    draw = random.Random(5)
    moments = whole[1]["any"]
    died_writing = 0
    for _ in range(5):
        # The moments left grow fewer with each life, so a life may also come to its end.
        if live(folder, "any", draw.randrange(moments // 4, moments // 2)) == 0:
            break
        died_writing += any((folder / "work").rglob("*.partial"))
    assert died_writing
    train(folder)
    assert_same(folder, whole[0])
