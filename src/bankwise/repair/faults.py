"""Damage to one layer of a healthy sparse model, for proofs that a scan finds it and a repair mends it.

Each function changes the model in place and touches one layer only.

Shapes: T leading dimensions (tokens), S positions, F channels, N banks, B channels per bank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bankwise.ffn import SparseSwiGLU
from bankwise.repair.banks import permute_layer
from bankwise.repair.changes import find_layer
from bankwise.repair.patch import set_active
from bankwise.repair.training_data import ffn_inputs
from bankwise.upcycle.permutation import permute_channels
from bankwise.upcycle.statistics import channel_values

_FEW = 4
Fault = Callable[[PreTrainedModel, int, int], None]
"""Takes a model, a layer and a seed."""


def _shuffle_in_banks(layer: SparseSwiGLU, seed: int) -> Tensor:
    """order_F: channels shuffled, each within its bank."""
    generator = torch.Generator().manual_seed(seed)
    banks = layer.gate_proj.out_features // layer.bank_size
    return torch.cat(
        [bank * layer.bank_size + torch.randperm(layer.bank_size, generator=generator) for bank in range(banks)]
    )


@torch.no_grad()
def scramble_predictor(model: PreTrainedModel, layer: int, seed: int) -> None:
    """Each channel gets the logit of another channel of its bank."""
    sparse = find_layer(model, layer)
    order_F, predictor = _shuffle_in_banks(sparse, seed), sparse.predictor
    vectors = [predictor.expand.weight, predictor.expand.bias]
    for vector in vectors + [getattr(predictor, name) for name in predictor.start_values()]:
        vector.copy_(vector[order_F])


@torch.no_grad()
def add_predictor_noise(model: PreTrainedModel, layer: int, seed: int) -> None:
    """The predictor's matrices get noise of three times their own size."""
    predictor = find_layer(model, layer).predictor
    generator = torch.Generator().manual_seed(seed)
    for weight in (predictor.reduce.weight, predictor.expand.weight):
        weight.add_(3 * weight.std() * torch.randn(weight.shape, generator=generator))


def keep_few(model: PreTrainedModel, layer: int, seed: int) -> None:
    """The layer keeps 4 channels of each bank."""
    set_active(model, find_layer(model, layer), _FEW)


def sort_banks(windows_WS: Tensor) -> Fault:
    """Channels stand in the order of their energy on `windows`, so that the strongest compete with each other."""

    def plant(model: PreTrainedModel, layer: int, seed: int) -> None:
        sparse = find_layer(model, layer)
        inputs_TD = ffn_inputs(model, layer, windows_WS, batch_tokens=4096).flatten(0, 1)
        permute_layer(sparse, channel_values(sparse, inputs_TD)[2].mean(dim=0).argsort(descending=True))

    return plant


@torch.no_grad()
def permute_banks(model: PreTrainedModel, layer: int, seed: int) -> None:
    """Channels are dealt anew into banks, and the predictor is not told: a bank layout that half of a file missed."""
    sparse = find_layer(model, layer)
    channels = sparse.gate_proj.out_features
    permute_channels(sparse, torch.randperm(channels, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def add_down_noise(model: PreTrainedModel, layer: int, seed: int) -> None:
    """The down projection gets noise of its own size; no choice of channels undoes that."""
    weight = find_layer(model, layer).down_proj.weight
    weight.add_(weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))


def scramble_late(first: int) -> Fault:
    """The predictor is scrambled from position `first` on: a band of lengths, with weights that show nothing."""

    def plant(model: PreTrainedModel, layer: int, seed: int) -> None:
        sparse = find_layer(model, layer)
        order_F = _shuffle_in_banks(sparse, seed)
        positions: list[Tensor] = []

        def see(_block: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
            positions[:] = [arguments["position_ids"]]

        def scramble(_predictor: nn.Module, inputs: tuple[Tensor, ...], logits_TF: Tensor) -> Tensor:
            is_of_block = positions and inputs[0].shape[1:2] == positions[0].shape[1:2]
            if not is_of_block:
                return logits_TF
            return torch.where((positions[0] >= first)[..., None], logits_TF[..., order_F], logits_TF)

        block: Any = model.model.layers[layer]
        block.register_forward_pre_hook(see, with_kwargs=True)
        sparse.predictor.register_forward_hook(scramble)

    return plant
