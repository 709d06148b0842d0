"""rope: each pair of q [B, T, H, D] and k [B, T, G, D] turned by the angle of its position, in one launch.

A program turns all heads of a token, so that cos and sin are read once. Computed in float32, rounded once; the backward
is the same with -sin. Outputs are contiguous; nothing accumulates, nothing is overwritten.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.launch import choose, on_device_of, power_of_two, rows, start, unavailable
from llama_fast.ops import table

__all__ = ["rope_bwd", "rope_fwd", "unavailable"]


@dataclass(frozen=True)
class Launch:
    """A program takes the heads of its token BLOCK_H at a time."""

    BLOCK_H: int
    num_warps: int


@functools.cache
def heuristic(H: int, D: int) -> Launch:
    """32 bytes in half precision for each thread and half of a head: two 16-byte accesses, four in flight."""
    BLOCK_H = min(power_of_two(H), max(4096 // power_of_two(D), 1))
    return Launch(BLOCK_H, min(max(BLOCK_H * power_of_two(D) // 1024, 1), 8))


def candidates(H: int, D: int) -> tuple[Launch, ...]:
    blocks = sorted({min(power_of_two(H), b) for b in (4, 8, 16, 32, 64)})
    return tuple(Launch(b, w) for b in blocks for w in (1, 2, 4, 8) if b * power_of_two(D) // 2 >= 32 * w)


@triton.jit
def _load(
    x_ptr,  # [H, D] T of a token
    x_stride_h,
    begin,
    H,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two >= D / 2
):
    """Both halves of each pair of heads `begin` and on: [BLOCK_H, BLOCK_D] each, float32."""
    h = begin + tl.arange(0, BLOCK_H)[:, None]
    if FAR:
        h = h.to(tl.int64)
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        x = tl.load(x_ptr + h * x_stride_h + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D, 2)))
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = (h < H) & (d < D // 2)
        a = tl.load(x_ptr + h * x_stride_h + d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + h * x_stride_h + D // 2 + d, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(
    out_ptr,  # [H, D] T of a token, contiguous
    a,
    b,
    cos,  # [1, BLOCK_D] f32
    sin,
    begin,
    H,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turns the pairs and writes them."""
    h = begin + tl.arange(0, BLOCK_H)[:, None]
    a, b = a * cos - b * sin, a * sin + b * cos
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_D)[None, :]
        x = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_D))
        tl.store(out_ptr + h * D + d, x.to(out_ptr.dtype.element_ty), mask=(h < H) & (d < D))
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = (h < H) & (d < D // 2)
        tl.store(out_ptr + h * D + d, a.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + h * D + D // 2 + d, b.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr,  # [B, T, H, D] T
    k_ptr,  # [B, T, G, D] T
    cos_ptr,  # [N, T, D/2] f32
    sin_ptr,  # [N, T, D/2] f32
    q_out_ptr,  # [B, T, H, D] T, contiguous
    k_out_ptr,  # [B, T, G, D] T, contiguous
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    cos_stride_n,  # 0 where N is 1
    cos_stride_t,
    sin_stride_n,
    sin_stride_t,
    T,
    H,
    G,
    D: tl.constexpr,
    BACKWARD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FAR: tl.constexpr,  # offsets of heads in 64 bits: in 32 a multiprocessor has room for more warps
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # int64: offsets pass 2^31
    b, t = token // T, token % T
    d = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(cos_ptr + b * cos_stride_n + t * cos_stride_t + d, mask=d < D // 2, other=0.0)
    sin = tl.load(sin_ptr + b * sin_stride_n + t * sin_stride_t + d, mask=d < D // 2, other=0.0)
    if BACKWARD:
        sin = -sin
    q_ptr += b * q_stride_b + t * q_stride_t
    k_ptr += b * k_stride_b + t * k_stride_t
    q_out_ptr += token * H * D
    k_out_ptr += token * G * D
    # the first heads of k are loaded before those of q are stored: a load does not pass a store
    q_a, q_b = _load(q_ptr, q_stride_h, 0, H, D, INTERLEAVED, FAR, BLOCK_H, BLOCK_D)
    k_a, k_b = _load(k_ptr, k_stride_h, 0, G, D, INTERLEAVED, FAR, BLOCK_G, BLOCK_D)
    _store(q_out_ptr, q_a, q_b, cos, sin, 0, H, D, INTERLEAVED, BLOCK_H, BLOCK_D)
    _store(k_out_ptr, k_a, k_b, cos, sin, 0, G, D, INTERLEAVED, BLOCK_G, BLOCK_D)
    for begin in range(BLOCK_H, H, BLOCK_H):
        q_a, q_b = _load(q_ptr, q_stride_h, begin, H, D, INTERLEAVED, FAR, BLOCK_H, BLOCK_D)
        _store(q_out_ptr, q_a, q_b, cos, sin, begin, H, D, INTERLEAVED, BLOCK_H, BLOCK_D)
    for begin in range(BLOCK_G, G, BLOCK_G):
        k_a, k_b = _load(k_ptr, k_stride_h, begin, G, D, INTERLEAVED, FAR, BLOCK_G, BLOCK_D)
        _store(k_out_ptr, k_a, k_b, cos, sin, begin, G, D, INTERLEAVED, BLOCK_G, BLOCK_D)


def _launch(
    name: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, q_out: Tensor, k_out: Tensor
) -> None:
    (B, T, H, D), G = q.shape, k.shape[2]
    if B * T * (H + G) * D == 0:
        return
    q, k, cos, sin = rows(q), rows(k), rows(cos), rows(sin)
    angle_strides = [s for x in (cos, sin) for s in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    heads = max(H, G)
    far = max(H * q.stride(2), G * k.stride(2)) >= 1 << 31  # heads first, of many tokens
    strides = (*q.stride()[:3], *k.stride()[:3], *angle_strides)

    def run(launch: Launch) -> None:
        constants = (D, name == "rope_bwd", interleaved, far, *_blocks(launch, G, D))
        args = (q, k, cos, sin, q_out, k_out, *strides, T, H, G)
        start(_rope_kernel, (B * T,), args, constants, num_warps=launch.num_warps)

    with on_device_of(q):
        sizes = (q.dtype, H, G, D, interleaved, B * T)
        run(choose(name, sizes, q.device, heuristic(heads, D), lambda: candidates(heads, D), run))


@functools.cache
def _blocks(launch: Launch, G: int, D: int) -> tuple[int, int, int]:
    return launch.BLOCK_H, min(launch.BLOCK_H, power_of_two(G)), power_of_two(D // 2)


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    results = table.ROPE.allocate("fwd", (q, k, cos, sin, interleaved))
    _launch("rope_fwd", q, k, cos, sin, interleaved, *results)
    return results


def rope_bwd(dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    results = table.ROPE.allocate("bwd", (dq_out, dk_out, cos, sin, interleaved))
    _launch("rope_bwd", dq_out, dk_out, cos, sin, interleaved, *results)
    return results
