"""attention backward in Triton: one pass for delta, one for dk and dv, one for dq.

    p = exp(s - lse)    dv = p^T dout    dp = dout v^T    ds = p (dp - delta)    delta = rowsum(dout out)
    dq = scale ds k     dk = scale ds^T q

dk and dv: a program owns BLOCK_N keys of a key/value head and walks over the queries of each head of the group that see
them, summing in float32 and rounding once. dq: a program owns BLOCK_M queries of a head and walks over its keys. p is
recomputed in both, seven products instead of five, and in return nothing is added to memory by two programs: bitwise
repeatable without atomics. p and ds are rounded once, to the dtype of the inputs. Derivation:
docs/ops/attention_triton.md.

Source: Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.attention_tiles import (
    LOG2E,
    Tiles,
    aligned,
    backward_tiles,
    bits,
    from_bits,
    head_descriptor,
    keys_seen,
    load_tile,
    precision,
    queries_seeing,
    sees,
    sequence_of,
    unit_of,
    wave_of,
)


@triton.jit(do_not_specialize=["T", "H"])
def _attention_delta_kernel(
    dout_ptr,  # [B, T, H, D]
    out_ptr,  # [B, T, H, D] contiguous
    delta_ptr,  # [B, H, T] f32
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    T,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows (t, h) of a program
):
    blocks = tl.cdiv(T * H, BLOCK_R)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    t = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = (row < T * H)[:, None] & (column < D)[None, :]
    dout_rows = (
        b * tl.multiple_of(dout_stride_b, 8)
        + t * tl.multiple_of(dout_stride_t, 8)
        + h * tl.multiple_of(dout_stride_h, 8)
    )
    dout = tl.load(dout_ptr + dout_rows[:, None] + column[None, :], mask=mask, other=0.0)
    out_rows = ((b * T + t) * H + h) * D
    out = tl.load(out_ptr + out_rows[:, None] + column[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + t, delta, mask=row < T * H)


@triton.jit
def _weights(s, lse, scale, EXACT: tl.constexpr):
    """exp(scale s - lse): `scale` and `lse` are of base two, or natural where EXACT."""
    if EXACT:
        return tl.math.exp2((s * scale - lse) * LOG2E)
    return tl.math.exp2(s * scale - lse)


@triton.jit
def _row_statistics(lse_ptr, delta_ptr, t, T, EXACT: tl.constexpr):
    """(lse, delta) of rows t: lse is inf, so that every weight is 0, beyond T and where a query sees no key."""
    lse = tl.load(lse_ptr + t, mask=t < T, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if not EXACT:
        lse = lse * LOG2E
    return lse, tl.load(delta_ptr + t, mask=t < T, other=0.0)


@triton.jit
def _dkdv_walk(
    dk, dv, k, v, q, dout, lse_ptr, delta_ptr, b, h, low, high, shift, j, T, S, q_stride_t, dout_stride_t, scale, one,
    window, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, SYNCHRONOUS: tl.constexpr,
):  # fmt: skip
    """The blocks of queries from low to high of one head. Scores stand transposed, [BLOCK_N, BLOCK_M]."""
    for m in tl.range(low, high, BLOCK_M, warp_specialize=WARP_SPECIALIZE):
        t = m + tl.arange(0, BLOCK_M)
        q_tile = load_tile(q, b, h, m, T, q_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
        s = tl.dot(k, q_tile.T, input_precision=PRECISION)
        dout_tile = load_tile(dout, b, h, m, T, dout_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
        dp = tl.dot(v, dout_tile.T, input_precision=PRECISION)
        lse, delta = _row_statistics(lse_ptr, delta_ptr, t, T, EXACT)
        p = _weights(s, lse[None, :], scale, EXACT)
        if MASKED:
            p = tl.where(sees((t + shift)[None, :], j[:, None], S, window, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(k.dtype), dout_tile, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(k.dtype), q_tile, dk, input_precision=PRECISION)
        if SYNCHRONOUS:
            dv = dv * one
            dk = dk * one
    return dk, dv


@triton.jit
def _dkdv_walk_overlapped(
    dk, dv, k, v, q, dout, lse_ptr, delta_ptr, b, h, low, high, T, q_stride_t, dout_stride_t, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Blocks whose queries all see the keys; v dout^T of the next block runs while this one's exponentials do."""
    if low < high:
        dout_tile = load_tile(dout, b, h, low, T, dout_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
        dp = tl.dot(v, dout_tile.T, input_precision=PRECISION)
        for m in tl.range(low, high, BLOCK_M):
            q_tile = load_tile(q, b, h, m, T, q_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
            s = tl.dot(k, q_tile.T, input_precision=PRECISION)
            lse, delta = _row_statistics(lse_ptr, delta_ptr, m + tl.arange(0, BLOCK_M), T, EXACT)
            above = s * scale - lse[None, :]
            deviation = dp - delta[None, :]
            dout_next = load_tile(dout, b, h, m + BLOCK_M, T, dout_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
            dp = tl.dot(v, dout_next.T, input_precision=PRECISION)
            p = tl.math.exp2(above * LOG2E) if EXACT else tl.math.exp2(above)
            dout_tile = load_tile(dout, b, h, m, T, dout_stride_t, D, BLOCK_M, BLOCK_D, TMA, True)
            dv = tl.dot(p.to(k.dtype), dout_tile, dv, input_precision=PRECISION)
            dk = tl.dot((p * deviation).to(k.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


_RUNTIME_SIZES = ["T", "S", "H", "N", "slots", "wave", "units", "window"]


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def _attention_dkdv_kernel(
    q,  # [B, T, H, D], or its descriptor
    k_ptr,  # [B, S, G, D]
    v_ptr,  # [B, S, G, D]
    dout,  # [B, T, H, D], or its descriptor
    lse_ptr,  # [B, H, T] f32
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
    one,  # 1.0, which the compiler does not know
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
    OVERLAP: tl.constexpr,
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
                b64 * tl.multiple_of(dout_stride_b, 8) + h64 * tl.multiple_of(dout_stride_h, 8) + begin64 * dout_stride_t
            )
        statistics = (b64 * H + h64) * T + begin64
        lse = lse_ptr + statistics
        delta = delta_ptr + statistics
        if CAUSAL:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, lse, delta, b, h, low, full_low, shift, j, tokens, keys, q_stride_t,
                dout_stride_t, scale, one, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, True, TMA, False, PRECISION,
                EXACT, OVERLAP,
            )  # fmt: skip
        if OVERLAP:
            dk, dv = _dkdv_walk_overlapped(
                dk, dv, k, v, q_head, dout_head, lse, delta, b, h, full_low, full_high, tokens, q_stride_t,
                dout_stride_t, scale, D, BLOCK_M, BLOCK_D, TMA, PRECISION, EXACT,
            )  # fmt: skip
        else:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, lse, delta, b, h, full_low, full_high, shift, j, tokens, keys,
                q_stride_t, dout_stride_t, scale, one, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, False, TMA,
                WARP_SPECIALIZE, PRECISION, EXACT, False,
            )  # fmt: skip
        if WINDOW:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_head, dout_head, lse, delta, b, h, full_high, high, shift, j, tokens, keys, q_stride_t,
                dout_stride_t, scale, one, window, D, BLOCK_M, BLOCK_D, CAUSAL, WINDOW, True, TMA, False, PRECISION,
                EXACT, OVERLAP,
            )  # fmt: skip

    rows = ((b64 * S + begin64 + j) * G + g64) * D
    pointers = rows[:, None] + column[None, :]
    mask = (j < keys)[:, None] & (column < D)[None, :]
    tl.store(dk_ptr + pointers, (dk * gradient_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + pointers, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_walk(
    dq, q, dout, lse, delta, k, v, b, g, low, high, i, S, k_stride_s, v_stride_s, scale, one, window,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, SYNCHRONOUS: tl.constexpr,
):  # fmt: skip
    """The key blocks from low to high."""
    for n in tl.range(low, high, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_tile = load_tile(k, b, g, n, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)
        v_tile = load_tile(v, b, g, n, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
        p = _weights(s, lse[:, None], scale, EXACT)
        if MASKED:
            j = n + tl.arange(0, BLOCK_N)
            p = tl.where(sees(i[:, None], j[None, :], S, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
        if SYNCHRONOUS:
            dq = dq * one
    return dq


@triton.jit
def _dq_walk_overlapped(
    dq, q, dout, lse, delta, k, v, b, g, low, high, S, k_stride_s, v_stride_s, scale, one,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Whole key blocks; the next block's two products run while this one's ds is computed.

    ds of a block meets its keys one turn later: the wait for that product is also the wait for the two in flight.
    """
    if low < high:
        k_tile = load_tile(k, b, g, low, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, False)
        v_tile = load_tile(v, b, g, low, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, False)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
        ds = bits((_weights(s, lse[:, None], scale, EXACT) * (dp - delta[:, None])).to(q.dtype))
        k_tile = load_tile(k, b, g, low + BLOCK_N, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
        v_tile = load_tile(v, b, g, low + BLOCK_N, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
        s = tl.dot(q, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
        for n in tl.range(low + BLOCK_N, high, BLOCK_N):
            k_tile = load_tile(k, b, g, n - BLOCK_N, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, False)
            dq = tl.dot(from_bits(ds, q.dtype), k_tile, dq, input_precision=PRECISION) * one
            above = s * scale - lse[:, None]
            deviation = dp - delta[:, None]
            k_tile = load_tile(k, b, g, n + BLOCK_N, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
            s = tl.dot(q, k_tile.T, input_precision=PRECISION)
            v_tile = load_tile(v, b, g, n + BLOCK_N, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, True)
            dp = tl.dot(dout, v_tile.T, input_precision=PRECISION)
            p = tl.math.exp2(above * LOG2E) if EXACT else tl.math.exp2(above)
            ds = bits((p * deviation).to(q.dtype))
        k_tile = load_tile(k, b, g, high - BLOCK_N, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, False)
        dq = tl.dot(from_bits(ds, q.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def _attention_dq_kernel(
    q_ptr,  # [B, T, H, D]
    k,  # [B, S, G, D], or its descriptor
    v,  # [B, S, G, D], or its descriptor
    dout_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    delta_ptr,  # [B, H, T] f32
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
    one,  # 1.0, which the compiler does not know
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
    OVERLAP: tl.constexpr,
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
    statistics = (b64 * H + h64) * T + begin64
    lse, delta = _row_statistics(lse_ptr + statistics, delta_ptr + statistics, t, tokens, EXACT)
    if not TMA:
        k += b64 * tl.multiple_of(k_stride_b, 8) + g64 * tl.multiple_of(k_stride_g, 8) + begin64 * k_stride_s
        v += b64 * tl.multiple_of(v_stride_b, 8) + g64 * tl.multiple_of(v_stride_g, 8) + begin64 * v_stride_s

    i = t + (keys - tokens)
    first = slot * BLOCK_M + (keys - tokens)
    last = tl.minimum(slot * BLOCK_M + BLOCK_M, tokens) - 1 + (keys - tokens)
    low, full_low, full_high, high = keys_seen(first, last, keys, window, BLOCK_N, CAUSAL, WINDOW)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW:
        dq = _dq_walk(
            dq, q, dout, lse, delta, k, v, b, g, low, full_low, i, keys, k_stride_s, v_stride_s, scale, one, window,
            D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, True, TMA, False, PRECISION, EXACT, OVERLAP,
        )  # fmt: skip
    if OVERLAP:
        dq = _dq_walk_overlapped(
            dq, q, dout, lse, delta, k, v, b, g, full_low, full_high, keys, k_stride_s, v_stride_s, scale, one,
            D, BLOCK_N, BLOCK_D, TMA, PRECISION, EXACT,
        )  # fmt: skip
    else:
        dq = _dq_walk(
            dq, q, dout, lse, delta, k, v, b, g, full_low, full_high, i, keys, k_stride_s, v_stride_s, scale, one, window,
            D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, False, TMA, WARP_SPECIALIZE, PRECISION, EXACT, False,
        )  # fmt: skip
    dq = _dq_walk(
        dq, q, dout, lse, delta, k, v, b, g, full_high, high, i, keys, k_stride_s, v_stride_s, scale, one, window,
        D, BLOCK_N, BLOCK_D, CAUSAL, WINDOW, True, TMA, False, PRECISION, EXACT, OVERLAP,
    )  # fmt: skip
    pointers = (((b64 * T + begin64 + t) * H + h64) * D)[:, None] + column[None, :]
    mask = (t < tokens)[:, None] & (column < D)[None, :]
    tl.store(dq_ptr + pointers, (dq * gradient_scale).to(dq_ptr.dtype.element_ty), mask=mask)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    dkdv_tiles: Tiles,
    dq_tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_bwd` with given launch parameters."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, S, G, D), dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    N = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    if dq.numel() == 0 or dk.numel() == 0 or (cu_seqlens is not None and N < 1):
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v, out = aligned(dout), aligned(q), aligned(k), aligned(v), out.contiguous()
    BLOCK_D = max(16, triton.next_power_of_2(D))
    delta = torch.empty_like(lse)
    block_r = max(1, 4096 // BLOCK_D)
    _attention_delta_kernel[(B * triton.cdiv(T * H, block_r),)](
        dout, out, delta, *dout.stride()[:3], T, H, D=D, BLOCK_D=BLOCK_D, BLOCK_R=block_r
    )
    exact = q.dtype == torch.float32
    strides = [s for x in (q, k, v, dout) for s in x.stride()[:3]]
    item = q.element_size()

    def launch(kernel, tiles: Tiles, units: int, rows: int, block: int, walked: int, walks, *results: Tensor) -> None:
        tma = tiles.tma and cu_seqlens is None
        other = tiles.block_m + tiles.block_n - block
        slots = triton.cdiv(rows, block) if cu_seqlens is None else rows // block + N
        tensors = [
            head_descriptor(x, other, BLOCK_D) if tma and name in walks else x
            for name, x in (("q", q), ("k", k), ("v", v), ("dout", dout))
        ]
        kernel[(units * slots,)](
            *tensors,
            lse,
            delta,
            *results,
            cu_seqlens,
            *strides,
            T,
            S,
            H,
            N,
            slots,
            units,
            wave_of(units, walked, 2 * D * item),
            scale if exact else scale * LOG2E.value,
            scale,
            1.0,
            window,
            D=D,
            RATIO=H // G,
            CAUSAL=causal or window > 0,
            WINDOW=window > 0,
            PACKED=cu_seqlens is not None,
            EXACT=exact,
            PRECISION=precision(q.dtype),
            BLOCK_D=BLOCK_D,
            **{**tiles.options(), "TMA": tma},
        )

    launch(_attention_dkdv_kernel, dkdv_tiles, B * G, S, dkdv_tiles.block_n, T * (H // G), ("q", "dout"), dk, dv)
    launch(_attention_dq_kernel, dq_tiles, B * H, T, dq_tiles.block_m, S, ("k", "v"), dq)
    return dq, dk, dv


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, q [B,T,H,D], k, v [B,S,G,D], out, lse [B,H,T] of the forward -> dq, dk, dv."""
    dkdv_tiles, dq_tiles = backward_tiles(q.shape[3], q.dtype)
    return backward(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window, dkdv_tiles, dq_tiles)
