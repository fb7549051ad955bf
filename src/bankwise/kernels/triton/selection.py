"""Bank top-K inside a kernel: the rule of `bankwise.ffn.bank` on integer keys, without a sort.

float32 logits become unsigned integers of the same order (-0.0 and +0.0 give one key), so that comparisons are exact
and total for every bit pattern. Of equal keys the lower channel wins. Two forms with the same answer: `keep_largest`
settles the K-th key bit by bit for many banks at once; `rank_in_bank` compares all pairs of one bank, which takes more
operations and far fewer steps in a row.

Shapes: M banks of one program, B channels per bank padded to a power of two, K active per bank.
"""

import triton
import triton.language as tl


@triton.jit
def order_keys(logits):
    """uint32 keys in the order of the float32 logits."""
    bits = logits.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def logits_of(keys):
    """The float32 logits that `order_keys` made these keys of."""
    bits = tl.where(keys >= 0x80000000, keys ^ 0x80000000, keys ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_finite(logits):
    """Neither NaN nor infinite, by the exponent's bits: no mode of the arithmetic can optimise it away."""
    return (logits.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def keep_largest(keys_MB, K: tl.constexpr):
    """mask_MB of the K largest keys of each row, and [M] the K-th and the (K+1)-th largest key.

    Padding must hold key 0, below the key of every finite logit.
    """
    kth_M = tl.zeros([keys_MB.shape[0]], tl.uint32)
    for step in range(32):
        candidate_M = kth_M | (tl.full([], 0x80000000, tl.uint32) >> step)
        reached_M = tl.sum((keys_MB >= candidate_M[:, None]).to(tl.int32), axis=1)
        kth_M = tl.where(reached_M >= K, candidate_M, kth_M)
    above_MB = (keys_MB > kth_M[:, None]).to(tl.int32)
    equal_MB = (keys_MB == kth_M[:, None]).to(tl.int32)
    num_above_M = tl.sum(above_MB, axis=1)
    room_M = K - num_above_M
    mask_MB = (above_MB != 0) | ((equal_MB != 0) & (tl.cumsum(equal_MB, axis=1) <= room_M[:, None]))
    below_M = tl.max(tl.where(keys_MB < kth_M[:, None], keys_MB, 0), axis=1)
    next_M = tl.where(num_above_M + tl.sum(equal_MB, axis=1) > K, kth_M, below_M)
    return mask_MB, kth_M, next_M


@triton.jit
def rank_in_bank(keys_B):
    """int32 [B]: how many channels of the bank come before each one."""
    places_B = tl.arange(0, keys_B.shape[0])
    ahead_BB = keys_B[None, :] > keys_B[:, None]
    tied_BB = (keys_B[None, :] == keys_B[:, None]) & (places_B[None, :] < places_B[:, None])
    return tl.sum((ahead_BB | tied_BB).to(tl.int32), axis=1)
