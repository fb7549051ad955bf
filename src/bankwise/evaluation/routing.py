"""How the sparse layers of a model choose their channels: recall, retained energy, use, and what neighbours share.

One pass over the windows; only counts are kept. A window is one document: what is said about adjacent tokens never
crosses from one window to the next. Definitions: `method.md` section 4.3.

Shapes: W windows, S tokens of a window, T tokens of a chunk, D hidden, F FFN channels, N banks, B channels per bank.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import PreTrainedModel

from bankwise.data.positions import POSITION_BUCKETS
from bankwise.errors import ConfigError
from bankwise.ffn import SparseSwiGLU, bank_topk_mask, channel_energy, channel_recall, retained_energy, sparse_layers
from bankwise.models.cost import token_cost

_CHUNK = 1024  # tokens whose energies exist at one time; divides every border of the position buckets
_UNIONS = (2, 4, 8, 16, 32)  # each the double of the one before
_DEAD_RATE, _ALWAYS_RATE = 1e-4, 0.999
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
                with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                    model.model(batch_WS.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        for counter in counters:
            counter.detach()
    return _summary(model, counters)


def _summary(model: PreTrainedModel, counters: list["_LayerCounter"]) -> dict[str, Any]:
    num_layers = model.config.num_hidden_layers
    read = sum(counter.rates().mean().item() for counter in counters) + num_layers - len(counters)
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
        "tokens": counters[0].tokens,
    }


class _LayerCounter:
    """Counts of one layer while it is attached: every token that the layer reads is looked at."""

    def __init__(self, layer: SparseSwiGLU) -> None:
        self.layer = layer
        self.is_exact = layer.sparsity.gate_mode != "stat_topk" and layer.sparsity.selection != "oracle_global"
        self.tokens = self.checked = self.violations = 0
        self.kept_F = torch.zeros(layer.gate_proj.out_features, dtype=torch.long)
        self.totals: dict[str, float] = defaultdict(float)
        """Totals over tokens, by name."""
        self.counts: dict[str, int] = defaultdict(int)
        """What each total is divided by."""
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
        center_F = None if layer.sparsity.center == "off" else layer.center
        energy_TF = channel_energy(layer.dense_activation(x_TD), layer.down_proj.weight, center_F)
        cut = {"bank_size": layer.bank_size, "active_per_bank": layer.active_per_bank}
        oracle_TF = bank_topk_mask(energy_TF, **cut)
        channels = mask_TF.shape[-1]
        kept = channels // layer.bank_size * layer.active_per_bank
        global_TF = bank_topk_mask(energy_TF, bank_size=channels, active_per_bank=kept)

        tokens = len(x_TD)
        self.tokens += tokens
        self.kept_F += mask_TF.sum(dim=0).cpu()
        recall = channel_recall(mask_TF, oracle_TF).item()
        self._add("recall", recall * tokens, tokens)
        self._add(_bucket(place * _CHUNK), recall * tokens, tokens)
        for name, chosen_TF in (("", mask_TF), ("_oracle", oracle_TF), ("_global", global_TF)):
            self._add(f"retained_energy{name}", retained_energy(energy_TF, chosen_TF).item() * tokens, tokens)
        if layer.active_per_bank < layer.bank_size and layer.sparsity.selection == "predictor":
            self._add("margin", _margin(layer.logits(x_TD), layer).item() * tokens, tokens)
        if self.is_exact:
            self._check(mask_TF, read_TF, center_F)
        return mask_TF

    def _check(self, mask_TF: Tensor, read_TF: Tensor, center_F: Tensor | None) -> None:
        """Every bank has exactly k active channels, and `down` got nothing from the others but their centre."""
        leaked_TF = ~mask_TF & (read_TF != (0 if center_F is None else center_F.to(read_TF.dtype)))
        banks = (-1, self.layer.bank_size)
        count_TN = mask_TF.unflatten(-1, banks).sum(dim=-1)
        wrong_TN = (count_TN != self.layer.active_per_bank) | leaked_TF.unflatten(-1, banks).any(dim=-1)
        self.checked += wrong_TN.numel()
        self.violations += int(wrong_TN.sum())

    def _count_neighbours(self, mask_SF: Tensor) -> None:
        """Count what concerns adjacent tokens of one window."""
        first_SF, next_SF = mask_SF[:-1], mask_SF[1:]
        self._add("overlap", int((first_SF & next_SF).sum()), int(first_SF.sum()))
        for width, union_SF in _unions(mask_SF):
            self._add(f"union {width}", int(union_SF.sum()), union_SF.numel())

    def _add(self, name: str, total: float, count: int) -> None:
        self.totals[name] += total
        self.counts[name] += count

    def _mean(self, name: str) -> float | None:
        return self.totals[name] / self.counts[name] if self.counts[name] else None

    def rates(self) -> Tensor:
        """Share of the tokens that keep each channel, float64 [F]."""
        return self.kept_F.double() / self.tokens

    def figures(self) -> dict[str, Any]:
        """The layer's entry under `layers`."""
        rate_F = self.rates()
        ranked_F = rate_F.sort(descending=True).values
        means = ("recall", "retained_energy", "retained_energy_oracle", "retained_energy_global", "overlap", "margin")
        return {
            "layer": self.layer.layer,
            **{name: self._mean(name) for name in means},
            "usage_entropy": usage_entropy(rate_F),
            "usage_gini": usage_gini(rate_F),
            "dead": (rate_F < _DEAD_RATE).double().mean().item(),
            "always_on": (rate_F > _ALWAYS_RATE).double().mean().item(),
            "union": {str(width): self._mean(f"union {width}") for width in _UNIONS},
            "recall_by_position": {name: self._mean(name) for name in POSITION_BUCKETS if self.counts[name]},
            "usage": functional.adaptive_avg_pool1d(ranked_F[None], _USAGE_GROUPS)[0].tolist(),
        }


def usage_entropy(rate_F: Tensor) -> float:
    """Entropy of the channels' shares of all choices over its maximum: 1 when all are chosen equally often."""
    share_F = rate_F / rate_F.sum()
    return -torch.xlogy(share_F, share_F).sum().item() / math.log(len(share_F))


def usage_gini(rate_F: Tensor) -> float:
    """Gini coefficient of the rates: 0 when all channels are chosen equally often, near 1 when few are chosen."""
    ascending_F = rate_F.sort().values
    count = len(rate_F)
    weight_F = 2 * torch.arange(1, count + 1, device=rate_F.device) - count - 1
    return ((weight_F * ascending_F).sum() / (count * ascending_F.sum())).item()


def _margin(logits_TF: Tensor, layer: SparseSwiGLU) -> Tensor:
    """Mean over banks of (z_(k) - z_(k+1)) / std_b(z): how far the last chosen channel is from the first dropped."""
    mask_TF = bank_topk_mask(logits_TF, bank_size=layer.bank_size, active_per_bank=layer.active_per_bank)
    last_TN = logits_TF.masked_fill(~mask_TF, float("inf")).unflatten(-1, (-1, layer.bank_size)).amin(dim=-1)
    next_TN = logits_TF.masked_fill(mask_TF, float("-inf")).unflatten(-1, (-1, layer.bank_size)).amax(dim=-1)
    std_TN = logits_TF.unflatten(-1, (-1, layer.bank_size)).std(dim=-1, correction=0)
    return ((last_TN - next_TN) / std_TN.clamp_min(1e-12)).mean()


def _unions(mask_SF: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(n, channels that at least one of n adjacent tokens keeps [S - n + 1, F]) while the window is long enough."""
    union_SF = mask_SF
    for width in _UNIONS:
        if width > len(mask_SF):
            return
        union_SF = union_SF[: -(width // 2)] | union_SF[width // 2 :]
        yield width, union_SF


def _bucket(position: int) -> str:
    return next(name for name, (_, end) in POSITION_BUCKETS.items() if position < end)
