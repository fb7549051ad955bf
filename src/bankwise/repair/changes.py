"""Temporary changes of one layer: how many channels it keeps, and who chooses them. Each undoes itself.

Shapes: T leading dimensions (tokens), D hidden, F channels, N banks, B channels per bank.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.errors import ConfigError
from bankwise.ffn import SparseSwiGLU, bank_topk_mask, channel_energy, sparse_layers

Change = Callable[[SparseSwiGLU], AbstractContextManager[None]]


@contextmanager
def keep(layer: SparseSwiGLU, active_per_bank: int) -> Iterator[None]:
    """The layer keeps `active_per_bank` channels of each bank."""
    before = layer.active_per_bank
    layer.active_per_bank = active_per_bank
    try:
        yield
    finally:
        layer.active_per_bank = before


@contextmanager
def all_dense(model: PreTrainedModel) -> Iterator[None]:
    """Every sparse layer keeps all its channels."""
    with ExitStack() as stack:
        for layer in sparse_layers(model):
            stack.enter_context(keep(layer, layer.bank_size))
        yield


class OracleRouting(nn.Module):
    """In the place of a predictor: the same logits, dealt out to the channels in the order of their contributions.

    The channels with the most energy get a bank's largest logits, so every gate mode keeps the oracle's channels and
    sees the values that it is used to.
    """

    def __init__(self, layer: SparseSwiGLU) -> None:
        super().__init__()
        self.form = layer.predictor.form
        self._layer = [layer]  # in a list, so that the layer does not become a part of its own part
        self._predictor = [layer.predictor]

    def forward(self, x_TD: Tensor) -> Tensor:
        layer = self._layer[0]
        energy_TF = layer.energy(layer.dense_activation(x_TD))
        logits_TNB = self._predictor[0](x_TD).unflatten(-1, (-1, layer.bank_size))
        order_TNB = energy_TF.unflatten(-1, (-1, layer.bank_size)).argsort(dim=-1, descending=True, stable=True)
        falling_TNB = logits_TNB.sort(dim=-1, descending=True).values
        return torch.empty_like(falling_TNB).scatter_(-1, order_TNB, falling_TNB).flatten(-2)


@contextmanager
def oracle(layer: SparseSwiGLU) -> Iterator[None]:
    """Each bank keeps the channels that contribute most, as many as now."""
    predictor = layer.predictor
    # It gives scores for the predictor's logits, and is none of its kind.
    layer.predictor = OracleRouting(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.predictor = predictor


@contextmanager
def global_oracle(layer: SparseSwiGLU) -> Iterator[None]:
    """The layer keeps the channels that contribute most, as many as now, wherever they lie."""
    bank_size, active = layer.bank_size, layer.active_per_bank
    channels = layer.gate_proj.out_features
    layer.bank_size, layer.active_per_bank = channels, active * channels // bank_size
    try:
        with oracle(layer):
            yield
    finally:
        layer.bank_size, layer.active_per_bank = bank_size, active


class MaskedSwiGLU(nn.Module):
    """A dense feed-forward that keeps the channels which contribute most in each bank of the sparse model."""

    def __init__(self, dense: Any, sparse: SparseSwiGLU) -> None:
        super().__init__()
        self._dense = [dense]
        self._cut = {"bank_size": sparse.bank_size, "active_per_bank": sparse.active_per_bank}
        # Channel j of the sparse layer was channel bank_layout[j] of the dense one.
        self._layout_F = sparse.predictor.bank_layout
        self._place_F = self._layout_F.argsort()

    def forward(self, x_TD: Tensor) -> Tensor:
        dense = self._dense[0]
        h_TF = dense.act_fn(dense.gate_proj(x_TD)) * dense.up_proj(x_TD)
        energy_TF = channel_energy(h_TF, dense.down_proj.weight)
        mask_TF = bank_topk_mask(energy_TF[..., self._layout_F], **self._cut)[..., self._place_F]
        return dense.down_proj(h_TF * mask_TF)


@contextmanager
def masked(companion: PreTrainedModel, layer: SparseSwiGLU) -> Iterator[None]:
    """The companion's layer of the same number keeps as few channels as `layer`, chosen by an oracle."""
    block: Any = companion.model.layers[layer.layer]
    dense = block.mlp
    block.mlp = MaskedSwiGLU(dense, layer)
    try:
        yield
    finally:
        block.mlp = dense


def wider(layer: SparseSwiGLU, factor: float) -> int:
    """`factor` times the layer's channels per bank, rounded up; at most all."""
    return min(layer.bank_size, math.ceil(factor * layer.active_per_bank))


CHANGES: dict[str, Change] = {
    "dense": lambda layer: keep(layer, layer.bank_size),
    "1.5k": lambda layer: keep(layer, wider(layer, 1.5)),
    "2k": lambda layer: keep(layer, wider(layer, 2)),
    "oracle": oracle,
}
"""What the scan does to one layer of the sparse model; `k` is the layer's own."""


def find_layer(model: PreTrainedModel, layer: int) -> SparseSwiGLU:
    """The sparse layer of that number."""
    found = {sparse.layer: sparse for sparse in sparse_layers(model)}
    if layer not in found:
        raise ConfigError(f"layer {layer} is no sparse layer of this model; its sparse layers are {_ranges(found)}")
    return found[layer]


def check_sparse(model: PreTrainedModel) -> list[SparseSwiGLU]:
    """The sparse layers of a model; a dense one raises, and a control whose predictors choose nothing."""
    layers = sparse_layers(model)
    if not layers:
        raise ConfigError(
            f"model type {model.config.model_type!r} has no sparse layer to scan or repair; convert it with "
            "`bankwise upcycle`, or name the sparse checkpoint"
        )
    selection = layers[0].sparsity.selection
    if selection != "predictor":
        raise ConfigError(
            f"the model is a control, selection={selection!r}: its predictors choose nothing, so there is no routing "
            "to scan or repair; name the sparse checkpoint"
        )
    return layers


def _ranges(numbers: Any) -> str:
    ordered = sorted(numbers)
    if ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 2:
        return f"{ordered[0]}..{ordered[-1]}"
    return ", ".join(map(str, ordered))
