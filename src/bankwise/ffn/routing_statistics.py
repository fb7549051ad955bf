"""The figures that describe a layer's routing; evaluation and telemetry compute them here (`method.md` section 4.3).

Pure tensor functions. Recall and retained energy stand beside the loss that trains them, in `routing_loss`.

Shapes: T tokens, S adjacent tokens of one document, F FFN channels, N banks, B channels per bank.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bankwise.ffn.bank import bank_topk_mask, to_routing_dtype, values_at_cut
from bankwise.ffn.gates import bank_width

DEAD_RATE, ALWAYS_ON_RATE = 1e-4, 0.999
"""Channels that fewer, or more, than this share of the tokens keep are called dead, or always on."""


def global_topk_mask(energy_TF: Tensor, *, bank_size: int, active_per_bank: int) -> Tensor:
    """bool [T, F]: the largest channels of the whole layer, as many as the banks keep together (`oracle_global`)."""
    channels = energy_TF.shape[-1]
    return bank_topk_mask(
        energy_TF, bank_size=channels, active_per_bank=channels // bank_size * active_per_bank
    )  # fmt: skip


def boundary_margin(logits_TF: Tensor, *, bank_size: int, active_per_bank: int) -> Tensor:
    """(z_(k) - z_(k+1)) / std_b(z) of every bank [T, N]: how far the last kept channel is from the first dropped."""
    logits_TNB = to_routing_dtype(logits_TF.detach()).unflatten(-1, (-1, bank_size))
    last_TN1, next_TN1 = values_at_cut(logits_TNB, active_per_bank)
    return ((last_TN1 - next_TN1) / bank_width(logits_TNB - next_TN1, ste_tau=1.0)).squeeze(-1)


def low_quantile(values: Tensor, share: float) -> Tensor:
    """The smallest of the values that at least `share` of them do not exceed, a scalar."""
    return values.flatten().kthvalue(max(1, math.ceil(share * values.numel()))).values


def mask_churn(before_TF: Tensor, after_TF: Tensor) -> Tensor:
    """Share of the positions kept before that are not kept any more, a scalar."""
    return (before_TF & ~after_TF).sum() / before_TF.sum()


def adjacent_unions(mask_SF: Tensor, widths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """(n, channels that at least one of n adjacent tokens keeps [S - n + 1, F]) for each n that S allows.

    `widths` are 2, 4, 8 and so on: each the double of the one before.
    """
    union_SF = mask_SF
    for width in widths:
        if width > len(mask_SF):
            return
        union_SF = union_SF[: -(width // 2)] | union_SF[width // 2 :]
        yield width, union_SF


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


def dead_share(rate_F: Tensor) -> float:
    """Share of the channels that are dead. Over fewer than 1 / DEAD_RATE tokens: that no token keeps."""
    return (rate_F < DEAD_RATE).double().mean().item()


def always_on_share(rate_F: Tensor) -> float:
    """Share of the channels that are always on."""
    return (rate_F > ALWAYS_ON_RATE).double().mean().item()
