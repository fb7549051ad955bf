"""The auxiliary routing loss: how far the router's logits are from the channels' true contributions.

Shapes: T tokens, D hidden, F FFN channels, N banks, B channels per bank.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from bankwise.ffn.bank import bank_topk_mask, to_routing_dtype


@torch.no_grad()
def channel_energy(h_TF: Tensor, down_DF: Tensor, center_F: Tensor | None = None) -> Tensor:
    """e_TF = |h - c| * ||Wd[:, i]||, in the routing dtype: the norm of what a channel adds to the output.

    The one definition that the oracle, the targets and the telemetry share (`method.md` section 2.1).
    """
    moved_TF = to_routing_dtype(h_TF)
    if center_F is not None:
        moved_TF = moved_TF - to_routing_dtype(center_F)
    # Squares and their sum: `norm` over rows takes ten times as long on a CPU.
    return moved_TF.abs() * to_routing_dtype(down_DF).square().sum(dim=0).sqrt()


def channel_recall(mask_TF: Tensor, oracle_TF: Tensor) -> Tensor:
    """Share of the oracle's channels that the mask keeps, a scalar (`method.md` section 4.3)."""
    return (mask_TF & oracle_TF).sum() / oracle_TF.sum()


def retained_energy(energy_TF: Tensor, mask_TF: Tensor) -> Tensor:
    """Share of a token's squared contribution energy that the mask keeps, mean over tokens (`method.md` 4.3)."""
    total_T = energy_TF.square().sum(dim=-1).clamp_min(1e-30)
    return ((energy_TF * mask_TF).square().sum(dim=-1) / total_T).mean()


def routing_loss(
    logits_TF: Tensor,
    energy_TF: Tensor,
    *,
    bank_size: int,
    active_per_bank: int,
    kind: str = "kl",
    selected_TF: Tensor | None = None,
) -> Tensor:
    """Scalar mean over tokens and banks, in nats (`method.md` section 4.1).

    `kl`: KL(q || softmax(z)) in each bank, q the channels' shares of the bank's squared energy. Unlike a regression on
    log energy, its gradient weights channels by their energy.
    `bce`: binary cross entropy of z, cut at the bank's boundary, against the oracle's mask; mean over channels.
    `selected_TF` restricts the loss to these channels (`pred_scope: selected`).
    """
    logits_TNB = to_routing_dtype(logits_TF).unflatten(-1, (-1, bank_size))
    energy_TNB = energy_TF.detach().unflatten(-1, (-1, bank_size))
    keep_TNB = None if selected_TF is None else selected_TF.unflatten(-1, (-1, bank_size))
    if kind == "bce":
        oracle_TNB = bank_topk_mask(energy_TF, bank_size=bank_size, active_per_bank=active_per_bank).unflatten(
            -1, (-1, bank_size)
        )
        boundary_TN1 = logits_TNB.detach().kthvalue(bank_size - active_per_bank + 1, dim=-1, keepdim=True).values
        return functional.binary_cross_entropy_with_logits(
            logits_TNB - boundary_TN1,
            oracle_TNB.to(logits_TNB.dtype),
            weight=None if keep_TNB is None else keep_TNB.to(logits_TNB.dtype),
        )
    share_TNB = energy_TNB.square()
    if keep_TNB is not None:
        share_TNB = share_TNB * keep_TNB
        logits_TNB = logits_TNB.masked_fill(~keep_TNB, float("-inf"))
    share_TNB = share_TNB / share_TNB.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    log_p_TNB = torch.log_softmax(logits_TNB, dim=-1)
    if keep_TNB is not None:
        log_p_TNB = log_p_TNB.masked_fill(~keep_TNB, 0.0)
    # A share of 0 adds 0; torch.xlogy, which says so, is not vectorised.
    log_share_TNB = share_TNB.clamp_min(1e-38).log()
    return (share_TNB * (log_share_TNB - log_p_TNB)).sum(dim=-1).mean()
