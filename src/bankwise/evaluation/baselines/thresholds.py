"""Thresholds of CATS and TEAL from calibration text, layer by layer, in bounded memory.

A layer is calibrated on the hidden states of the model whose earlier layers already have their thresholds. On those of
the dense model, as the papers take them, the share that is kept in use would drift from the one asked for, and the
comparison would not be at an equal active fraction.

Shapes: T tokens, D hidden, F FFN channels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.evaluation.baselines.layers import MaskedSwiGLU, ThresholdedSwiGLU
from bankwise.evaluation.baselines.rules import cats_mask
from bankwise.ffn.bank import to_routing_dtype
from bankwise.upcycle.stream import HiddenStream

_CHUNK = 4096
# 2^13 bins per octave: |silu| piles up at 0.278, the depth of its dip, and many thresholds fall there.
_DROPPED_BITS = 10


class Cut(NamedTuple):
    """A threshold and the share of the calibration values that reach it."""

    threshold: float
    kept_share: float


class MagnitudeHistogram:
    """Counts of |value| in bins that are exact float32 intervals; memory does not grow with the values."""

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (31 - _DROPPED_BITS), dtype=torch.long)

    def add(self, values: Tensor) -> None:
        """Count values of any shape."""
        # The bits of a positive float32, read as an integer, grow with its value.
        bins = values.float().abs().contiguous().view(torch.int32).flatten() >> _DROPPED_BITS
        self.counts += torch.bincount(bins, minlength=self.counts.numel()).cpu()

    def cut(self, fraction: float) -> Cut:
        """The largest bin edge that keeps at least `fraction` of the values."""
        reaching = self.counts.flip(0).cumsum(0).flip(0)
        total = int(reaching[0])
        place = int((reaching >= math.ceil(fraction * total)).nonzero().max())
        edge = torch.tensor(place << _DROPPED_BITS, dtype=torch.int32).view(torch.float32)
        return Cut(edge.item(), reaching[place].item() / total)


Calibrated = tuple[nn.Module, float]
"""A layer with its thresholds, and the share of channels (TEAL: of inputs) that its calibration tokens keep."""


def cats_layer(dense: Any, x_TD: Tensor, fraction: float) -> Calibrated:
    """CATS: one threshold on |silu(gate)|."""
    histogram = MagnitudeHistogram()
    for part_TD in x_TD.split(_CHUNK):
        histogram.add(functional.silu(to_routing_dtype(dense.gate_proj(part_TD))))
    cut = histogram.cut(fraction)
    layer = MaskedSwiGLU(dense, lambda gate_TF, _h_TF, _down_DF: cats_mask(gate_TF, threshold=cut.threshold))
    return layer, cut.kept_share


def teal_layer(dense: Any, x_TD: Tensor, fraction: float) -> Calibrated:
    """TEAL style: one threshold on the input of gate and up, and one on what `down` then gets."""
    inputs, hidden = MagnitudeHistogram(), MagnitudeHistogram()
    for part_TD in x_TD.split(_CHUNK):
        inputs.add(part_TD)
    of_x = inputs.cut(fraction)
    layer = ThresholdedSwiGLU(dense, of_x.threshold, 0.0)
    for part_TD in x_TD.split(_CHUNK):
        hidden.add(layer.activation(part_TD))
    of_h = hidden.cut(fraction)
    layer.hidden_threshold = of_h.threshold
    return layer, (2 * of_x.kept_share + of_h.kept_share) / 3


def calibrated_layers(
    dense: PreTrainedModel,
    windows: Tensor,
    fraction: float,
    make: Callable[[Any, Tensor, float], Calibrated],
) -> tuple[list[nn.Module], float]:
    """The layers of `cats_layer` or `teal_layer`, and their mean kept share; the model itself is left as it is."""
    stream = HiddenStream(dense, windows, "sparse")
    layers, shares = [], []
    for block in dense.model.layers:
        stream.ffn_inputs(block)
        # In the model's own dtype: in bfloat16 a threshold could only fall between coarse steps.
        x_TD = torch.cat(stream.ffn_input).flatten(0, 1).to(dense.dtype)
        layer, share = make(block.mlp, x_TD, fraction)
        stream.advance(block, layer)
        layers.append(layer)
        shares.append(share)
    return layers, sum(shares) / len(shares)
