"""Reading a run folder for the report: what must be there, and one clear `DataError` for what is not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bankwise.config.recipe import CONTROLS
from bankwise.errors import DataError

MODELS = ("dense", "untrained", "companion", "dense_narrow", "sparse")
"""Columns of every table of a run, in order; the last three may be missing from a summary."""

TRAINED = ("companion", "dense_narrow", "sparse")

_NUMBERS = ("loss", "standard_error", "perplexity", "tokens", "active_fraction", "n")
_LAYER_NUMBERS = ("layer", "recall", "retained", "retained_oracle", "retained_random")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The files of a finished run, read and checked."""

    summary: dict[str, Any]
    """`summary.json`."""

    metrics: list[dict[str, Any]]
    """`metrics.jsonl`, the last line of each (model, tokens), by tokens."""

    held_out: list[dict[str, Any]]
    """`held_out.jsonl`, the last line of each (model, tokens), by tokens; empty where the file is missing."""

    telemetry: list[dict[str, Any]]
    """The readings of `telemetry.jsonl`, the last one of each (model, tokens), by tokens; empty without the file."""

    recipe: str
    """`recipe.yaml`, verbatim."""

    @property
    def model(self) -> str:
        """The dense model as the recipe names it; empty when neither provenance nor recipe says."""
        named = self.summary["provenance"].get("model")
        if isinstance(named, str) and named:
            return named
        match = re.search(r"^model:\s*(.+?)\s*$", self.recipe, flags=re.MULTILINE)
        return match[1].strip("'\"") if match else ""

    @property
    def calibrated_layers(self) -> list[dict[str, Any]]:
        """Recall and retained energies of each sparse layer at conversion; empty where nothing was calibrated."""
        return (self.summary.get("calibration") or {}).get("layers") or []

    def curve(self, model: str, field: str, lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
        """Points (tokens, `field`) of one model in `metrics` or `held_out`; lines without the field are left out."""
        return [
            (line["tokens"], line[field]) for line in lines if line.get("model") == model and is_number(line.get(field))
        ]

    def last_by_layer(self, field: str) -> list[float]:
        """`recall` or `retained` of each sparse layer on the last training line that has it; empty when none does."""
        found = [line[field] for line in self.metrics if line.get("model") == "sparse" and line.get(field)]
        return found[-1] if found else []


def read_run(folder: Path) -> RunFolder:
    """Return the run in `folder`; a missing or invalid file raises `DataError` with its name."""
    summary = check_summary(_read_json(folder / "summary.json"), str(folder / "summary.json"))
    if not isinstance(summary.get("provenance"), dict) or not summary["provenance"]:
        raise DataError(
            f"{folder / 'summary.json'} has no provenance (command, revision, model, versions, seeds); no "
            "report is written, because nobody could reproduce it"
        )
    is_trained = any(summary.get(model) for model in TRAINED)
    metrics = _read_lines(folder / "metrics.jsonl", numbers=("ce", "tokens", "step"), required=is_trained)
    held_out = _read_lines(folder / "held_out.jsonl", numbers=("tokens", "loss"), required=False)
    telemetry = _read_lines(
        folder / "telemetry.jsonl", numbers=("tokens", "step"), required=False, without="warning"
    )  # fmt: skip
    recipe = _read_text(folder / "recipe.yaml")
    return RunFolder(summary=summary, metrics=metrics, held_out=held_out, telemetry=telemetry, recipe=recipe)


def check_summary(summary: Any, source: str) -> dict[str, Any]:
    """Return `summary` if every column that was run holds its numbers; else raise `DataError` naming the first gap."""
    if not isinstance(summary, dict):
        raise DataError(f"{source} holds a {type(summary).__name__}, not an object; write it again with `bankwise run`")
    for model in dict.fromkeys((*MODELS, *CONTROLS)):
        column = summary.get(model)
        if column is None and (model in TRAINED or model in CONTROLS):
            continue
        column = _check_numbers(column, _NUMBERS, f"{source}: {model}")
        for name, part in (column.get("by_source") or {}).items():
            _check_numbers(part, ("loss", "perplexity", "n"), f"{source}: {model}.by_source.{name}")
    for row in (summary.get("calibration") or {}).get("layers") or []:
        _check_numbers(row, _LAYER_NUMBERS, f"{source}: calibration.layers")
    if summary.get("closed") is not None and not is_number(summary["closed"]):
        raise DataError(f"{source}: closed={summary['closed']!r} is not a number")
    return summary


def models_of(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a run's tables: `dense_narrow` only where it was asked for, the others always."""
    return tuple(model for model in MODELS if model != "dense_narrow" or summary.get(model))


def controls_of(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The controls that were run."""
    return tuple(name for name in CONTROLS if summary.get(name))


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float (NaN and infinity count; True does not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_numbers(values: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is missing or is not an object; it must hold {', '.join(names)}")
    for name in names:
        if not is_number(values.get(name)):
            raise DataError(f"{where}.{name}={values.get(name)!r} is not a number")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; a report needs the folder of a finished `bankwise run`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _read_lines(path: Path, *, numbers: tuple[str, ...], required: bool, without: str = "") -> list[dict[str, Any]]:
    """The last line of each (model, tokens), by tokens; lines that have the field `without` are left out."""
    if not required and not path.exists():
        return []
    kept: dict[tuple[str, float], dict[str, Any]] = {}
    for number, text in enumerate(_read_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from error
        _check_numbers(line, numbers, f"{path}, line {number}")
        if without and without in line:
            continue
        # A resumed run may log a step twice; the later line is the one that the checkpoint went on from.
        kept[str(line.get("model")), line["tokens"]] = line
    return sorted(kept.values(), key=lambda line: line["tokens"])
