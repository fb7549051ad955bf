"""What is wrong with a layer: its weights stay, and the first change that closes most of the gap names the fault.

    routing      an oracle that keeps as many channels does: the predictor chooses badly
    bank         an oracle that ignores the banks does: the channels are dealt into them badly
    capacity     more channels, though not all, do
    distributed  only all channels do
    upstream     none does: the fault is not in the layer's sparsity

Every oracle keeps the layer's current number of channels; with more it would also mend a lack of them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bankwise.ffn import SparseSwiGLU
from bankwise.repair.changes import Change, global_oracle, keep, oracle, wider
from bankwise.repair.statistics import estimate

Fault = Literal["routing", "bank", "capacity", "distributed", "upstream"]
CLOSED = 0.8
"""Share of a gap from which it counts as closed."""
_LARGE_SHARE = 0.5  # of the gap, that all channels of the layer must win for the fault to be in its sparsity


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The fault, and what each change wins (mean over samples, in the metric's unit)."""

    fault: Fault
    gap: float
    gains: dict[str, float]


def diagnose(layer: SparseSwiGLU, losses: Callable[[], list[float]], reference: list[float]) -> Diagnosis:
    """`losses` reads the samples with the model as it is at the call; `reference`: what the reference loses on them."""
    now = losses()
    gap = estimate([own - other for own, other in zip(now, reference, strict=True)]).value
    gains: dict[str, float] = {}

    def gain(name: str, change: Change) -> float:
        if name not in gains:
            with change(layer):
                gains[name] = estimate([old - new for old, new in zip(now, losses(), strict=True)]).value
        return gains[name]

    def fault() -> Fault:
        all_channels = gain("all channels", partial(_keep, layer.bank_size))
        # Other layers may have a part in the gap, which nothing in this one can close.
        wanted = CLOSED * (min(gap, all_channels) if all_channels >= _LARGE_SHARE * gap else gap)
        if gain("bank oracle", oracle) >= wanted:
            return "routing"
        if gain("global oracle", global_oracle) >= wanted:
            return "bank"
        for factor in (1.5, 2, 4):
            active = wider(layer, factor)
            if active < layer.bank_size and gain(f"{active} channels", partial(_keep, active)) >= wanted:
                return "capacity"
        return "distributed" if all_channels >= wanted else "upstream"

    return Diagnosis(fault=fault(), gap=gap, gains=gains)


def _keep(active: int, layer: SparseSwiGLU) -> AbstractContextManager[None]:
    return keep(layer, active)
