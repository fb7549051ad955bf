"""How the sparse layers of a model choose their channels: recall, retained energy, use, and what neighbours share.

One pass over the windows; only counts are kept. A window is one document: what is said about adjacent tokens never
crosses from one window to the next. Definitions: `method.md` section 4.3.

Shapes: W windows, S tokens of a window, T tokens of a chunk, D hidden, F FFN channels, N banks, B channels per bank.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from bankwise.data.positions import POSITION_BUCKETS, bucket_of
from bankwise.errors import ConfigError
from bankwise.ffn import SparseSwiGLU, sparse_layers
from bankwise.ffn.routing_counts import RoutingCounts
from bankwise.ffn.routing_statistics import usage_entropy
from bankwise.models.cost import token_cost
from bankwise.precision import bf16_autocast

_CHUNK = 1024  # tokens whose energies exist at one time; divides every border of the position buckets
_UNIONS = (2, 4, 8, 16, 32)
_USAGE_GROUPS = 64


@torch.no_grad()
def routing_statistics(
    model: PreTrainedModel, windows: Mapping[str, Tensor], *, batch_size: int = 4, bf16: bool = False
) -> dict[str, Any]:
    """The routing figures of a sparse model over token windows [W, S] of each source, as JSON values.

    None stands for what cannot be measured: the margin of a layer that keeps all its channels or has no predictor in
    use, a union of more tokens than a window has, the exact count of `stat_topk` and `oracle_global`, which have none.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ConfigError(
            f"model type {model.config.model_type!r} has no sparse layer, so there is no routing to measure"
        )
    counters = [_LayerCounter(layer) for layer in layers]
    was_training = model.training
    model.eval()  # training mode would move the running means
    try:
        for counter in counters:
            counter.attach()
        for windows_WS in windows.values():
            for batch_WS in windows_WS.split(batch_size):
                with bf16_autocast(model.device, enabled=bf16):
                    model.model(batch_WS.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for counter in counters:
            counter.detach()
    return _summary(model, counters)


def _summary(model: PreTrainedModel, counters: list["_LayerCounter"]) -> dict[str, Any]:
    num_layers = model.config.num_hidden_layers
    read = sum(counter.counts.rates().mean().item() for counter in counters) + num_layers - len(counters)
    active_fraction = read / num_layers
    cost = token_cost(model.config, dtype_bytes=model.dtype.itemsize, active_fraction=active_fraction)
    expected = [counter.layer.active_per_bank for counter in counters]
    is_exact = counters[0].is_exact
    return {
        "layers": [counter.figures() for counter in counters],
        "active_per_bank": {
            "expected": None if not is_exact else expected[0] if len(set(expected)) == 1 else expected,
            "violations": sum(counter.violations for counter in counters),
            "checked": sum(counter.checked for counter in counters),
        },
        "active_fraction": active_fraction,
        "bytes_per_token": {"dense": cost.dense_weight_bytes, "model": cost.weight_bytes},
        "flops_per_token": {"dense": cost.dense_flops, "model": cost.flops},
        "ffn_bytes_fraction": cost.ffn_bytes_fraction,
        "tokens": counters[0].counts.tokens,
    }


class _LayerCounter:
    """Counts of one layer while it is attached: every token that the layer reads is looked at."""

    def __init__(self, layer: SparseSwiGLU) -> None:
        self.layer = layer
        self.counts = RoutingCounts(layer, unions=_UNIONS)
        self.is_exact = layer.sparsity.gate_mode != "stat_topk" and layer.sparsity.selection != "oracle_global"
        self.checked = self.violations = 0
        self._hooks: list[Any] = []
        self._read_WSF: Tensor | None = None

    def attach(self) -> None:
        self._hooks = [
            self.layer.down_proj.register_forward_pre_hook(self._see_down),
            self.layer.register_forward_hook(self._see),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_down(self, _down: Any, arguments: tuple[Tensor]) -> None:
        self._read_WSF = arguments[0]

    def _see(self, layer: SparseSwiGLU, arguments: tuple[Tensor], _output: Tensor) -> None:
        assert self._read_WSF is not None
        for x_SD, read_SF in zip(arguments[0], self._read_WSF, strict=True):
            parts = zip(x_SD.split(_CHUNK), read_SF.split(_CHUNK), strict=True)
            masks = [self._count_chunk(x_TD, read_TF, place) for place, (x_TD, read_TF) in enumerate(parts)]
            self._count_neighbours(torch.cat(masks))
        self._read_WSF = None

    def _count_chunk(self, x_TD: Tensor, read_TF: Tensor, place: int) -> Tensor:
        """Count what concerns single tokens; return their masks."""
        layer = self.layer
        mask_TF = layer.active_mask(x_TD)
        energy_TF = layer.energy(layer.dense_activation(x_TD))
        logits_TF = layer.logits(x_TD) if layer.sparsity.selection == "predictor" else None
        self.counts.add_tokens(energy_TF, logits_TF, mask_TF, bucket_of(place * _CHUNK))
        if self.is_exact:
            self._check(mask_TF, read_TF)
        return mask_TF

    def _check(self, mask_TF: Tensor, read_TF: Tensor) -> None:
        """Every bank has exactly k active channels, and `down` got nothing from the others but their centre."""
        dropped = 0 if self.layer.sparsity.center == "off" else self.layer.center.to(read_TF.dtype)
        leaked_TF = ~mask_TF & (read_TF != dropped)
        banks = (-1, self.layer.bank_size)
        count_TN = mask_TF.unflatten(-1, banks).sum(dim=-1)
        wrong_TN = (count_TN != self.layer.active_per_bank) | leaked_TF.unflatten(-1, banks).any(dim=-1)
        self.checked += wrong_TN.numel()
        self.violations += int(wrong_TN.sum())

    def _count_neighbours(self, mask_SF: Tensor) -> None:
        """Count what concerns adjacent tokens of one window."""
        self.counts.add_neighbours(mask_SF)
        first_SF, next_SF = mask_SF[:-1], mask_SF[1:]
        self.counts.add("overlap", int((first_SF & next_SF).sum()), int(first_SF.sum()))

    def figures(self) -> dict[str, Any]:
        """The layer's entry under `layers`."""
        rate_F = self.counts.rates()
        ranked_F = rate_F.sort(descending=True).values
        return {
            "layer": self.layer.layer,
            **self.counts.figures(POSITION_BUCKETS),
            "overlap": self.counts.mean("overlap"),
            "usage_entropy": usage_entropy(rate_F),
            "usage": functional.adaptive_avg_pool1d(ranked_F[None], _USAGE_GROUPS)[0].tolist(),
        }
