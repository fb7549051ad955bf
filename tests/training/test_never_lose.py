"""A run that is killed, stopped, short of disk or damaged ends where the uninterrupted one does."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.lives import STEPS, Moments, append_half, live, live_in_two, train
from transformers import Trainer, TrainerCallback

from bankwise import manifest
from bankwise.errors import Interrupted, TrainingError
from bankwise.manifest import MANIFEST
from bankwise.models.checkpoint import save_checkpoint
from bankwise.signals import StopRequest, end_at_once
from bankwise.training import UpcyclingTrainer, checkpointing
from bankwise.training.checkpointing import last_whole_checkpoint, trim_record, whole_checkpoints


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
    [("step", 16), ("half a file", 6), ("fsync", 40), ("rename", 4), ("half a line", 2)],
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


# Signals


def names(folder: Path, stage: int) -> list[str]:
    return sorted(path.name for path in (folder / "work" / f"stage-{stage}").iterdir())


def handlers():
    return [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)],
    ids=lambda value: str(value),
)
def test_a_signal_ends_the_step_and_the_run_with_a_checkpoint(folder, monkeypatch, capfd, signum, code):
    before = handlers()
    at_step(monkeypatch, "stage-0", 3, lambda: signal.raise_signal(signum))
    with pytest.raises(Interrupted, match=rf"^{signum.name} stopped .* sparse model after step 3 of 6") as caught:
        train(folder)
    assert caught.value.exit_code == code
    assert f"{signum.name}: stopping after this step, with a checkpoint" in capfd.readouterr().err
    assert handlers() == before
    assert names(folder, 0) == ["checkpoint-2", "checkpoint-3"]


def test_a_run_stopped_between_two_lines_of_its_record_goes_on_to_the_same_end(folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, "stage-1", 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(folder)
    assert names(folder, 1) == ["checkpoint-4", "checkpoint-5"]
    train(folder, keep_checkpoints=0)
    assert names(folder, 1) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert record(folder) == record(whole[0])
    ours, theirs = (load_file(path / "checkpoint" / "model.safetensors") for path in (folder, whole[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_second_signal_ends_it_at_once(folder, whole, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    before = handlers()
    with monkeypatch.context() as patch:
        at_step(patch, "stage-0", 3, twice)
        with end_at_once(), pytest.raises(Interrupted, match=r"^interrupted by SIGTERM$"):
            train(folder)
    assert handlers() == before
    assert names(folder, 0) == ["checkpoint-2"]
    train(folder)
    assert_same(folder, whole[0])


def test_a_notice_of_slurm_is_not_the_first_of_two_signals(folder, monkeypatch):
    def notice():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, "stage-0", 3, notice)
    with pytest.raises(Interrupted, match="SIGTERM stopped"):
        train(folder)
    assert names(folder, 0) == ["checkpoint-2", "checkpoint-3"]


def test_a_signal_after_the_last_step_loses_nothing_either(folder, monkeypatch):
    def on_train_end(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AtStep, "on_train_end", on_train_end)
    at_step(monkeypatch, "stage-0", 0, None)
    with pytest.raises(Interrupted, match="after step 6 of 6"):
        train(folder, save_steps=4)
    assert names(folder, 0) == ["checkpoint-4", "checkpoint-6"]


def test_ignored_signals_stay_ignored_and_threads_train_without_handlers(folder, whole, monkeypatch):
    seen = []
    at_step(monkeypatch, "stage-0", 3, lambda: seen.append(handlers()))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        thread = threading.Thread(target=train, args=(folder,))
        thread.start()
        thread.join()
        assert seen == [handlers()]
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(folder, whole[0])


def test_two_processes_stop_together_and_go_on_from_one_checkpoint(folder, whole):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert live_in_two(folder, port, stop_at=3) == [143, 143]
    stopped = last_whole_checkpoint(folder / "work" / "stage-0")
    assert stopped.name == "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "own_state.json"} <= {
        path.name for path in stopped.iterdir()
    }  # fmt: skip
    assert live_in_two(folder, port) == [0, 0]
    for ours, theirs in zip(record(folder), record(whole[0]), strict=True):
        assert (ours["stage"], ours["step"]) == (theirs["stage"], theirs["step"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    left(folder)


# A full disk


@pytest.fixture
def file_size_limit():
    """Sets the size that no file may grow beyond: the writes that go further fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def size_of(folder: Path, name: str) -> int:
    return (folder / "work" / "stage-0" / "checkpoint-4" / name).stat().st_size


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_does_not_fit_stops_the_run_with_what_to_do(
    folder, whole, monkeypatch, file_size_limit, name
):
    limit = size_of(whole[0], name) - 1000
    with monkeypatch.context() as patch:
        at_step(patch, "stage-0", 4, lambda: file_size_limit(limit))
        with pytest.raises(TrainingError) as caught:
            train(folder)
    file_size_limit(resource.RLIM_INFINITY)
    work = folder / "work" / "stage-0"
    assert f"checkpoint-4 could not be written to {work} (" in str(caught.value)
    assert f"the last whole checkpoint is {work / 'checkpoint-2'}. Free " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(work) == ["checkpoint-2"]
    train(folder)
    assert_same(folder, whole[0])


def test_without_a_checkpoint_before_it_the_message_says_so(folder, whole, file_size_limit):
    file_size_limit(size_of(whole[0], "optimizer.pt") - 1000)
    with pytest.raises(
        TrainingError, match=r"checkpoint-2 could not be written .* the stage has no whole one before it"
    ):
        train(folder)
    file_size_limit(resource.RLIM_INFINITY)
    assert left(folder / "work") == ["stage-0"]


def test_older_checkpoints_make_room_for_the_new_one(folder, whole, monkeypatch):
    save = torch.save

    def short_of_room(value, path, *args, **kwargs):
        if len(whole_checkpoints(Path(path).parents[2])) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", short_of_room)
    train(folder, keep_checkpoints=0)
    assert names(folder, 0) == names(folder, 1) == ["checkpoint-4", "checkpoint-6"]
    assert record(folder) == record(whole[0])


def test_a_line_that_does_not_fit_is_no_part_of_the_record_later(folder, whole, monkeypatch, file_size_limit):
    metrics = folder / "metrics.jsonl"
    with monkeypatch.context() as patch:
        at_step(patch, "stage-1", 3, lambda: file_size_limit(metrics.stat().st_size + 20))
        with pytest.raises(TrainingError, match=r"metrics\.jsonl could not be written \(File too large\); free"):
            train(folder)
    file_size_limit(resource.RLIM_INFINITY)
    assert not metrics.read_text().endswith("\n")
    train(folder)
    assert_same(folder, whole[0])


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


DAMAGE = [
    ("model.safetensors", flip, "model.safetensors: sha256 differs"),
    ("optimizer.pt", cut, "optimizer.pt has [0-9]+ bytes instead of [0-9]+"),
    ("rng_state.pth", os.remove, "rng_state.pth is missing"),
    (MANIFEST, os.remove, "no manifest.json"),
    (MANIFEST, cut, "manifest.json cannot be read"),
]


@pytest.mark.parametrize(("name", "harm", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(whole, tmp_path, caplog, name, harm, words):
    work = shutil.copytree(whole[0] / "work" / "stage-0", tmp_path / "stage-0")
    assert last_whole_checkpoint(work) == work / "checkpoint-6"
    assert not caplog.messages
    harm(work / "checkpoint-6" / name)
    assert last_whole_checkpoint(work) == work / "checkpoint-4"
    (line,) = caplog.messages
    assert re.fullmatch(rf"{work}/checkpoint-6 is damaged \({words}\); going back to checkpoint-4", line)
    harm(work / "checkpoint-4" / name)
    assert last_whole_checkpoint(work) is None
    assert "checkpoint-4 is damaged" in caplog.text
    assert "has no whole checkpoint before it" in caplog.text


def test_a_run_with_damaged_checkpoints_goes_back_and_ends_the_same(folder, whole, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        at_step(patch, "stage-1", 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(folder)
    work = folder / "work"
    flip(work / "stage-1" / "checkpoint-5" / "model.safetensors")
    cut(work / "stage-1" / "checkpoint-4" / "optimizer.pt")
    flip(work / "stage-0" / "checkpoint-6" / "optimizer.pt")
    train(folder)
    assert [re.search(r"stage-\d/checkpoint-\d is damaged", line).group() for line in caplog.messages] == [
        "stage-1/checkpoint-5 is damaged", "stage-1/checkpoint-4 is damaged", "stage-0/checkpoint-6 is damaged"
    ]  # fmt: skip
    assert record(folder) == record(whole[0])
    assert last_whole_checkpoint(work / "stage-0") == work / "stage-0" / "checkpoint-6"


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(folder, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, "stage-0", 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(folder)
    work = folder / "work" / "stage-0"
    for step in (4, 5):
        flip(work / f"checkpoint-{step}" / "optimizer.pt")
    at_step(monkeypatch, "stage-0", 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(folder, keep_checkpoints=1)
    assert last_whole_checkpoint(work) == work / "checkpoint-3"


def test_a_file_that_cannot_be_read_makes_a_checkpoint_damaged(whole, tmp_path, monkeypatch, caplog):
    work = shutil.copytree(whole[0] / "work" / "stage-0", tmp_path / "stage-0")
    read = manifest.file_sha256

    def bad_sector(path):
        if path == work / "checkpoint-6" / "optimizer.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(manifest, "file_sha256", bad_sector)
    assert last_whole_checkpoint(work) == work / "checkpoint-4"
    assert "checkpoint-6 is damaged (optimizer.pt cannot be read: Input/output error)" in caplog.text


def test_without_save_steps_the_clock_asks_for_checkpoints(folder, whole, monkeypatch):
    train(folder, save_steps=0)
    assert names(folder, 0) == names(folder, 1) == ["checkpoint-6"]
    assert record(folder) == record(whole[0])
    monkeypatch.setattr(checkpointing, "LONGEST_UNSAVED_S", 0.0)
    shutil.rmtree(folder / "work")
    train(folder, save_steps=0)
    assert names(folder, 0) == names(folder, 1) == ["checkpoint-5", "checkpoint-6"]


def test_one_checkpoint_can_be_all_that_is_kept(folder):
    train(folder, keep_checkpoints=1)
    assert names(folder, 0) == names(folder, 1) == ["checkpoint-6"]


def test_a_record_is_cut_to_one_model_and_its_tokens(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"model": model, "tokens": tokens} for model in ("companion", "sparse") for tokens in (64, 128, 192)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    append_half(file)
    trim_record(file, "sparse", 128)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[:5]
    trim_record(file, "companion", 0)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows[3:5]


def test_a_checkpoint_is_uploaded_from_where_it_stays(training, sparse, windows, monkeypatch):
    uploaded = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: uploaded.append(Path(folder)))
    run = training(sparse(), windows(), tokens=2 * 32, save_steps=2)
    run.trainer.args.push_to_hub = True
    run.run()
    assert uploaded == [run.folder / "work" / "checkpoint-2"]
    assert uploaded[0].is_dir()
