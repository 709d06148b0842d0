"""attention backward in Triton: one pass for delta, one for dq, one for dk and dv.

    p = exp(s - lse)    dv = p^T dout    dp = dout v^T    ds = p (dp - delta)    delta = rowsum(dout out)
    dq = scale ds k     dk = scale ds^T q

dk and dv: a program owns BLOCK_N keys of a key/value head and walks over the queries of each head of the group that see
them, summing in float32 and rounding once. dq: a program owns BLOCK_M queries of a head and walks over its keys. p is
recomputed in both, seven products instead of five, and in return nothing is added to memory by two programs: bitwise
repeatable without atomics. p and ds are rounded once, to the dtype of the inputs.

float32 takes neither out nor lse: dq's kernel makes the statistics of its rows anew, delta = sum_j p_j dp_j among them,
from the products that both kernels compute. So rows of p sum to 1, and where a query sees one key ds is exactly 0. Both
kernels must then multiply alike, bit for bit. Derivation: docs/ops/attention_triton.md.

Source: Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.attention_dkdv import _attention_dkdv_kernel
from llama_fast.kernels.attention_dq import _attention_dq_kernel
from llama_fast.kernels.attention_launch import Tiles, constants_of, power_of_two, wave_of
from llama_fast.kernels.attention_tiles import LOG2E, aligned, head_descriptor
from llama_fast.kernels.launch import cdiv, start


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


Statistics = tuple[Tensor, Tensor, Tensor]  # [B, H, T] float32 each: peak, inverse, delta (attention_tiles.weights)


def statistics_of(dout: Tensor, out: Tensor, lse: Tensor) -> Statistics:
    """What the kernels read of each row: lse and delta; in float32 memory that `gradient_of_queries` fills."""
    B, T, H, D = out.shape
    if out.dtype == torch.float32:
        return torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse)
    dout, out, delta = aligned(dout), out.contiguous(), torch.empty_like(lse)
    block_d = power_of_two(D)
    block_r = 4096 // block_d
    args = (dout, out, delta, *dout.stride()[:3], T, H)
    start(_attention_delta_kernel, (B * cdiv(T * H, block_r),), args, (D, block_d, block_r))
    return lse, lse, delta


def _launch(
    kernel: Any,
    tiles: Tiles,
    owned: int,  # block_m or block_n: the rows that a program owns
    shape: tuple[int, int, int],  # heads in all, rows of each, rows that a program walks over
    walked: tuple[str, str],
    args: tuple[Tensor, Tensor, Tensor, Tensor],  # dout, q, k, v, `aligned`
    statistics: Statistics,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    results: tuple[Tensor, ...],
    extra: tuple[bool, ...] = (),  # the kernel's own compile-time arguments
) -> None:
    dout, q, k, v = args
    T, H, D = q.shape[1:]
    S, G = k.shape[1:3]
    units, rows, across = shape
    described = tiles.tma and cu_seqlens is None
    block_d = power_of_two(D)
    tensors = {"q": q, "k": k, "v": v, "dout": dout}
    strides = [s for x in tensors.values() for s in x.stride()[:3]]
    N = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    slots = cdiv(rows, owned) if cu_seqlens is None else rows // owned + N
    other = tiles.block_m + tiles.block_n - owned
    exact = q.dtype == torch.float32
    inputs = [head_descriptor(x, other, block_d) if described and name in walked else x for name, x in tensors.items()]
    numbers = (
        *strides,
        T,
        S,
        H,
        N,
        slots,
        units,
        wave_of(units, across, 2 * D * q.element_size()),
        max(scale, 1e-30) if exact else scale * LOG2E.value,  # not 0: hidden keys stay at -inf
        scale,
        window,
    )
    masks = (causal or window > 0, window > 0, cu_seqlens is not None)
    start(
        kernel,
        (units * slots,),
        (*inputs, *statistics, *results, cu_seqlens, *numbers),
        (D, H // G, *masks, exact, *extra, *constants_of(tiles, block_d, cu_seqlens is not None)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def gradient_of_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Statistics,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """dk, dv [B, S, G, D]; in float32 after `gradient_of_queries`, whose scale must be >= 0."""
    (B, S, G, D), (T, H) = k.shape, q.shape[1:3]
    dk = torch.empty((B, S, G, D), dtype=k.dtype, device=k.device)
    dv = torch.empty_like(dk)
    shape, walked = (B * G, S, T * (H // G)), ("q", "dout")
    rest = ((dout, q, k, v), statistics, cu_seqlens, scale, causal, window, (dk, dv))
    swapped = tiles.swapped and q.dtype != torch.float32  # in float32 as dq's kernel multiplies
    _launch(_attention_dkdv_kernel, tiles, tiles.block_n, shape, walked, *rest, (swapped,))
    return dk, dv


def gradient_of_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Statistics,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    tiles: Tiles,
) -> Tensor:
    """dq [B, T, H, D]; in float32 `scale` must be >= 0, and `statistics` is written."""
    B, T, H, D = q.shape
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    shape, walked = (B * H, T, k.shape[1]), ("k", "v")
    rest = ((dout, q, k, v), statistics, cu_seqlens, scale, causal, window, (dq,))
    _launch(_attention_dq_kernel, tiles, tiles.block_m, shape, walked, *rest)
    return dq
