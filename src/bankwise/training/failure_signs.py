"""Signs of a training that goes wrong, read from the lines of its telemetry, and what to do (`method.md` section 4.4).

Each sign is told once per stage. The thresholds are design decisions: method.md names the signs without numbers. They
are set so that the histories of our own runs (docs/research-log.md) fall on the right side.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import NormalDist, mean
from typing import Any, NamedTuple

from bankwise.ffn.routing_statistics import DEAD_RATE

FALL_OF_RECALL = 0.02
"""Fall of the mean recall from its best that counts. A predictor that the straight-through gradient undid lost 0.04 in
40,960 tokens (docs/research-log.md, "Training at a tiny budget")."""

FALL_OF_LOSS = 0.02
"""Nats that the held-out loss must have fallen meanwhile; less may be chance."""

LOW_MARGIN = 0.2
"""Part of the 5th-percentile margin of Gaussian logits, below which a margin counts as near 0."""

HIGH_CHURN = 0.3
"""Share of the kept positions lost between two readings; a random choice of 16 in 64 loses 0.75."""

BUCKET_FALL, BUCKET_STEADY = 0.05, 0.02
"""A layer's recall has fallen in one bucket by the first, in every other one by less than the second."""

MANY_DEAD = 0.1
"""Share of a layer's channels that no longer take part."""

ZERO_STEPS = 100
"""Steps over which every reading of the router's gradient is exactly 0 (`method.md` section 4.4)."""

RISE_OF_GAP = 0.02
"""Nats by which the loss above the companion's must have risen over the rising readings; less may be chance."""

_RISES = 3  # of the loss above the companion's, one after the other (`method.md` section 4.4)
_CONFIRMING = 2  # readings in a row that must agree

Lines = Sequence[dict[str, Any]]


class Warned(NamedTuple):
    """A sign that was seen."""

    sign: str
    message: str
    """What was seen, and what to do."""

    stops: bool
    """Whether going on makes no sense."""


class FailureSigns:
    """Looks at every line of one stage of one model; `bank_size` and `active_per_bank` are those of each layer."""

    def __init__(self, bank_size: Sequence[int], active_per_bank: Sequence[int]) -> None:
        low = [_low_margin(bank, active) for bank, active in zip(bank_size, active_per_bank, strict=True)]
        self._signs: dict[str, Callable[[Lines], str | None]] = {
            "absorption": _absorption,
            "falling_behind": _falling_behind,
            "flapping": lambda lines: _flapping(lines, low),
            "position_bucket": _position_bucket,
            "dead_channels": _dead_channels,
            "zero_router_gradient": _zero_gradient,
        }
        self._lines: list[dict[str, Any]] = []
        self._told: set[str] = set()

    def look(self, line: dict[str, Any]) -> list[Warned]:
        """The signs that this line, after those before it, shows for the first time."""
        self._lines.append(line)
        seen = []
        for sign, message_of in self._signs.items():
            message = None if sign in self._told else message_of(self._lines)
            if message is not None:
                self._told.add(sign)
                seen.append(Warned(sign, message, stops=sign == "zero_router_gradient"))
        return seen


def _absorption(lines: Lines) -> str | None:
    if len(lines) <= _CONFIRMING:
        return None
    recalls = [mean(line["recall"]) for line in lines]
    best = max(range(len(lines)), key=recalls.__getitem__)
    last = lines[-1]
    has_fallen = max(recalls[-_CONFIRMING:]) <= recalls[best] - FALL_OF_RECALL
    if not has_fallen or last["loss"] > lines[best]["loss"] - FALL_OF_LOSS:
        return None
    return (
        f"mean recall fell from {recalls[best]:.3f} (step {lines[best]['step']}) to {recalls[-1]:.3f} while the "
        f"held-out loss fell from {lines[best]['loss']:.3f} to {last['loss']:.3f}: the model may be learning around "
        "its router (absorption). Raise aux_weight or lower predictor_lr, or repeat the warm-up (trains: predictor, "
        "k_schedule: dense); the control random_predictor shows whether routing still matters"
    )


def _falling_behind(lines: Lines) -> str | None:
    known = [line for line in lines if line.get("companion_gap") is not None]
    recent = known[-_RISES - 1 :]
    gaps = [line["companion_gap"] for line in recent]
    rises = [after - before for before, after in pairwise(gaps)]
    if len(rises) < _RISES or min(rises) <= 0 or sum(rises) < RISE_OF_GAP:
        return None
    best = min(known, key=lambda line: line["companion_gap"])
    return (
        f"the training loss above the companion's rose at {_RISES} readings one after the other, from {gaps[0]:.3f} to "
        f"{gaps[-1]:.3f} nats on the same rows: further tokens help the dense model more than this one. It was lowest "
        f"at step {best['step']} ({best['companion_gap']:.3f}); keep a checkpoint from there, or go on with a lower "
        "lr, teacher: companion or a richer mixture"
    )


def _flapping(lines: Lines, low: Sequence[float]) -> str | None:
    def flaps(line: dict[str, Any], i: int) -> bool:
        margin, churn = line["margin_p5"][i], line["churn"][i]
        return margin is not None and churn is not None and margin < low[i] and churn > HIGH_CHURN

    where = _layers(lines, flaps)
    if not where:
        return None
    return (
        f"{_named(where)}: the 5th-percentile margin is near 0 and more than {HIGH_CHURN:.0%} of the kept positions "
        "change between readings (mask flapping). Lower predictor_lr, or raise sparsity.ste_tau"
    )


def _position_bucket(lines: Lines) -> str | None:
    buckets = list(lines[-1]["recall_by_position"])
    if len(buckets) < 2 or len(lines) <= _CONFIRMING:
        return None
    for i, layer in enumerate(lines[-1]["layers"]):
        curves = {name: [line["recall_by_position"][name][i] for line in lines] for name in buckets}
        # The smallest fall of the last readings counts as fallen, the largest as steady.
        least = {name: max(curve) - max(curve[-_CONFIRMING:]) for name, curve in curves.items()}
        most = {name: max(curve) - min(curve[-_CONFIRMING:]) for name, curve in curves.items()}
        for name in buckets:
            others = [most[other] for other in buckets if other != name]
            if least[name] >= BUCKET_FALL and max(others) < BUCKET_STEADY:
                return (
                    f"layer {layer}: recall at positions {name} fell from {max(curves[name]):.3f} to "
                    f"{curves[name][-1]:.3f} and at no other positions: a long-context routing fault. Run `bankwise "
                    "scan` on the checkpoint and `bankwise repair` where it finds the layer"
                )
    return None


def _dead_channels(lines: Lines) -> str | None:
    last = lines[-1]
    if last["usage_tokens"] < 1 / DEAD_RATE:
        return None
    where = [layer for layer, dead in zip(last["layers"], last["dead"], strict=True) if dead > MANY_DEAD]
    if not where:
        return None
    return (
        f"{_named(where)}: more than {MANY_DEAD:.0%} of the channels are chosen by fewer than {DEAD_RATE:g} of the "
        f"tokens, at most {max(last['dead']):.0%} (dead channels). Raise aux_weight, lower predictor_lr, and start "
        "from a calibrated conversion (calibration.tokens > 0)"
    )


def _zero_gradient(lines: Lines) -> str | None:
    last = lines[-1]
    where = []
    for i, layer in enumerate(last["layers"]):
        zero_since = None
        for line in reversed(lines):
            if line["router_gradient"]["lm"][i] != 0:
                break
            zero_since = line["step"]
        if zero_since is not None and last["step"] - zero_since >= ZERO_STEPS:
            where.append(layer)
    if not where:
        return None
    return (
        f"{_named(where)}: the model's loss gives the router a gradient of exactly 0 at every reading of the last "
        f"{ZERO_STEPS} steps, although channels are dropped and the gate mode should pass one. Check what freezes the "
        "gate (affine with a frozen gate_weight, ste_alpha: 0), or say predictor_grad: aux if that is meant"
    )


def _layers(lines: Lines, shows: Callable[[dict[str, Any], int], bool]) -> list[int]:
    """The layers that show it in each of the last readings."""
    if len(lines) < _CONFIRMING:
        return []
    recent = lines[-_CONFIRMING:]
    return [layer for i, layer in enumerate(lines[-1]["layers"]) if all(shows(line, i) for line in recent)]


def _low_margin(bank_size: int, active_per_bank: int) -> float:
    """LOW_MARGIN of the 5th percentile that the margin of Gaussian logits has.

    The spacing of sorted values at the cut is exponential with mean 1 / (B * density there), in standard deviations.
    """
    if active_per_bank == bank_size:
        return 0.0
    normal = NormalDist()
    density = normal.pdf(normal.inv_cdf(1 - active_per_bank / bank_size))
    return LOW_MARGIN * -math.log(0.95) / (bank_size * density)


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
