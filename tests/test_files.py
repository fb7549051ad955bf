"""Files and folders are there whole or not at all, whenever the process ends."""

import os
from pathlib import Path

import pytest

from bankwise import files
from bankwise.files import put_folder, remove_folder, remove_leftovers, write_text


class Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch):
    """Ends the process, as far as files go, in the n-th rename from now on."""

    def at_rename(number: int) -> None:
        replace, made = os.replace, []

        def watched(*args):
            made.append(None)
            if len(made) >= number:
                raise Killed
            replace(*args)

        monkeypatch.setattr(files.os, "replace", watched)

    return at_rename


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "weights").write_text(text)
    return path


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_text_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "new"}


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")

    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize(("number", "expected"), [(1, "old"), (2, "old")])
def test_a_kill_between_two_renames_loses_no_folder(tmp_path, kill, monkeypatch, number, expected):
    folder_of(tmp_path / "model", "old")
    kill(number)
    with pytest.raises(Killed):
        put_folder(folder_of(tmp_path / ".model.partial", "new"), tmp_path / "model")
    assert "old" in content(tmp_path).values()
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {"model/weights": expected}


def test_a_folder_that_was_moved_aside_is_kept_by_the_next_attempt(tmp_path):
    folder_of(tmp_path / ".model.old", "old")
    put_folder(folder_of(tmp_path / ".model.partial", "new"), tmp_path / "model")
    assert content(tmp_path) == {"model/weights": "new"}


def test_leftovers_go_and_everything_else_stays(tmp_path):
    folder_of(tmp_path / "model", "whole")
    folder_of(tmp_path / ".model.old", "replaced")
    folder_of(tmp_path / ".other.partial", "half")
    (tmp_path / ".recipe.yaml.17.partial").write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {"model/weights": "whole", ".hidden": "mine"}


def test_a_removed_folder_is_gone_before_its_files_are(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", "old")

    def killed(path, **_):
        if path.exists():
            raise Killed

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        remove_folder(folder)
    assert not folder.exists()
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {}
