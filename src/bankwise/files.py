"""Files and folders that appear whole or not at all, also after a kill or a power cut.

What is being written lies beside its place under a hidden name that ends in `.partial`, and is forced to disk before
it is renamed. `remove_leftovers` clears up after a process that was killed in between.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write indented JSON."""
    write_text(path, json.dumps(values, indent=2))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path`, then put it in its place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def put_folder(partial: Path, folder: Path) -> None:
    """Rename the folder `partial` to `folder` once all of it is on disk; what is at `folder` goes away after that."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    aside = folder.with_name(f".{folder.name}.old")
    _settle(aside)
    if folder.exists():
        os.replace(folder, aside)
    os.replace(partial, folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete `folder`; a kill in between leaves no part of it under its name."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.replace(folder, partial)
    shutil.rmtree(partial)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written in `folder`; a folder that was moved aside comes back."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in folder.glob(".*.old"):
        _settle(path)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(aside: Path) -> None:
    """Put back a folder that `put_folder` moved `aside` where nothing has taken its place; delete it otherwise."""
    if not aside.is_dir():
        return
    folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))
    if folder.exists():
        shutil.rmtree(aside)
    else:
        os.replace(aside, folder)
