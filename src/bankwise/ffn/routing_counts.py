"""Running totals of one layer's routing figures: what evaluation and telemetry both report, counted in one way.

Tokens come in chunks, so that nothing of the size of a whole window has to exist but its mask.

Shapes: T tokens of a chunk, S tokens of a window, F FFN channels, N banks.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bankwise.ffn.bank import bank_topk_mask
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.ffn.routing_loss import channel_recall, retained_energy
from bankwise.ffn.routing_statistics import (
    adjacent_unions,
    always_on_share,
    boundary_margin,
    dead_share,
    global_topk_mask,
    low_quantile,
    usage_gini,
)

LOW_SHARE = 0.05
"""Share of the margins that `margin_p5` bounds from above."""


class RoutingCounts:
    """Totals of one layer. `unions` are the numbers of adjacent tokens whose distinct channels are counted."""

    def __init__(self, layer: SparseSwiGLU, *, unions: Sequence[int], keeps_margins: bool = False) -> None:
        self.layer = layer
        self.unions = unions
        self.tokens = 0
        self.kept_F = torch.zeros(layer.gate_proj.out_features, dtype=torch.long)
        self._margins_TN: list[Tensor] | None = [] if keeps_margins else None
        self._totals: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add_tokens(self, energy_TF: Tensor, logits_TF: Tensor | None, mask_TF: Tensor, bucket: str) -> None:
        """Count what concerns single tokens; all of them lie in the position bucket `bucket`.

        `logits_TF` is None where no predictor chooses: there is no margin then.
        """
        cut = {"bank_size": self.layer.bank_size, "active_per_bank": self.layer.active_per_bank}
        oracle_TF = bank_topk_mask(energy_TF, **cut)
        tokens = len(mask_TF)
        self.tokens += tokens
        self.kept_F += mask_TF.sum(dim=0).cpu()
        recall = channel_recall(mask_TF, oracle_TF).item()
        self.add("recall", recall * tokens, tokens)
        self.add(f"recall {bucket}", recall * tokens, tokens)
        choices = {"": mask_TF, "_oracle": oracle_TF, "_global": global_topk_mask(energy_TF, **cut)}
        for name, chosen_TF in choices.items():
            self.add(f"retained_energy{name}", retained_energy(energy_TF, chosen_TF).item() * tokens, tokens)
        if logits_TF is not None and self.layer.active_per_bank < self.layer.bank_size:
            margin_TN = boundary_margin(logits_TF, **cut)
            self.add("margin", margin_TN.mean().item() * tokens, tokens)
            if self._margins_TN is not None:
                self._margins_TN.append(margin_TN)

    def add_neighbours(self, mask_SF: Tensor) -> None:
        """Count what concerns the adjacent tokens of one window."""
        for width, union_SF in adjacent_unions(mask_SF, self.unions):
            self.add(f"union {width}", int(union_SF.sum()), union_SF.numel())

    def add(self, name: str, total: float, count: int) -> None:
        """Add to a mean of the caller's own."""
        self._totals[name] += total
        self._counts[name] += count

    def mean(self, name: str) -> float | None:
        """Mean of what was added under `name`; None where nothing was."""
        return self._totals[name] / self._counts[name] if self._counts[name] else None

    def rates(self) -> Tensor:
        """Share of the tokens that keep each channel, float64 [F]."""
        return self.kept_F.double() / self.tokens

    def figures(self, buckets: Iterable[str]) -> dict[str, Any]:
        """The layer's means; None is what cannot be measured, as the margin of a layer that keeps all channels."""
        names = ("recall", "retained_energy", "retained_energy_oracle", "retained_energy_global", "margin")
        return {
            **{name: self.mean(name) for name in names},
            **usage_figures(self.rates()),
            "union": {str(width): self.mean(f"union {width}") for width in self.unions},
            "recall_by_position": {
                name: self.mean(f"recall {name}") for name in buckets if self._counts[f"recall {name}"]
            },
        }

    def low_margin(self) -> float | None:
        """The margin that 5 % of the tokens and banks do not exceed; None where margins were not kept, or have none."""
        return low_quantile(torch.cat(self._margins_TN), LOW_SHARE).item() if self._margins_TN else None


def usage_figures(rate_F: Tensor) -> dict[str, float]:
    """How evenly the channels are chosen, from the share of the tokens that keep each."""
    return {"usage_gini": usage_gini(rate_F), "dead": dead_share(rate_F), "always_on": always_on_share(rate_F)}
