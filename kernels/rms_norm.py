"""rms_norm and add_rms_norm: y = x rstd weight over rows of C, rstd = (mean_c x^2 + eps)^(-1/2).

A row that fits in registers is read once. add_rms_norm rounds x + residual to the dtype, writes it, and normalises what
it wrote. Statistics and sums are float32; results are rounded once. Backward: a fixed number of programs, each over the
rows that lie that number apart, adds its part of dweight in registers; a second kernel adds the parts, each time in the
same order. Longer rows (`_FWD_COLUMNS`, `_BWD_COLUMNS`) are read twice; dweight then has its own kernel. Nothing is
overwritten, no atomics.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.launch import (
    cdiv,
    choose,
    is_amd,
    multiprocessors,
    on_device_of,
    power_of_two,
    rows,
    start,
    unavailable,
)
from llama_fast.ops import table

__all__ = ["add_rms_norm_bwd", "add_rms_norm_fwd", "rms_norm_bwd", "rms_norm_fwd", "unavailable"]

_FWD_COLUMNS = 16384  # 16 warps hold a row in 32 registers a thread; 32768 would spill
_BWD_COLUMNS = 16384  # 16 warps hold a row of dweight's sum in 32, and as much of each of dy and x
_HELD_COLUMNS = 8192  # the weight too: beyond, it is loaded for each row, from the first cache
_LOOP_COLUMNS = 4096  # of a longer row at a time
_PART_ROWS = 128  # rows that one program of dweight's own kernel adds
_TILE = 8192  # elements of a tile of several rows
# Forward of rows that fit in a warp: more programs, each of which waits only for its own loads and sums. At 128 columns
# an H200 reached 84 % of the copy with 4096 elements a program, 73 % with 8192; the backward 77 % with 8192 and 74 %
# with four programs of 2048.
_SHORT_COLUMNS = 512
_SHORT_TILE = 4096


@dataclass(frozen=True)
class Forward:
    """A program computes BLOCK_R rows at once."""

    BLOCK_R: int
    num_warps: int


@dataclass(frozen=True)
class Backward:
    """`per_multiprocessor` programs for each one go through the rows, BLOCK_R at once, STAGES - 1 times that ahead."""

    BLOCK_R: int
    num_warps: int
    per_multiprocessor: int
    STAGES: int


def _warps(elements: int, each: int) -> int:
    """Warps whose threads have `each` elements."""
    return min(max(power_of_two(elements) // (32 * each), 1), 32)


@functools.cache
def forward_heuristic(C: int) -> Forward:
    """16 elements a thread: on an H200 a row of 8192 alone reaches 93 % of the copy, of 4096 87 %."""
    BLOCK_C = power_of_two(C)
    BLOCK_R = max((_SHORT_TILE if BLOCK_C <= _SHORT_COLUMNS else _TILE) // BLOCK_C, 1)
    return Forward(BLOCK_R, min(_warps(BLOCK_R * BLOCK_C, 16), 16))


@functools.cache
def backward_heuristic(C: int, column_bytes: int, most_ahead: int) -> Backward:
    """16 elements a thread; as many programs as registers allow; ahead what 96 kB of shared memory hold.

    Args:
        C: columns.
        column_bytes: that a row reads for each column.
        most_ahead: tiles, at most.
    """
    BLOCK_C = power_of_two(C)
    BLOCK_R = max(_TILE // BLOCK_C, 1)
    warps = _warps(BLOCK_R * BLOCK_C, 16)
    ahead = min((96 << 10) // (BLOCK_R * BLOCK_C * column_bytes), most_ahead)
    return Backward(BLOCK_R, warps, max(16 // warps, 1), 1 + ahead)


def forward_candidates(C: int) -> tuple[Forward, ...]:
    BLOCK_C = power_of_two(C)
    tiles = sorted({max(t // BLOCK_C, 1) for t in (2048, 4096, 8192)})
    return tuple(dict.fromkeys(Forward(r, _warps(r * BLOCK_C, each)) for r in tiles for each in (8, 16, 32, 64)))


def backward_candidates(C: int) -> tuple[Backward, ...]:
    BLOCK_C = power_of_two(C)
    tiles = sorted({max(t // BLOCK_C, 1) for t in (2048, 4096)})
    pairs = dict.fromkeys((r, _warps(r * BLOCK_C, each)) for r in tiles for each in (8, 16, 32))
    shapes = [(r, w, n, s) for r, w in pairs for n in (1, 2, 4) for s in (1, 2, 3, 4) if 8 <= n * w <= 64]
    return tuple(Backward(*shape) for shape in shapes)


@triton.jit
def _rsqrt(v):
    """v^(-1/2) to less than one rounding: a Newton step whose residual is exact; tl.rsqrt alone is off by two."""
    r = tl.rsqrt(v)
    product = v * r
    residual = tl.fma(-product, r, 1.0) - tl.fma(v, r, -product) * r
    return tl.where((v > 0.0) & (v < float("inf")), tl.fma(0.5 * r, residual, r), r)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [R, C] T
    residual_ptr,  # [R, C] T; unused without ADD
    w_ptr,  # [C] T
    y_ptr,  # [R, C] T
    sum_ptr,  # [R, C] T; unused without ADD
    rstd_ptr,  # [R] f32
    x_stride_r,
    residual_stride_r,
    R,
    C,
    eps,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # power of two >= C
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (r < R)[:, None] & (c < C)
    # int64: r * stride passes 2^31 at 64k rows of 32k columns
    row = r.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * x_stride_r + c, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride_r + c, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * C + c, x, mask=mask)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    rstd = _rsqrt(tl.div_rn(tl.sum(x * x, axis=1), C * 1.0) + eps)
    tl.store(rstd_ptr + r, rstd, mask=r < R)
    y = x * rstd[:, None] * w
    tl.store(y_ptr + row * C + c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_fwd_loop_kernel(
    x_ptr,  # [R, C] T
    residual_ptr,  # [R, C] T; unused without ADD
    w_ptr,  # [C] T
    y_ptr,  # [R, C] T
    sum_ptr,  # [R, C] T; unused without ADD
    rstd_ptr,  # [R] f32
    x_stride_r,
    residual_stride_r,
    C,
    eps,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + r * x_stride_r + c, mask=c < C, other=0.0)
        if ADD:
            residual = tl.load(residual_ptr + r * residual_stride_r + c, mask=c < C, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + r * C + c, x, mask=c < C)
        x = x.to(tl.float32)
        squares += x * x
    rstd = _rsqrt(tl.div_rn(tl.sum(squares, axis=0), C * 1.0) + eps)
    tl.store(rstd_ptr + r, rstd)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + r * x_stride_r + c, mask=c < C, other=0.0)
        if ADD:  # added again: each thread would have to wait for its own store
            residual = tl.load(residual_ptr + r * residual_stride_r + c, mask=c < C, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        y = x.to(tl.float32) * rstd * w
        tl.store(y_ptr + r * C + c, y.to(y_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # [R, C] T
    dsum_ptr,  # [R, C] T; unused without ADD
    x_ptr,  # [R, C] T: what was normalised
    w_ptr,  # [C] T
    rstd_ptr,  # [R] f32
    dx_ptr,  # [R, C] T
    part_ptr,  # [programs, C] f32: dweight over the rows of each program
    dy_stride_r,
    dsum_stride_r,
    x_stride_r,
    R,
    C,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # power of two >= C
    HELD: tl.constexpr,  # the weight stays in registers
    STAGES: tl.constexpr,  # tiles of dy, x and dsum on their way, by asynchronous copies
):
    programs = tl.num_programs(0)
    tiles = tl.cdiv(R, BLOCK_R)
    c = tl.arange(0, BLOCK_C)[None, :]
    if HELD:
        w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    part = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (r < R)[:, None] & (c < C)
        row = r.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + row * dy_stride_r + c, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride_r + c, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)[:, None]
        if ADD:
            dsum = tl.load(dsum_ptr + row * dsum_stride_r + c, mask=mask, other=0.0)
        x_hat = x * rstd
        part += dy * x_hat
        if not HELD:
            w = tl.load(w_ptr + c, mask=c < C, other=0.0)
        g = dy * w.to(tl.float32)
        mean = tl.sum(g * x_hat, axis=1)[:, None] / C
        dx = (g - x_hat * mean) * rstd
        if ADD:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + row * C + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(part, axis=0)[None, :], mask=c < C)


@triton.jit
def _rms_norm_bwd_loop_kernel(
    dy_ptr,  # [R, C] T
    dsum_ptr,  # [R, C] T; unused without ADD
    x_ptr,  # [R, C] T
    w_ptr,  # [C] T
    rstd_ptr,  # [R] f32
    dx_ptr,  # [R, C] T
    dy_stride_r,
    dsum_stride_r,
    x_stride_r,
    C,
    ADD: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + r)
    products = tl.zeros([BLOCK_C], tl.float32)
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        g = tl.load(dy_ptr + r * dy_stride_r + c, mask=c < C, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        products += g * (tl.load(x_ptr + r * x_stride_r + c, mask=c < C, other=0.0).to(tl.float32) * rstd)
    mean = tl.sum(products, axis=0) / C
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        g = tl.load(dy_ptr + r * dy_stride_r + c, mask=c < C, other=0.0).to(tl.float32)
        g *= tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        x_hat = tl.load(x_ptr + r * x_stride_r + c, mask=c < C, other=0.0).to(tl.float32) * rstd
        dx = (g - x_hat * mean) * rstd
        if ADD:
            dx += tl.load(dsum_ptr + r * dsum_stride_r + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(dx_ptr + r * C + c, dx.to(dx_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _rms_norm_dweight_parts_kernel(
    dy_ptr,  # [R, C] T
    x_ptr,  # [R, C] T
    rstd_ptr,  # [R] f32
    part_ptr,  # [cdiv(R, PART_ROWS), C] f32
    dy_stride_r,
    x_stride_r,
    R,
    C,
    PART_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.zeros([BLOCK_C], tl.float32)
    for i in range(0, min(PART_ROWS, R - p * PART_ROWS)):
        r = p.to(tl.int64) * PART_ROWS + i
        dy = tl.load(dy_ptr + r * dy_stride_r + c, mask=c < C, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r * x_stride_r + c, mask=c < C, other=0.0).to(tl.float32)
        part += dy * (x * tl.load(rstd_ptr + r))
    tl.store(part_ptr + p.to(tl.int64) * C + c, part, mask=c < C)


@triton.jit
def _rms_norm_dweight_kernel(
    part_ptr,  # [P, C] f32
    dw_ptr,  # [C] T
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dw = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for begin in range(0, P, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)[:, None]
        dw += tl.load(part_ptr + p.to(tl.int64) * C + c, mask=(p < P) & (c < C), other=0.0)
    tl.store(dw_ptr + c, tl.sum(dw, axis=0)[None, :].to(dw_ptr.dtype.element_ty), mask=c < C)


def _forward(
    name: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, rstd: Tensor
) -> None:
    (R, C), ADD = x.shape, residual is not None
    if R * C == 0:
        return
    x, weight = rows(x), rows(weight)
    residual = x if residual is None else rows(residual)
    tensors = (x, residual, weight, y, total, rstd)
    strides = (x.stride(0), residual.stride(0))

    def run(launch: Forward) -> None:
        constants = (ADD, launch.BLOCK_R, power_of_two(C))
        grid = (cdiv(R, launch.BLOCK_R),)
        start(_rms_norm_fwd_kernel, grid, (*tensors, *strides, R, C, eps), constants, num_warps=launch.num_warps)

    with on_device_of(x):
        if C > _FWD_COLUMNS:
            start(_rms_norm_fwd_loop_kernel, (R,), (*tensors, *strides, C, eps), (ADD, _LOOP_COLUMNS), num_warps=8)
        else:
            heuristic, candidates = forward_heuristic(C), functools.partial(forward_candidates, C)
            run(choose(name, (x.dtype, C, R), x.device, heuristic, candidates, run))


def _backward(
    name: str, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor, dweight: Tensor
) -> None:
    (R, C), ADD = x.shape, dsum is not None
    if R * C == 0:
        dweight.zero_()
        return
    dy, x, weight = rows(dy), rows(x), rows(weight)
    dsum = dy if dsum is None else rows(dsum)
    strides = (dy.stride(0), dsum.stride(0), x.stride(0))

    def add_parts(parts: Tensor) -> None:
        # 128-byte lines of a part; enough programs and rows in flight for a few MB
        grid = (cdiv(C, 32),)
        start(_rms_norm_dweight_kernel, grid, (parts, dweight, len(parts), C), (64, 32), num_warps=8)

    def run(launch: Backward) -> None:
        programs = min(multiprocessors(x.device) * launch.per_multiprocessor, cdiv(R, launch.BLOCK_R))
        parts = torch.empty((programs, C), dtype=torch.float32, device=x.device)
        args = (dy, dsum, x, weight, rstd, dx, parts, *strides, R, C)
        constants = (ADD, launch.BLOCK_R, power_of_two(C), C <= _HELD_COLUMNS, launch.STAGES)
        start(_rms_norm_bwd_kernel, (programs,), args, constants, num_warps=launch.num_warps)
        add_parts(parts)

    with on_device_of(x):
        if C > _BWD_COLUMNS:
            args = (dy, dsum, x, weight, rstd, dx, *strides, C)
            start(_rms_norm_bwd_loop_kernel, (R,), args, (ADD, _LOOP_COLUMNS), num_warps=8)
            parts = torch.empty((cdiv(R, _PART_ROWS), C), dtype=torch.float32, device=x.device)
            args = (dy, x, rstd, parts, dy.stride(0), x.stride(0), R, C)
            grid = (cdiv(C, 1024), len(parts))
            start(_rms_norm_dweight_parts_kernel, grid, args, (_PART_ROWS, 1024), num_warps=4)
            add_parts(parts)
        else:
            tensors = 2 + ADD + (C > _HELD_COLUMNS)
            most_ahead = 1 if is_amd(x.device) else 3  # there what is ahead waits in registers, some 40 a thread
            heuristic = backward_heuristic(C, tensors * x.element_size(), most_ahead)
            candidates = functools.partial(backward_candidates, C)
            run(choose(name, (x.dtype, C, R), x.device, heuristic, candidates, run))


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    y, rstd = results = table.RMS_NORM.allocate("fwd", (x, weight, eps))
    _forward("rms_norm_fwd", x, None, weight, eps, y, y, rstd)
    return results


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    results = table.RMS_NORM.allocate("bwd", (dy, x, weight, rstd))
    _backward("rms_norm_bwd", dy, None, x, weight, rstd, *results)
    return results


def add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    y, total, rstd = results = table.ADD_RMS_NORM.allocate("fwd", (x, residual, weight, eps))
    _forward("add_rms_norm_fwd", x, residual, weight, eps, y, total, rstd)
    return results


def add_rms_norm_bwd(dy: Tensor, dsum: Tensor, sum: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    results = table.ADD_RMS_NORM.allocate("bwd", (dy, dsum, sum, weight, rstd))
    _backward("add_rms_norm_bwd", dy, dsum, sum, weight, rstd, *results)
    return results
