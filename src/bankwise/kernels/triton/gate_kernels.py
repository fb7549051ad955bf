"""The kernels of `bankwise.kernels.triton.gate`: one program for M banks, one pass over the activation and the logits.

Shapes: T tokens, F channels, N banks of B channels (padded to BLOCK_B in a program), K active per bank; a row is one
        bank of one token.
"""

import triton
import triton.language as tl

from bankwise.kernels.triton.selection import is_finite, keep_largest, logits_of, order_keys


@triton.jit
def gate_forward_kernel(
    h_TF, logits_TF, gated_TF, words_TN, threshold_TN, width_TN, num_rows, tau,
    B: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_B = tl.arange(0, BLOCK_B)
    is_row_M = rows_M < num_rows
    is_real_MB = is_row_M[:, None] & (channels_B[None, :] < B)
    places_MB = rows_M[:, None] * B + channels_B[None, :]
    logits_MB = tl.load(logits_TF + places_MB, mask=is_real_MB, other=0.0)
    tl.device_assert(is_finite(logits_MB), "bankwise: router logits are not finite")
    h_MB = tl.load(h_TF + places_MB, mask=is_real_MB, other=0.0)
    if K == B:
        mask_MB = is_real_MB
    else:
        keys_MB = tl.where(is_real_MB, order_keys(logits_MB), 0)
        mask_MB, kth_M, next_M = keep_largest(keys_MB, K)
        threshold_M = (logits_of(kth_M) + logits_of(next_M)) * 0.5
        from_cut_MB = tl.where(is_real_MB, logits_MB - threshold_M[:, None], 0.0)
        mean_M = tl.sum(from_cut_MB, axis=1) / B
        moved_MB = tl.where(is_real_MB, from_cut_MB - mean_M[:, None], 0.0)
        variance_M = tl.sum(moved_MB * moved_MB, axis=1) / B
        width_M = tau * tl.sqrt(tl.maximum(variance_M, 1e-12))
        tl.store(threshold_TN + rows_M, threshold_M, mask=is_row_M)
        tl.store(width_TN + rows_M, width_M, mask=is_row_M)
    # Each bit is set once, so that the sum is the word.
    words_M = tl.sum(mask_MB.to(tl.int64) << channels_B[None, :].to(tl.int64), axis=1)
    tl.store(words_TN + rows_M, words_M, mask=is_row_M)
    tl.store(gated_TF + places_MB, tl.where(mask_MB, h_MB, 0.0), mask=is_real_MB)


@triton.jit
def gate_backward_kernel(
    dy_TF, h_TF, logits_TF, words_TN, threshold_TN, width_TN, dh_TF, dz_TF, num_rows, alpha,
    B: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, WITH_DH: tl.constexpr, WITH_DZ: tl.constexpr,
):  # fmt: skip
    rows_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels_B = tl.arange(0, BLOCK_B)
    is_row_M = rows_M < num_rows
    is_real_MB = is_row_M[:, None] & (channels_B[None, :] < B)
    places_MB = rows_M[:, None] * B + channels_B[None, :]
    dy_MB = tl.load(dy_TF + places_MB, mask=is_real_MB, other=0.0)
    if WITH_DH:
        words_M = tl.load(words_TN + rows_M, mask=is_row_M, other=0)
        mask_MB = ((words_M[:, None] >> channels_B[None, :].to(tl.int64)) & 1) != 0
        tl.store(dh_TF + places_MB, tl.where(mask_MB, dy_MB, 0.0), mask=is_real_MB)
    if WITH_DZ:
        h_MB = tl.load(h_TF + places_MB, mask=is_real_MB, other=0.0).to(tl.float32)
        logits_MB = tl.load(logits_TF + places_MB, mask=is_real_MB, other=0.0)
        threshold_M = tl.load(threshold_TN + rows_M, mask=is_row_M, other=0.0)
        width_M = tl.load(width_TN + rows_M, mask=is_row_M, other=1.0)
        p_MB = tl.sigmoid((logits_MB - threshold_M[:, None]) / width_M[:, None])
        slope_MB = alpha * (1 - p_MB) * p_MB / width_M[:, None]
        tl.store(dz_TF + places_MB, slope_MB * (h_MB * dy_MB.to(tl.float32)), mask=is_real_MB)
