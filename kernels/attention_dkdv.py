"""attention backward in Triton, dk and dv: a program owns BLOCK_N keys of a key/value head.

It walks over the queries of each head of the group that see its keys, sums in float32 and rounds once. What is
computed: attention_bwd.py. Where SWAPPED, scores stand transposed, [BLOCK_N, BLOCK_M]: p and ds go from registers into
the next product. EXACT, float32: they stand as in dq's kernel, whose products they then equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llama_fast.kernels.attention_launch import RUNTIME_SIZES
from llama_fast.kernels.attention_tiles import (
    add_product,
    load_tile,
    product,
    queries_seeing,
    row_statistics,
    sees,
    sequence_of,
    unit_of,
    weights,
)


@triton.jit
def _dkdv_walk(
    dk, dv, k, v, q, dout, peak_ptr, inverse_ptr, delta_ptr, b, h, low, high, shift, j, T, S, q_stride_t,
    dout_stride_t, scale, window, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    SWAPPED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The blocks of queries from low to high of one head."""
    for m in tl.range(low, high, BLOCK_M, warp_specialize=WARP_SPECIALIZE):
        t = m + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q, b, h, m, T, q_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
        s = product(k, q_tile.T, PRECISION) if SWAPPED else product(q_tile, k.T, PRECISION)
        dout_tile = load_tile(dout, b, h, m, T, dout_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
        dp = product(v, dout_tile.T, PRECISION) if SWAPPED else product(dout_tile, v.T, PRECISION)
        peak, inverse, delta = row_statistics(peak_ptr, inverse_ptr, delta_ptr, t, T, EXACT)
        along: tl.constexpr = 0 if SWAPPED else 1  # the dimension of the keys
        delta = tl.expand_dims(delta, along)
        p = weights(s, tl.expand_dims(peak, along), tl.expand_dims(inverse, along), scale, EXACT)
        if MASKED:
            i = tl.expand_dims(t + shift, along)
            p = tl.where(sees(i, tl.expand_dims(j, 1 - along), S, window, CAUSAL, WINDOW), p, 0.0)
        rounded = p.to(k.dtype)
        dv = add_product(dv, rounded if SWAPPED else tl.trans(rounded), dout_tile, PRECISION)
        ds = (p * (dp - delta)).to(k.dtype)
        dk = add_product(dk, ds if SWAPPED else tl.trans(ds), q_tile, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _attention_dkdv_kernel(
    q,  # [B, T, H, D], or its descriptor
    k_ptr,  # [B, S, G, D]
    v_ptr,  # [B, S, G, D]
    dout,  # [B, T, H, D], or its descriptor
    peak_ptr,  # [B, H, T] f32: lse; EXACT: what dq's kernel has written, here and in the next two
    inverse_ptr,  # [B, H, T] f32; EXACT only
    delta_ptr,  # [B, H, T] f32
    dk_ptr,  # [B, S, G, D] contiguous
    dv_ptr,  # [B, S, G, D] contiguous
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
    slots,  # tiles of a key/value head
    units,  # B G
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
    SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    unit, slot = unit_of(tl.program_id(0), units, slots, wave, False)
    G = H // RATIO
    b = unit // G
    g = unit % G
    tokens, keys, begin = T, S, 0
    if PACKED:
        begin, keys, slot = sequence_of(cu_ptr, slot, S, N, 1, BLOCK_N)
        tokens = keys
        if slot * BLOCK_N >= keys:
            return
    n = slot * BLOCK_N
    j = n + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    shift = keys - tokens
    b64 = b.to(tl.int64)
    g64 = g.to(tl.int64)
    begin64 = tl.cast(begin, tl.int64)
    q_stride_t = tl.multiple_of(q_stride_t, 8)
    dout_stride_t = tl.multiple_of(dout_stride_t, 8)
    k_stride_s = tl.multiple_of(k_stride_s, 8)
    v_stride_s = tl.multiple_of(v_stride_s, 8)
    k_head = k_ptr + b64 * tl.multiple_of(k_stride_b, 8) + g64 * tl.multiple_of(k_stride_g, 8) + begin64 * k_stride_s
    v_head = v_ptr + b64 * tl.multiple_of(v_stride_b, 8) + g64 * tl.multiple_of(v_stride_g, 8) + begin64 * v_stride_s
    k = load_tile(k_head, b, g, n, keys, k_stride_s, D, BLOCK_N, BLOCK_D, False, True)
    v = load_tile(v_head, b, g, n, keys, v_stride_s, D, BLOCK_N, BLOCK_D, False, True)

    low, full_low, full_high, high = queries_seeing(
        n, tl.minimum(n + BLOCK_N, keys) - 1, shift, tokens, window, BLOCK_M, CAUSAL, WINDOW
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(RATIO):
        h = g * RATIO + member
        h64 = tl.cast(h, tl.int64)
        q_head = q
        dout_head = dout
        if not TMA:
            q_head += b64 * tl.multiple_of(q_stride_b, 8) + h64 * tl.multiple_of(q_stride_h, 8) + begin64 * q_stride_t
            dout_head += (
                b64 * tl.multiple_of(dout_stride_b, 8)
                + h64 * tl.multiple_of(dout_stride_h, 8)
                + begin64 * dout_stride_t
            )
        statistics = (b64 * H + h64) * T + begin64
        peak = peak_ptr + statistics
        inverse = inverse_ptr + statistics
        delta = delta_ptr + statistics
        if EXACT:  # one loop, with the mask: half of what is compiled
            full_low = high
        else:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, peak, inverse, delta, b, h, full_low, full_high, shift, j, tokens,
                keys, q_stride_t, dout_stride_t, scale, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, False, TMA,
                WARP_SPECIALIZE, SWAPPED, PRECISION, EXACT,
            )  # fmt: skip
        if CAUSAL or EXACT:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, peak, inverse, delta, b, h, low, full_low, shift, j, tokens, keys,
                q_stride_t, dout_stride_t, scale, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, True, TMA,
                WARP_SPECIALIZE, SWAPPED, PRECISION, EXACT,
            )  # fmt: skip
        if WINDOW and not EXACT:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, peak, inverse, delta, b, h, full_high, high, shift, j, tokens, keys,
                q_stride_t, dout_stride_t, scale, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, True, TMA,
                WARP_SPECIALIZE, SWAPPED, PRECISION, EXACT,
            )  # fmt: skip

    rows = ((b64 * S + begin64 + j) * G + g64) * D
    pointers = rows[:, None] + column[None, :]
    mask = (j < keys)[:, None] & (column < D)[None, :]
    tl.store(dk_ptr + pointers, (dk * gradient_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + pointers, dv.to(dv_ptr.dtype.element_ty), mask=mask)
