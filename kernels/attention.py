"""attention forward in Triton, and the launchers of both directions.

    s = scale q k^T    lse = log sum_j exp s_j    out = sum_j exp(s_j - lse) v_j    over the keys that a query sees

One program owns BLOCK_M rows of a unit: PACK query heads that share keys, rows ordered (token, head). It walks over the
blocks of BLOCK_N keys that its rows see, with the running maximum and sum of each row in float32. Few rows and many
keys: SPLIT programs share the keys of a tile, and a second kernel joins their results. A row without keys gives zeros
and lse = -inf. No atomics. Derivation: docs/ops/attention_triton.md. Backward: attention_bwd.py.

Source: Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.attention_bwd import gradient_of_keys, gradient_of_queries, statistics_of
from llama_fast.kernels.attention_launch import (
    PACKED_ROWS,
    RUNTIME_SIZES,
    Tiles,
    constants_of,
    few_rows_tiles,
    power_of_two,
    splits_of,
    tiles_of,
    wave_of,
)
from llama_fast.kernels.attention_tiles import (
    LN2,
    LOG2E,
    add_product,
    aligned,
    head_descriptor,
    hide,
    keys_seen,
    load_tile,
    product,
    running_weights,
    sequence_of,
    unit_of,
)
from llama_fast.kernels.launch import cdiv, choose, on_device_of, start, unavailable

__all__ = ["attention_bwd", "attention_fwd", "forward", "unavailable"]


@triton.jit
def _walk(
    acc, total, peak, q, k, v, b, g, low, high, i, S, k_stride_s, v_stride_s, scale, window, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The key blocks from low to high, one after the other."""
    for n in tl.range(low, high, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_tile = load_tile(k, b, g, n, S, k_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        s = product(q, k_tile.T, PRECISION)
        if MASKED:
            s = hide(s, i, n + tl.arange(0, BLOCK_N), S, window, CAUSAL, WINDOW)
        alpha, p, peak = running_weights(s, peak, scale, MASKED, EXACT)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v_tile = load_tile(v, b, g, n, S, v_stride_s, D, BLOCK_N, BLOCK_D, TMA, MASKED)
        acc = add_product(acc, p.to(v_tile.dtype), v_tile, PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def _attention_fwd_kernel(
    q_ptr,  # [B, T, H, D]
    k,  # [B, S, G, D], or its descriptor
    v,  # [B, S, G, D], or its descriptor
    out_ptr,  # [B, T, H, D]; SPLIT: [splits, B, T, H, D] f32
    lse_ptr,  # [B, H, T] f32; SPLIT: [splits, B, H, T]
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
    T,
    S,
    H,
    N,
    slots,  # tiles of a unit
    units,  # B H / PACK
    wave,
    scale,
    window,
    D: tl.constexpr,
    RATIO: tl.constexpr,  # H / G
    PACK: tl.constexpr,  # 1 or RATIO
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    unit, slot = unit_of(tl.program_id(0), units, slots, wave, CAUSAL)
    heads = H // PACK
    b = unit // heads
    head = unit % heads * PACK
    g = head // RATIO
    tokens, keys, begin = T, S, 0
    if PACKED:
        begin, tokens, slot = sequence_of(cu_ptr, slot, T, N, PACK, BLOCK_M)
        keys = tokens
        if slot * BLOCK_M >= tokens * PACK:
            return
    row = slot * BLOCK_M + tl.arange(0, BLOCK_M)
    t = row // PACK
    h = head + row % PACK
    inside = row < tokens * PACK
    column = tl.arange(0, BLOCK_D)
    whole = inside[:, None] & (column < D)[None, :]

    # 64 bits: b q_stride_b and t q_stride_t pass 2^31 elements
    q_stride_t = tl.multiple_of(q_stride_t, 8)
    k_stride_s = tl.multiple_of(k_stride_s, 8)
    v_stride_s = tl.multiple_of(v_stride_s, 8)
    b64 = b.to(tl.int64)
    q_rows = (begin + t).to(tl.int64) * q_stride_t + h.to(tl.int64) * tl.multiple_of(q_stride_h, 8)
    q_head = q_ptr + b64 * tl.multiple_of(q_stride_b, 8)
    q = tl.load(q_head + q_rows[:, None] + column[None, :], mask=whole, other=0.0)
    if not TMA:
        g64 = g.to(tl.int64)
        first_key = tl.cast(begin, tl.int64)
        k += b64 * tl.multiple_of(k_stride_b, 8) + g64 * tl.multiple_of(k_stride_g, 8) + first_key * k_stride_s
        v += b64 * tl.multiple_of(v_stride_b, 8) + g64 * tl.multiple_of(v_stride_g, 8) + first_key * v_stride_s

    i = t + (keys - tokens)
    first = slot * BLOCK_M // PACK + (keys - tokens)
    last = tl.minimum((slot * BLOCK_M + BLOCK_M - 1) // PACK, tokens - 1) + (keys - tokens)
    low, full_low, full_high, high = keys_seen(first, last, keys, window, BLOCK_N, CAUSAL, WINDOW)
    if SPLIT:
        part = tl.program_id(1)
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), tl.num_programs(1)) * BLOCK_N
        low += part * share
        high = tl.minimum(high, low + share)
        full_low = tl.minimum(tl.maximum(full_low, low), high)
        full_high = tl.maximum(tl.minimum(full_high, high // BLOCK_N * BLOCK_N), full_low)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if EXACT:  # one loop, with the mask: half of what is compiled, and little beside products in several pieces
        full_high = low
    if WINDOW and not EXACT:
        acc, total, peak = _walk(
            acc, total, peak, q, k, v, b, g, low, full_low, i, keys, k_stride_s, v_stride_s, scale, window, D, BLOCK_N,
            BLOCK_D, CAUSAL, WINDOW, True, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
        )  # fmt: skip
    if not EXACT:
        acc, total, peak = _walk(
            acc, total, peak, q, k, v, b, g, full_low, full_high, i, keys, k_stride_s, v_stride_s, scale, window, D,
            BLOCK_N, BLOCK_D, CAUSAL, WINDOW, False, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
        )  # fmt: skip
    acc, total, peak = _walk(
        acc, total, peak, q, k, v, b, g, full_high, high, i, keys, k_stride_s, v_stride_s, scale, window, D, BLOCK_N,
        BLOCK_D, CAUSAL, WINDOW, True, TMA, WARP_SPECIALIZE, PRECISION, EXACT,
    )  # fmt: skip

    none = total == 0.0
    sums = tl.where(none, 1.0, total)[:, None]
    out = tl.div_rn(acc, sums) if EXACT else acc / sums  # `/` is off by two units in the last place
    natural = peak * scale if EXACT else peak * scale * LN2
    lse = tl.where(none, float("-inf"), natural + tl.math.log2(total) * LN2)
    out_rows = ((b64 * T + begin + t) * H + h) * D
    lse_rows = (b64 * H + h) * T + begin + t
    if SPLIT:
        rows = (units // heads).to(tl.int64) * T * H * part
        out_rows += rows * D
        lse_rows += rows
    tl.store(out_ptr + out_rows[:, None] + column[None, :], out.to(out_ptr.dtype.element_ty), mask=whole)
    tl.store(lse_ptr + lse_rows, lse, mask=inside)


@triton.jit(do_not_specialize=["T", "H"])
def _attention_join_kernel(
    parts_ptr,  # [splits, B, T, H, D] f32
    part_lse_ptr,  # [splits, B, H, T] f32
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] f32
    T,
    H,
    rows,  # B T H
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # (b, t, h)
    h = row % H
    t = row // H % T
    b = row // H // T
    part = tl.arange(0, BLOCK_SPLITS)
    at = (b * H + h) * T + t
    lse = tl.load(part_lse_ptr + part.to(tl.int64) * rows + at, mask=part < SPLITS, other=float("-inf"))
    highest = tl.max(lse, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.math.exp2((lse - base) * LOG2E)
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    column = tl.arange(0, BLOCK_D)
    pointers = parts_ptr + (part.to(tl.int64) * rows + row)[:, None] * D + column[None, :]
    parts = tl.load(pointers, mask=(part < SPLITS)[:, None] & (column < D)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0)
    tl.store(out_ptr + row * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
    joined = tl.where(total == 0.0, float("-inf"), base + tl.math.log2(total) * LN2)
    tl.store(lse_ptr + at, joined)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    tiles: Tiles,
    pack: int = 1,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """`attention_fwd` with given launch parameters: `pack` heads in a tile (1 or H/G), `splits` shares of the keys."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    N = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    if out.numel() == 0 or (cu_seqlens is not None and N < 1):
        return out, lse
    if S == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if scale < 0.0:  # exact, and the kernel may take the largest product for the largest score
        q, scale = -q, -scale
    q, k, v = aligned(q), aligned(k), aligned(v)
    block_d = power_of_two(D)
    exact = q.dtype == torch.float32
    factor = max(scale if exact else scale * LOG2E.value, 1e-30)  # not 0: hidden keys stay at -inf
    units = B * H // pack
    slots = cdiv(T * pack, tiles.block_m) if cu_seqlens is None else T * pack // tiles.block_m + N
    constants = constants_of(tiles, block_d, cu_seqlens is not None)
    if splits > 1:
        parts = torch.empty((splits, B, T, H, D), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, B, H, T), dtype=torch.float32, device=q.device)
    described = tiles.tma and cu_seqlens is None
    args = (
        q,
        head_descriptor(k, tiles.block_n, block_d) if described else k,
        head_descriptor(v, tiles.block_n, block_d) if described else v,
        parts if splits > 1 else out,
        part_lse if splits > 1 else lse,
        cu_seqlens,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        T,
        S,
        H,
        N,
        slots,
        units,
        wave_of(units, S, 2 * D * q.element_size()),
        factor,
        window,
    )
    masks = (causal or window > 0, window > 0, cu_seqlens is not None)
    start(
        _attention_fwd_kernel,
        (units * slots, splits),
        args,
        (D, H // G, pack, *masks, splits > 1, exact, *constants),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        joined = (parts, part_lse, out, lse, T, H, B * T * H)
        start(_attention_join_kernel, (B * T * H,), joined, (splits, D, block_d, triton.next_power_of_2(splits)))
    return out, lse


def rows_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of a key/value head, in a sequence of mean length."""
    sequences = max(1, cu_seqlens.numel() - 1 if cu_seqlens is not None else q.shape[0])
    return q.shape[0] * q.shape[1] * (q.shape[2] // k.shape[2]) // sequences


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """q [B,T,H,D], k and v [B,S,G,D] -> out [B,T,H,D], lse [B,H,T] float32."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    ratio, packed, rows = H // G, cu_seqlens is not None, rows_of(q, k, cu_seqlens)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    pack = ratio if rows <= PACKED_ROWS else 1

    def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
        programs = B * H // pack * cdiv(T * pack, tiles.block_m)
        splits = 1 if packed else splits_of(programs, S, q.device)
        return forward(q, k, v, cu_seqlens, scale, causal, window, tiles, pack, splits)

    with on_device_of(q):
        few = rows <= PACKED_ROWS
        heuristic = few_rows_tiles(rows, D, q.dtype, q.device) if few else tiles_of("fwd", D, q.dtype, q.device)
        return run(choose("attention_fwd", (D, q.dtype, few, packed), q.device, heuristic, tuple, run))


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
    if q.numel() == 0 or k.numel() == 0 or (cu_seqlens is not None and cu_seqlens.numel() < 2):
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    mirrored = q.dtype == torch.float32 and scale < 0.0  # exact, and the largest product is the largest score
    if mirrored:
        q, scale = -q, -scale
    dout, q, k, v = aligned(dout), aligned(q), aligned(k), aligned(v)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    D, device, rest = q.shape[3], q.device, (cu_seqlens, scale, causal, window)
    with on_device_of(q):
        statistics = statistics_of(dout, out, lse)

        def keys(tiles: Tiles) -> tuple[Tensor, Tensor]:
            return gradient_of_keys(dout, q, k, v, statistics, *rest, tiles)

        def queries(tiles: Tiles) -> Tensor:
            return gradient_of_queries(dout, q, k, v, statistics, *rest, tiles)

        few = rows_of(q, k, cu_seqlens) <= PACKED_ROWS
        sizes = (D, q.dtype, few and q.dtype == torch.float32, cu_seqlens is not None)
        dq = queries(choose("attention_dq", sizes, device, tiles_of("dq", D, q.dtype, device, few), tuple, queries))
        dk, dv = keys(choose("attention_dkdv", sizes, device, tiles_of("dkdv", D, q.dtype, device, few), tuple, keys))
    return dq.neg_() if mirrored else dq, dk, dv
