"""Up to how many tokens at once a layer goes to the CPU operator before the masked dense path is faster.

The default is all that the operator takes. `bankwise bench crossover --save` measures it for a shape and keeps the
result in `$BANKWISE_CACHE/kernels/crossover.json`, one entry per instruction set, number of threads, dtype and shape of
a layer; `BANKWISE_MAX_TOKENS` goes before both. Nothing is measured by itself: which path takes five tokens would then
depend on what else the machine did at that moment, and so would the last digits of the result.

Shapes: D hidden, F channels.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from bankwise.cache import cache_folder
from bankwise.errors import KernelError
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.files import write_json
from bankwise.kernels.cpu.library import MAX_TOKENS, current_isa


class Crossover(NamedTuple):
    """The most tokens at once that go to the operator, and where that number comes from."""

    tokens: int
    source: str


def crossover(layer: SparseSwiGLU) -> Crossover:
    """The crossover of layers like this one with torch's present number of threads."""
    override = requested_tokens()
    if override is not None:
        return Crossover(override, "BANKWISE_MAX_TOKENS")
    measured = _measured(measured_path()).get(key_of(layer))
    return Crossover(MAX_TOKENS, "default") if measured is None else Crossover(measured, "measured")


def requested_tokens() -> int | None:
    """`BANKWISE_MAX_TOKENS`, or None where it is unset."""
    text = os.environ.get("BANKWISE_MAX_TOKENS", "")
    if text == "":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOKENS:
        raise KernelError(
            f"BANKWISE_MAX_TOKENS={text} must be a number from 1 to {MAX_TOKENS}, the tokens that the CPU operator "
            "takes at once; BANKWISE_KERNEL=reference turns it off"
        )
    return int(text)


def save(layer: SparseSwiGLU, tokens: int) -> Path:
    """Keep a measured crossover for layers like this one; returns the file."""
    path = measured_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _measured(path) | {key_of(layer): tokens})
    _measured.cache_clear()
    return path


def measured_path() -> Path:
    """Where measured crossovers are kept."""
    return cache_folder("kernels") / "crossover.json"


def num_measured() -> int:
    """Entries in the file of measured crossovers."""
    return len(_measured(measured_path()))


def key_of(layer: SparseSwiGLU) -> str:
    """What a measurement holds for: instruction set, threads, dtype and D x F of the layer."""
    channels, hidden = layer.gate_proj.weight.shape
    dtype = str(layer.gate_proj.weight.dtype).removeprefix("torch.")
    return f"{current_isa()}, {torch.get_num_threads()} threads, {dtype}, {hidden} x {channels}"


@cache
def _measured(path: Path) -> dict[str, int]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise KernelError(f"{path} cannot be read ({error}); delete it, and measure again where it matters") from error
    if not isinstance(values, dict) or not all(
        isinstance(tokens, int) and 1 <= tokens <= MAX_TOKENS for tokens in values.values()
    ):
        raise KernelError(f"{path} must map each layer to 1-{MAX_TOKENS} tokens; delete it, and measure again")
    return values
