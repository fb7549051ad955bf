"""Readings on disk, one line each: an interrupted evaluation goes on, and an unchanged model is not read again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bankwise.errors import ConfigError, DataError
from bankwise.ffn import sparse_layers

_HASHED_AT_ONCE = 1 << 26


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the names, shapes, dtypes and values of all weights and what the config says of the architecture."""
    digest = hashlib.sha256()
    skipped = ("_name_or_path", "transformers_version", "auto_map", "architectures", "dtype", "use_cache")
    config = {name: value for name, value in model.config.to_dict().items() if name not in skipped}
    active = [layer.active_per_bank for layer in sparse_layers(model)]
    digest.update(json.dumps([config, active], sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().cpu().contiguous().view(-1)
        for part in flat.view(torch.uint8).split(_HASHED_AT_ONCE) if flat.numel() else ():
            digest.update(part.numpy().data)
    return digest.hexdigest()


class ReadingCache:
    """Readings of one model, in `folder/<first 16 digits of its fingerprint>.jsonl`; in memory where there is none."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.path = None if folder is None else Path(folder) / f"{fingerprint[:16]}.jsonl"
        self._readings: dict[str, dict[str, Any]] = {}
        if self.path is not None:
            self._load(self.path)

    def _load(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise ConfigError(
                f"the cache folder {path.parent} cannot be used ({error.strerror}); choose another"
            ) from error
        complete, torn = lines[:-1], lines[-1] if lines else b""
        for number, line in enumerate(complete, start=1):
            try:
                row = json.loads(line)
                self._readings[row["key"]] = row["reading"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number} is damaged; delete that file to read again") from error
        if torn:
            # A process that was killed while it wrote leaves half a line; what stands before it is whole.
            with path.open("rb+") as file:
                file.truncate(sum(len(line) + 1 for line in complete))

    @staticmethod
    def key(question: dict[str, Any]) -> str:
        """Hash of everything but the weights that a reading depends on."""
        return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        return self._readings.get(key)

    def put(self, rows: dict[str, dict[str, Any]]) -> None:
        """Append readings; with a folder, they are on disk when this returns."""
        self._readings.update(rows)
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": key, "reading": reading}) + "\n" for key, reading in rows.items())
            file.flush()
            os.fsync(file.fileno())
