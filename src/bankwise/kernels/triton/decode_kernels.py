"""The kernels of `bankwise.kernels.triton.decode`. The first index of every grid is the token, so that programs that
read the same weights for different tokens run side by side.

Shapes: T tokens, D hidden, F channels, N banks of B channels (padded to BLOCK_B in a program), K active per bank,
        A = N K active channels, R predictor rank, P a padded row of the packed weights, S shares of the channels.
"""

import triton
import triton.language as tl

from bankwise.kernels.triton.selection import is_finite, order_keys, rank_in_bank


@triton.jit
def reduce_kernel(
    x_TD, reduce_RD, code_TR, D, R, x_stride, reduce_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = tl.program_id(0)
    rows_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns_D = tl.arange(0, BLOCK_D)
    sums_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        is_column_D = start + columns_D < D
        x_D = tl.load(x_TD + token * x_stride + start + columns_D, mask=is_column_D, other=0.0).to(tl.float32)
        places_RD = rows_R[:, None].to(tl.int64) * reduce_stride + start + columns_D[None, :]
        weight_RD = tl.load(reduce_RD + places_RD, mask=(rows_R < R)[:, None] & is_column_D[None, :], other=0.0)
        sums_RD += weight_RD.to(tl.float32) * x_D[None, :]
    tl.store(code_TR + token * R + rows_R, tl.sum(sums_RD, axis=1), mask=rows_R < R)


@triton.jit
def _expand(code_R, expand_FR, channels_B, is_real_B, first, last, stride, BLOCK_R: tl.constexpr):
    """float32 [B]: columns first..last of V times the code."""
    columns_R = tl.arange(0, BLOCK_R)
    sums_BR = tl.zeros([channels_B.shape[0], BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_R):
        is_column_R = start + columns_R < last
        code = tl.load(code_R + start + columns_R, mask=is_column_R, other=0.0)
        places_BR = channels_B[:, None].to(tl.int64) * stride + start + columns_R[None, :]
        weight_BR = tl.load(expand_FR + places_BR, mask=is_real_B[:, None] & is_column_R[None, :], other=0.0)
        sums_BR += weight_BR.to(tl.float32) * code[None, :]
    return tl.sum(sums_BR, axis=1)


@triton.jit
def _log_energy(value_B, log_noise_F, channels_B, is_real_B):
    """log(value^2 + noise variance)."""
    log_noise_B = tl.load(log_noise_F + channels_B, mask=is_real_B, other=0.0).to(tl.float32)
    return tl.log(value_B * value_B + tl.exp(log_noise_B))


@triton.jit
def select_kernel(
    code_TR, expand_FR, bias_F, gate_offset_F, up_offset_F, gate_log_noise_F, up_log_noise_F,
    active_TA, bad_TN, logits_TF, R, N, expand_stride,
    B: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, GATED: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    bank = tl.program_id(1)
    places_B = tl.arange(0, BLOCK_B)
    is_real_B = places_B < B
    channels_B = bank * B + places_B
    code_R = code_TR + token * R
    bias_B = tl.load(bias_F + channels_B, mask=is_real_B, other=0.0).to(tl.float32)
    if GATED:
        half = R // 2
        gate_B = _expand(code_R, expand_FR, channels_B, is_real_B, 0, half, expand_stride, BLOCK_R)
        gate_B += tl.load(gate_offset_F + channels_B, mask=is_real_B, other=0.0).to(tl.float32)
        up_B = _expand(code_R, expand_FR, channels_B, is_real_B, half, R, expand_stride, BLOCK_R)
        up_B += tl.load(up_offset_F + channels_B, mask=is_real_B, other=0.0).to(tl.float32)
        log_sigmoid_B = tl.minimum(gate_B, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(gate_B)))
        logits_B = _log_energy(gate_B, gate_log_noise_F, channels_B, is_real_B) + 2.0 * log_sigmoid_B
        logits_B = logits_B + _log_energy(up_B, up_log_noise_F, channels_B, is_real_B) + bias_B
    else:
        logits_B = _expand(code_R, expand_FR, channels_B, is_real_B, 0, R, expand_stride, BLOCK_R) + bias_B
    if KEEP_LOGITS:
        tl.store(logits_TF + token.to(tl.int64) * N * B + channels_B, logits_B, mask=is_real_B)
    is_bad_B = is_real_B & ~is_finite(logits_B)
    tl.store(bad_TN + token * N + bank, tl.sum(is_bad_B.to(tl.int32), axis=0))
    # Keys order every bit pattern, so that exactly K channels follow even from logits that are not finite.
    rank_B = rank_in_bank(tl.where(is_real_B, order_keys(logits_B), 0))
    tl.store(active_TA + (token * N + bank) * K + rank_B, channels_B, mask=is_real_B & (rank_B < K))


@triton.jit
def activate_kernel(
    x_TD, packed_F3P, active_TA, gate_bias_F, up_bias_F, h_TA, A, D, x_stride, P,
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    entries_A = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    is_entry_A = entries_A < A
    channels_A = tl.load(active_TA + token * A + entries_A, mask=is_entry_A, other=0)
    rows_A = packed_F3P + channels_A.to(tl.int64) * (3 * P)
    columns_D = tl.arange(0, BLOCK_D)
    gate_AD = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    up_AD = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        is_column_D = start + columns_D < D
        is_read_AD = is_entry_A[:, None] & is_column_D[None, :]
        x_D = tl.load(x_TD + token * x_stride + start + columns_D, mask=is_column_D, other=0.0).to(tl.float32)
        places_AD = rows_A[:, None] + (start + columns_D)[None, :]
        gate_AD += tl.load(places_AD, mask=is_read_AD, other=0.0).to(tl.float32) * x_D[None, :]
        up_AD += tl.load(places_AD + P, mask=is_read_AD, other=0.0).to(tl.float32) * x_D[None, :]
    gate_A = tl.sum(gate_AD, axis=1)
    up_A = tl.sum(up_AD, axis=1)
    if GATE_BIAS:
        gate_A += tl.load(gate_bias_F + channels_A, mask=is_entry_A, other=0.0).to(tl.float32)
    if UP_BIAS:
        up_A += tl.load(up_bias_F + channels_A, mask=is_entry_A, other=0.0).to(tl.float32)
    tl.store(h_TA + token * A + entries_A, gate_A * tl.sigmoid(gate_A) * up_A, mask=is_entry_A)


@triton.jit
def gather_kernel(
    h_TA, packed_F3P, active_TA, parts_TSD, A, D, P, per_share, S,
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    share = tl.program_id(2)
    columns_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column_D = columns_D < D
    end = tl.minimum((share + 1) * per_share, A)
    sums_AD = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
    for start in tl.range(share * per_share, end, BLOCK_A, num_stages=3):
        entries_A = start + tl.arange(0, BLOCK_A)
        is_entry_A = entries_A < end
        channels_A = tl.load(active_TA + token * A + entries_A, mask=is_entry_A, other=0)
        h_A = tl.load(h_TA + token * A + entries_A, mask=is_entry_A, other=0.0)
        places_AD = channels_A[:, None].to(tl.int64) * (3 * P) + 2 * P + columns_D[None, :]
        down_AD = tl.load(packed_F3P + places_AD, mask=is_entry_A[:, None] & is_column_D[None, :], other=0.0)
        sums_AD += down_AD.to(tl.float32) * h_A[:, None]
    tl.store(parts_TSD + (token * S + share) * D + columns_D, tl.sum(sums_AD, axis=0), mask=is_column_D)


@triton.jit
def finish_kernel(
    parts_TSD, bad_TN, bias_D, y_TD, D, N, S,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    banks_N = tl.arange(0, BLOCK_N)
    bad_N = tl.load(bad_TN + token * N + banks_N, mask=banks_N < N, other=0)
    tl.device_assert(bad_N == 0, "bankwise: router logits are not finite")
    columns_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    shares_S = tl.arange(0, BLOCK_S)
    is_part_SD = (shares_S < S)[:, None] & (columns_D < D)[None, :]
    places_SD = (token * S + shares_S)[:, None] * D + columns_D[None, :]
    y_D = tl.sum(tl.load(parts_TSD + places_SD, mask=is_part_SD, other=0.0), axis=0)
    if BIAS:
        y_D += tl.load(bias_D + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)
    tl.store(y_TD + token * D + columns_D, y_D, mask=columns_D < D)
