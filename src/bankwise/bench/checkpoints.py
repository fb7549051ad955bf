"""Speed of real checkpoints beside the dense model, for section E of a report: decoding and reading a prompt.

Each model is timed against the dense one in turn, in one process; two models are in memory at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bankwise.bench.decode import STEPS, decoder
from bankwise.bench.timing import Step, Timing, interleave, quantiles
from bankwise.inference.decoding import prepare
from bankwise.upcycle import load_model

TIMED = ("dense_narrow", "sparse", "repaired")
"""Columns that differ from the dense model in shape or in what they read; the others are as fast as one of these."""

_DECODED = 64
_PROMPT = 256


def checkpoint_speeds(
    models: Mapping[str, str | Path], *, dtype: torch.dtype = torch.bfloat16, pairs: int = 6
) -> dict[str, dict[str, float | str]]:
    """Tokens per second of the dense model and of every column in `TIMED`, with the ratio to dense of the same pairs.

    Batch 1. Sparse models run as `bankwise generate` runs them. The dense row is the one measured beside the last
    column; the ratios are medians over pairs.
    """
    speeds: dict[str, dict[str, float | str]] = {}
    dense = _load(models["dense"], dtype)
    for name in (column for column in TIMED if column in models):
        model = _load(models[name], dtype)
        prepare(model)
        row: dict[str, float | str] = {}
        base: dict[str, float | str] = {}
        for kind, steps, tokens in (
            ("decode", (_decode(model), _decode(dense)), STEPS),
            ("prefill", (_prefill(model), _prefill(dense)), _PROMPT),
        ):
            timing: Timing = interleave(steps[0], {"dense": steps[1]}, pairs=pairs, min_seconds=0.0)["dense"]
            row[f"{kind}_tokens_per_second"] = tokens / quantiles(timing.seconds)[1]
            row[f"{kind}_ratio_to_dense"] = quantiles(timing.ratios())[1]
            base[f"{kind}_tokens_per_second"] = tokens / quantiles(timing.base_seconds)[1]
        speeds[name] = row
        speeds["dense"] = base
    return speeds


def _load(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    model: Any = load_model(source)[0]
    return model.to(dtype)


def _ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    return torch.randint(1, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _decode(model: PreTrainedModel) -> Step:
    return decoder(model, _ids(model, _DECODED))


def _prefill(model: PreTrainedModel) -> Step:
    ids = _ids(model, _PROMPT)

    @torch.no_grad()
    def step() -> None:
        model.model(ids, use_cache=False)

    return step
