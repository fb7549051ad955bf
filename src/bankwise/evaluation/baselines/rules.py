"""Which channels each training-free baseline reads: pure functions of one token's activations.

No token's mask depends on another token, so padding, batches and caches change nothing.

Shapes: T any leading dimensions (tokens), D hidden, F FFN channels, A the width of any activation.
"""

import torch.nn.functional as functional
from torch import Tensor

from bankwise.ffn import bank_topk_mask, channel_energy
from bankwise.ffn.bank import to_routing_dtype
from bankwise.ffn.selection import hash_scores, mixed_bits


def cats_mask(gate_TF: Tensor, *, threshold: float) -> Tensor:
    """bool [T, F]: |silu(gate)| is at least the layer's threshold (CATS, arXiv 2404.08763)."""
    return keep_large(functional.silu(gate_TF), threshold=threshold)


def keep_large(values_TA: Tensor, *, threshold: float) -> Tensor:
    """bool [T, A]: the magnitude is at least `threshold`, compared in float32."""
    return to_routing_dtype(values_TA).abs() >= threshold


def oracle_bank_mask(h_TF: Tensor, down_DF: Tensor, *, bank_size: int, active_per_bank: int) -> Tensor:
    """bool [T, F]: the channels of each bank that add most to the output; needs the dense activation h."""
    return bank_topk_mask(channel_energy(h_TF, down_DF), bank_size=bank_size, active_per_bank=active_per_bank)


def oracle_global_mask(h_TF: Tensor, down_DF: Tensor, *, kept: int) -> Tensor:
    """bool [T, F]: the `kept` channels of the whole layer that add most to the output."""
    return oracle_bank_mask(h_TF, down_DF, bank_size=h_TF.shape[-1], active_per_bank=kept)


def random_token_mask(key_T: Tensor, channel_F: Tensor, *, bank_size: int, active_per_bank: int) -> Tensor:
    """bool [T, F]: random channels of each bank, drawn afresh for each token key; both arguments are int64."""
    return bank_topk_mask(hash_scores(key_T, channel_F), bank_size=bank_size, active_per_bank=active_per_bank)


def token_keys(ids_T: Tensor, position_T: Tensor) -> Tensor:
    """int64 [T]: one number for each token id and place in its text."""
    return mixed_bits(ids_T.long() ^ (position_T.long() << 32))
