"""Checksums of a folder's files, written with them: training checkpoints and saved models."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bankwise.files import file_sha256, write_json

MANIFEST = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file in `folder` into its `manifest.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(file_sha256, files)
        entries = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(files, hashes, strict=True)
        }
    write_json(folder / MANIFEST, {"format": "bankwise-checkpoint/1", "files": entries})


def identity(folder: Path) -> str:
    """Tells one saved model from another: by its config and its manifest, or the names and sizes of its files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (folder / MANIFEST).is_file():
        digest.update((folder / MANIFEST).read_bytes())
    else:
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        digest.update(json.dumps(sizes).encode())
    return digest.hexdigest()


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a folder, by its manifest; None where it is whole.

    Without `contents`, only names and sizes are compared, which reads no weights.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if contents:
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = pool.map(_hash, [folder / name for name in expected])
            for (name, (_, digest)), found in zip(expected.items(), hashes, strict=True):
                if isinstance(found, OSError):
                    return f"{name} cannot be read: {found.strerror or found}"
                if found != digest:
                    return f"{name}: sha256 differs"
    return None


def _hash(path: Path) -> str | OSError:
    try:
        return file_sha256(path)
    except OSError as error:  # a bad sector, or a file system that has gone
        return error
