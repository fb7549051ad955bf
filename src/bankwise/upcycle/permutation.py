"""Dealing channels into banks: an exact re-ordering of the dense FFN (`method.md` section 3.2).

Banks are contiguous, so the order of the channels decides which 64 compete. Alike channels should be spread over banks.

Shapes: T sampled tokens, F channels, N banks, B channels per bank.
"""

import torch
from torch import Tensor

from bankwise.ffn import SparseSwiGLU

_SWAP_PROPOSALS = 4000


def bank_order(energy_TF: Tensor, *, bank_size: int, layout: str, seed: int) -> Tensor:
    """order_F (int64): new channel j is old channel order[j].

    `snake` deals the channels by falling mean energy, turning at each end. `coact` starts there and swaps channels
    between banks while that lowers the variance over tokens of the banks' energy shares.
    """
    num_channels = energy_TF.shape[-1]
    if layout == "none":
        return torch.arange(num_channels)
    generator = torch.Generator().manual_seed(seed)
    if layout == "random":
        return torch.randperm(num_channels, generator=generator)
    ranked_F = energy_TF.mean(dim=0).argsort(descending=True, stable=True)
    dealt_BN = ranked_F.view(bank_size, -1).clone()
    dealt_BN[1::2] = dealt_BN[1::2].flip(-1)
    order_NB = dealt_BN.T.contiguous()
    if layout == "coact":
        _spread_coactive(order_NB, energy_TF, generator)
    return order_NB.flatten()


def _spread_coactive(order_NB: Tensor, energy_TF: Tensor, generator: torch.Generator) -> None:
    share_TF = energy_TF.square()
    share_TF = share_TF / share_TF.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    bank_NT = share_TF.T[order_NB].sum(dim=1)
    num_banks, bank_size = order_NB.shape
    if num_banks < 2:
        return
    banks = torch.randint(num_banks, (_SWAP_PROPOSALS, 2), generator=generator).tolist()
    slots = torch.randint(bank_size, (_SWAP_PROPOSALS, 2), generator=generator).tolist()
    for (first, second), (i, j) in zip(banks, slots, strict=True):
        if first == second:
            continue
        moved_T = share_TF[:, order_NB[first, i]] - share_TF[:, order_NB[second, j]]
        new_first, new_second = bank_NT[first] - moved_T, bank_NT[second] + moved_T
        if new_first.var() + new_second.var() < bank_NT[first].var() + bank_NT[second].var():
            bank_NT[first], bank_NT[second] = new_first, new_second
            order_NB[first, i], order_NB[second, j] = order_NB[second, j].clone(), order_NB[first, i].clone()


@torch.no_grad()
def permute_channels(layer: SparseSwiGLU, order_F: Tensor) -> None:
    """Re-order the channels of the dense projections in place; the dense function stays the same."""
    for projection in (layer.gate_proj, layer.up_proj):
        projection.weight.data = projection.weight.data[order_F].contiguous()
        if projection.bias is not None:
            projection.bias.data = projection.bias.data[order_F].contiguous()
    layer.down_proj.weight.data = layer.down_proj.weight.data[:, order_F].contiguous()
