"""Dealing the channels of a sparse layer into other banks, predictor and all.

Shapes: F channels.
"""

import torch
from torch import Tensor

from bankwise.ffn import SparseSwiGLU
from bankwise.upcycle.permutation import permute_channels

_OWN = ("gate_weight", "activation_mean", "center")


@torch.no_grad()
def permute_layer(layer: SparseSwiGLU, order_F: Tensor) -> None:
    """New channel j is old channel order[j], in the feed-forward, the predictor and the layer's own vectors.

    The dense function stays the same, and so do each channel's logits; what changes is which channels compete.
    """
    permute_channels(layer, order_F)
    predictor = layer.predictor
    vectors = [predictor.bank_layout, predictor.expand.weight, predictor.expand.bias]
    vectors += [getattr(predictor, name) for name in predictor.start_values()]
    vectors += [getattr(layer, name) for name in _OWN if hasattr(layer, name)]
    for vector in vectors:
        vector.copy_(vector[order_F])
