"""attention backward in Triton, dq: a program owns BLOCK_M queries of a head and walks over the keys that they see.

EXACT, float32: it walks twice, first for its rows' statistics. What is computed: attention_bwd.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llama_fast.kernels.attention_launch import RUNTIME_SIZES
from llama_fast.kernels.attention_tiles import (
    add_product,
    hide,
    keys_seen,
    load_tile,
    product,
    row_statistics,
    running_weights,
    sees,
    sequence_of,
    unit_of,
    weights,
)


@triton.jit
def _statistics_walk(
    peak, total, delta, q, dout, k, v, b, g, low, high, i, S, k_stride_s, v_stride_s, scale, window, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The key blocks from low to high: largest product, sum of the weights relative to it, the same sum times dp."""
    for n in range(low, high, BLOCK_N):
        k_tile = load_tile(k, b, g, n, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
        s = product(q, k_tile.T, PRECISION)
        v_tile = load_tile(v, b, g, n, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
        dp = product(dout, v_tile.T, PRECISION)
        s = hide(s, i, n + tl.arange(0, BLOCK_N), S, window, CAUSAL, WINDOW)
        alpha, p, peak = running_weights(s, peak, scale, True, True)
        total = total * alpha + tl.sum(p, 1)
        delta = delta * alpha + tl.sum(p * dp, 1)
    return peak, total, delta


@triton.jit
def _dq_walk(
    dq, q, dout, peak, inverse, delta, k, v, b, g, low, high, i, S, k_stride_s, v_stride_s, scale, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The key blocks from low to high."""
    for n in tl.range(low, high, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_tile = load_tile(k, b, g, n, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        s = product(q, k_tile.T, PRECISION)
        v_tile = load_tile(v, b, g, n, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        dp = product(dout, v_tile.T, PRECISION)
        p = weights(s, peak[:, None], inverse[:, None], scale, EXACT)
        if MASKED:
            j = n + tl.arange(0, BLOCK_N)
            p = tl.where(sees(i[:, None], j[None, :], S, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = add_product(dq, ds.to(k_tile.dtype), k_tile, PRECISION)
    return dq


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _attention_dq_kernel(
    q_ptr,  # [B, T, H, D]
    k,  # [B, S, G, D], or its descriptor
    v,  # [B, S, G, D], or its descriptor
    dout_ptr,  # [B, T, H, D]
    peak_ptr,  # [B, H, T] f32: lse; EXACT: written, the largest q k^T
    inverse_ptr,  # [B, H, T] f32; EXACT: written, 1 over the sum of e^(s - scale peak)
    delta_ptr,  # [B, H, T] f32; EXACT: written
    dq_ptr,  # [B, T, H, D] contiguous
    cu_ptr,  # [N + 1] i32; packed only
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    T,
    S,
    H,
    N,
    slots,  # tiles of a head
    units,  # B H
    wave,
    scale,  # of the scores, in base two or natural (EXACT)
    gradient_scale,
    window,
    D: tl.constexpr,
    RATIO: tl.constexpr,  # H / G
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    unit, slot = unit_of(tl.program_id(0), units, slots, wave, CAUSAL)
    b = unit // H
    h = unit % H
    g = h // RATIO
    tokens, keys, begin = T, S, 0
    if PACKED:
        begin, tokens, slot = sequence_of(cu_ptr, slot, T, N, 1, BLOCK_M)
        keys = tokens
        if slot * BLOCK_M >= tokens:
            return
    t = slot * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    b64 = b.to(tl.int64)
    h64 = tl.cast(h, tl.int64)
    g64 = g.to(tl.int64)
    begin64 = tl.cast(begin, tl.int64)
    q_stride_t = tl.multiple_of(q_stride_t, 8)
    dout_stride_t = tl.multiple_of(dout_stride_t, 8)
    k_stride_s = tl.multiple_of(k_stride_s, 8)
    v_stride_s = tl.multiple_of(v_stride_s, 8)
    q_head = q_ptr + b64 * tl.multiple_of(q_stride_b, 8) + h64 * tl.multiple_of(q_stride_h, 8) + begin64 * q_stride_t
    dout_head = (
        dout_ptr
        + b64 * tl.multiple_of(dout_stride_b, 8)
        + h64 * tl.multiple_of(dout_stride_h, 8)
        + begin64 * dout_stride_t
    )
    q = load_tile(q_head, b, h, slot * BLOCK_M, tokens, q_stride_t, D, BLOCK_M, BLOCK_D, False, True)
    dout = load_tile(dout_head, b, h, slot * BLOCK_M, tokens, dout_stride_t, D, BLOCK_M, BLOCK_D, False, True)
    if not TMA:
        k += b64 * tl.multiple_of(k_stride_b, 8) + g64 * tl.multiple_of(k_stride_g, 8) + begin64 * k_stride_s
        v += b64 * tl.multiple_of(v_stride_b, 8) + g64 * tl.multiple_of(v_stride_g, 8) + begin64 * v_stride_s

    i = t + (keys - tokens)
    first = slot * BLOCK_M + (keys - tokens)
    last = tl.minimum(slot * BLOCK_M + BLOCK_M, tokens) - 1 + (keys - tokens)
    low, full_low, full_high, high = keys_seen(first, last, keys, window, BLOCK_N, CAUSAL, WINDOW)
    statistics = (b64 * H + h64) * T + begin64
    if EXACT:
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        # one loop, with the mask: a third of what is compiled, and little beside products in several pieces
        full_high = low
        peak, total, delta = _statistics_walk(
            peak, total, delta, q, dout, k, v, b, g, low, high, i, keys, k_stride_s, v_stride_s, scale, window, D,
            BLOCK_N, BLOCK_D, CAUSAL, WINDOW, TMA, PRECISION,
        )  # fmt: skip
        none = total == 0.0
        peak = tl.where(none, float("inf"), peak)  # every weight of the row is then 0
        total = tl.where(none, 1.0, total)
        inverse = tl.div_rn(1.0, total)
        delta = tl.div_rn(delta, total)
        tl.store(peak_ptr + statistics + t, peak, mask=t < tokens)
        tl.store(inverse_ptr + statistics + t, inverse, mask=t < tokens)
        tl.store(delta_ptr + statistics + t, delta, mask=t < tokens)
    else:
        peak, inverse, delta = row_statistics(
            peak_ptr + statistics, inverse_ptr + statistics, delta_ptr + statistics, t, tokens, EXACT
        )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW and not EXACT:
        dq = _dq_walk(
            dq, q, dout, peak, inverse, delta, k, v, b, g, low, full_low, i, keys, k_stride_s, v_stride_s, scale,
            window, D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, True, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
        )  # fmt: skip
    if not EXACT:
        dq = _dq_walk(
            dq, q, dout, peak, inverse, delta, k, v, b, g, full_low, full_high, i, keys, k_stride_s, v_stride_s, scale,
            window, D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, False, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
        )  # fmt: skip
    dq = _dq_walk(
        dq, q, dout, peak, inverse, delta, k, v, b, g, full_high, high, i, keys, k_stride_s, v_stride_s, scale,
        window, D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, True, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
    )  # fmt: skip
    pointers = (((b64 * T + begin64 + t) * H + h64) * D)[:, None] + column[None, :]
    mask = (t < tokens)[:, None] & (column < D)[None, :]
    tl.store(dq_ptr + pointers, (dq * gradient_scale).to(dq_ptr.dtype.element_ty), mask=mask)
