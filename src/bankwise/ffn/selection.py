"""Selections without a predictor: scores whose bank top-k are the channels of an oracle or of a random draw.

Every selection is one rule, top-k of a score in banks; only the score and the banks differ. Nothing is stored: random
scores follow from the seed and the layer's number, and from the token itself where they are drawn per token. So a mask
is a function of the layer's input alone, the same in training, under activation recomputation, in any batch, with a
cache, and after loading. Tensor parallelism is not for these controls, which look at a whole layer.

Shapes: T leading dimensions (tokens), D hidden, F FFN channels.
"""

import torch
from torch import Tensor

from bankwise.config.sparsity import SparsityConfig

_SCORE_BITS = 24  # what a float32 holds exactly
_TOKENS_AT_ONCE = 1024  # of which the 64-bit hashes [T, F] exist at one time


def bank_rule(sparsity: SparsityConfig, channels: int, active_per_bank: int) -> dict[str, int]:
    """`bank_size` and `active_per_bank` that this selection's scores are cut with.

    `oracle_global` has one bank, the whole layer, of which it keeps as many channels as the banks together.
    """
    if sparsity.selection == "oracle_global":
        return {"bank_size": channels, "active_per_bank": channels // sparsity.bank_size * active_per_bank}
    return {"bank_size": sparsity.bank_size, "active_per_bank": active_per_bank}


@torch.no_grad()
def random_scores(sparsity: SparsityConfig, layer: int, x_TD: Tensor, channels: int) -> Tensor:
    """float32 [T, F], uniform in [0, 1): of `random_fixed` the same for every token, of `random_per_token` by its x.

    A token counts by the signs of its D inputs. They survive the rounding that another batch shape brings, which would
    change every bit of a hash of the values, and hardly two tokens of a text share all of them.
    """
    channel_F, sign_D = _hash_keys(sparsity.selection_seed, layer, (channels, x_TD.shape[-1]), x_TD.device)
    if sparsity.selection == "random_fixed":
        return hash_scores(torch.zeros_like(channel_F[0]), channel_F).expand(*x_TD.shape[:-1], channels)
    parts = [
        hash_scores(torch.where(part_TD > 0, sign_D, 0).sum(dim=-1), channel_F)
        for part_TD in x_TD.reshape(-1, x_TD.shape[-1]).split(_TOKENS_AT_ONCE)
    ]
    return torch.cat(parts).view(*x_TD.shape[:-1], channels)


def hash_scores(key_T: Tensor, channel_F: Tensor) -> Tensor:
    """float32 [T, F], uniform in [0, 1): a hash of each pair of token key and channel key, both int64."""
    bits_TF = mixed_bits(key_T[..., None] ^ channel_F)
    return _shifted(bits_TF, 64 - _SCORE_BITS).float() / 2**_SCORE_BITS


def mixed_bits(values: Tensor) -> Tensor:
    """int64: the finaliser of SplitMix64, every bit of the result depends on every bit of the value."""
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _hash_keys(seed: int, layer: int, counts: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A random int64 for each channel and for each input of a layer."""
    salt = mixed_bits(torch.full((), seed, dtype=torch.int64, device=device))
    keys = mixed_bits(torch.arange(sum(counts), device=device) ^ mixed_bits(salt ^ layer))
    channel_F, sign_D = keys.split(counts)
    return channel_F, sign_D


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
