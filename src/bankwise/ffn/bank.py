"""Bank-wise selection: from router logits to the FFN channels that each token may use.

Pure tensor functions, no state. `bank_topk_mask` defines the routing rule; every kernel must select the same channels
for the same logits. No token's choice depends on another token.

Shapes: T any leading dimensions (tokens), F FFN channels, N banks (F / B), B channels per bank (`bank_size`),
        K active channels per bank (`active_per_bank`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bankwise.errors import ConfigError, RoutingError


class BankCut(NamedTuple):
    """The selection of one call: what was kept, and where each bank was cut."""

    mask_TF: Tensor
    """bool, exactly K true in each bank."""

    threshold_TN1: Tensor | None
    """Routing dtype, midpoint of the K-th and (K+1)-th largest logits; None when K = B (nothing is cut)."""


fast_cut: Callable[[Tensor, int, int], BankCut | None] | None = None
"""Set by `bankwise.kernels`: the same cut of (logits, bank_size, active_per_bank), or None where it cannot make it."""


def bank_topk_mask_reference(logits_TF: Tensor, *, bank_size: int = 64, active_per_bank: int = 16) -> Tensor:
    """mask_TF (bool) by a stable sort: the definition, slow and obvious (`method.md` section 2.3)."""
    logits_TNB = to_routing_dtype(logits_TF).unflatten(-1, (-1, bank_size))
    kept_TNK = logits_TNB.sort(dim=-1, descending=True, stable=True).indices[..., :active_per_bank]
    return torch.zeros_like(logits_TNB, dtype=torch.bool).scatter(-1, kept_TNK, True).flatten(-2)


def bank_topk_mask(logits: Tensor, *, bank_size: int = 64, active_per_bank: int = 16) -> Tensor:
    """Return the bool mask [..., F] of the `active_per_bank` largest logits in each bank of `bank_size` channels.

    Logits are compared in float32 (float64 logits as they are). Of equal logits the lower channel wins. Non-finite
    logits raise `RoutingError`, shapes that do not fit raise `ConfigError`.
    """
    if bank_size < 1 or logits.shape[-1] % bank_size or not 1 <= active_per_bank <= bank_size:
        raise ConfigError(
            f"cannot keep {active_per_bank} of every {bank_size} in {logits.shape[-1]} channels: bank_size must divide "
            "the channels, and active_per_bank must lie in 1..bank_size"
        )
    return cut_banks(logits, bank_size=bank_size, active_per_bank=active_per_bank).mask_TF


def cut_banks(logits_TF: Tensor, *, bank_size: int, active_per_bank: int) -> BankCut:
    """Mask and threshold of every bank from the K-th and (K+1)-th largest values, without sorting indices.

    Value selection promises no order among equals, so the mask comes from comparing with the K-th value, and a tie at
    the cut is filled from the lowest channel up. Equal to `bank_topk_mask_reference` on every input
    (tests/ffn/test_bank.py).
    """
    logits_TF = to_routing_dtype(logits_TF.detach())
    if fast_cut is not None and not torch.compiler.is_compiling():
        cut = fast_cut(logits_TF, bank_size, active_per_bank)
        if cut is not None:
            return cut
    _check_finite(logits_TF)
    if active_per_bank == bank_size:
        return BankCut(torch.ones_like(logits_TF, dtype=torch.bool), None)
    logits_TNB = logits_TF.unflatten(-1, (-1, bank_size))
    last_TN1, next_TN1 = values_at_cut(logits_TNB, active_per_bank)
    mask_TNB = logits_TNB >= last_TN1
    if _may_tie(last_TN1, next_TN1):
        above_TNB = logits_TNB > last_TN1
        room_TN1 = active_per_bank - above_TNB.sum(dim=-1, keepdim=True)
        equal_TNB = logits_TNB == last_TN1
        mask_TNB = above_TNB | (equal_TNB & (equal_TNB.cumsum(dim=-1) <= room_TN1))
    return BankCut(mask_TNB.flatten(-2), (last_TN1 + next_TN1) / 2)


def to_routing_dtype(values: Tensor) -> Tensor:
    """float32, the dtype of routing; float64 stays, so that gradients can be checked in double precision."""
    return values if values.dtype == torch.float64 else values.float()


def token_chunks(num_tokens: int, device: torch.device) -> Iterator[slice]:
    """Slices over the tokens for element-wise work on [T, F].

    On a CPU 256 tokens at a time stay in the cache: the gate's backward takes 1.3 ms instead of 6 ms for 1024 tokens of
    1536 channels (docs/research-log.md, "Cost of a training step"). Elsewhere one slice.
    """
    step = 256 if device.type == "cpu" and not torch.compiler.is_compiling() else max(1, num_tokens)
    for start in range(0, num_tokens, step):
        yield slice(start, start + step)


def values_at_cut(logits_TNB: Tensor, active_per_bank: int) -> tuple[Tensor, Tensor]:
    """K-th and (K+1)-th largest logits of each bank [T, N, 1], K < B."""
    if logits_TNB.device.type == "cpu" and not torch.compiler.is_compiling():
        # numpy sorts short rows of float32 with vector instructions: 1.6 ms for 1024 tokens of 1536 channels, where
        # torch.topk takes 13 ms on two cores (docs/research-log.md, "Cost of a training step").
        ascending_TNB = torch.from_numpy(np.sort(logits_TNB.numpy(), axis=-1))
        first = logits_TNB.shape[-1] - active_per_bank
        return ascending_TNB[..., first : first + 1], ascending_TNB[..., first - 1 : first]
    top_TNK1 = logits_TNB.topk(active_per_bank + 1, dim=-1).values
    return top_TNK1[..., -2:-1], top_TNK1[..., -1:]


def _may_tie(last_TN1: Tensor, next_TN1: Tensor) -> bool:
    # Ties at the cut are rare in float32, and on a CPU looking for them is far cheaper than always breaking them.
    # On an accelerator the look would stall the stream, and under compilation it would break the graph.
    if torch.compiler.is_compiling() or last_TN1.device.type != "cpu":
        return True
    return bool((last_TN1 == next_TN1).any())


def _check_finite(logits_TF: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if logits_TF.device.type != "cpu":
        torch._assert_async(logits_TF.isfinite().all(), "router logits are not finite")
        return
    # The sum is finite for all sane logits and costs one pass; only a suspicious sum pays for the exact look.
    if not logits_TF.sum().isfinite() and not logits_TF.isfinite().all():
        bad = int((~logits_TF.isfinite()).sum())
        raise RoutingError(
            f"{bad} of {logits_TF.numel()} router logits are not finite, so no channels can be chosen; "
            "the FFN input or the predictor weights hold NaN or infinity (lower the predictor learning rate, or resume "
            "from an earlier checkpoint)"
        )
