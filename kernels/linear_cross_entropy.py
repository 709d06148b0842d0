"""linear_cross_entropy: the row kernel. A row of logits becomes its loss, and is overwritten with its own gradient.
A second one is for logits that are computed again, some classes at a time, when lse is known.

A program takes a row, twice: once for the largest logit and the sum of exponentials, in float32 and one pass, the
target's left out; once for the gradient. With m the largest, s the sum over the other classes of e^(x - m) and e_t =
e^(x_t - m): p_t - 1 = -s / (s + e_t), and where the target leads, -log p_t = log1p(s): no difference of near numbers is
taken. The products and the chunks of rows are in llama_fast/ops/chunks.py, the derivation is in
docs/ops/linear_cross_entropy.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.launch import on_device_of, power_of_two, start, unavailable
from llama_fast.ops import chunks

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd", "unavailable"]


@dataclass(frozen=True)
class Launch:
    """A program goes through its row BLOCK_V columns at a time."""

    BLOCK_V: int
    num_warps: int


def heuristic(V: int) -> Launch:
    """16 elements a thread and turn; 8 warps, so that several rows share a multiprocessor and one's sums hide."""
    BLOCK_V = min(power_of_two(V), 4096)
    return Launch(BLOCK_V, max(BLOCK_V // 512, 1))


@triton.jit
def _log1p(s):
    """log(1 + s), s >= 0: where the sum would lose digits of s, 2 atanh(s / (2 + s)) as a series."""
    z = s / (2.0 + s)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7 + z2 * (1.0 / 9)))))
    return tl.where(s < 0.4, series, tl.log(1.0 + s))


@triton.jit
def _cross_entropy_rows_kernel(
    x_ptr,  # [R, V] T; with GRADIENT overwritten
    targets_ptr,  # [R] i64
    row_scale_ptr,  # [R] f32; unused without GRADIENT
    loss_ptr,  # [R] f32
    lse_ptr,  # [R] f32
    x_stride_r,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)  # int64: r * V passes 2^31
    x_ptr += r * x_stride_r
    target = tl.load(targets_ptr + r)
    if target == ignore_index:
        tl.store(loss_ptr + r, 0.0)
        tl.store(lse_ptr + r, 0.0)
        if GRADIENT:
            for begin in range(0, V, BLOCK_V):
                v = begin + tl.arange(0, BLOCK_V)
                tl.store(x_ptr + v, tl.zeros([BLOCK_V], x_ptr.dtype.element_ty), mask=v < V)
    else:
        valid = (target >= 0) & (target < V)  # else everything becomes NaN, and nothing outside the row is touched
        x_t = tl.load(x_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
        # a running maximum and sum for each lane, one exponential an element
        top = tl.full([BLOCK_V], -float("inf"), tl.float32)
        sums = tl.zeros([BLOCK_V], tl.float32)
        # mean_v (x - x_t) / V: the sum of huge logits would be infinite, and their difference to lse lost
        mean = tl.zeros([BLOCK_V], tl.float32)
        origin = tl.where(tl.abs(x_t) < float("inf"), x_t, 0.0)
        pivot = origin * (1.0 / V)
        for begin in range(0, V, BLOCK_V):
            v = begin + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
            if SMOOTHING:
                mean += tl.where(v < V, x * (1.0 / V) - pivot, 0.0)
            x = tl.where(v == target, -float("inf"), x)
            gap = x - top
            e = tl.where(x == -float("inf"), 0.0, tl.exp(-tl.abs(gap)))
            sums = tl.where(gap > 0, sums * e + 1.0, sums + e)
            top = tl.where(gap > 0, x, top)
        others = tl.max(top, axis=0)
        m = tl.maximum(others, x_t)
        s = tl.sum(sums * tl.exp(top - m), axis=0)
        whole = s + tl.exp(x_t - m)
        log_whole = tl.log(whole)
        lse = m + log_whole
        loss = tl.where(x_t >= others, _log1p(s), log_whole + (m - x_t))
        if SMOOTHING:
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (log_whole + (m - origin) - tl.sum(mean, axis=0))
        loss += z_loss * lse * lse
        tl.store(loss_ptr + r, loss)
        tl.store(lse_ptr + r, lse)
        if GRADIENT:
            scale = tl.load(row_scale_ptr + r)
            slope = 2.0 * z_loss * lse
            p_t = tl.exp(x_t - m) / whole
            dx_t = (1.0 - label_smoothing) * (-s / whole) + label_smoothing * (p_t - 1.0 / V) + slope * p_t
            for begin in range(0, V, BLOCK_V):
                v = begin + tl.arange(0, BLOCK_V)
                x = tl.load(x_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
                dx = tl.exp(x - m) / whole * (1.0 + slope) - label_smoothing / V
                dx = scale * tl.where(v == target, dx_t, dx)
                tl.store(x_ptr + v, dx.to(x_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _cross_entropy_piece_kernel(
    x_ptr,  # [B, k] T; overwritten
    targets_ptr,  # [B] i64
    dtarget_ptr,  # [B] T
    lse_ptr,  # [B] f32
    row_scale_ptr,  # [B] f32
    x_stride_r,
    k,
    first,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    BLOCK_V: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)  # int64: r * k passes 2^31
    x_ptr += r * x_stride_r
    target = tl.load(targets_ptr + r)
    ignored = target == ignore_index
    dx_t = tl.load(dtarget_ptr + r).to(tl.float32)
    # where the target is none of the classes lse is NaN, and so is the row
    lse = tl.load(lse_ptr + r)
    scale = tl.load(row_scale_ptr + r)
    slope = 2.0 * z_loss * lse
    for begin in range(0, k, BLOCK_V):
        v = begin + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < k, other=-float("inf")).to(tl.float32)
        dx = scale * (tl.exp(x - lse) * (1.0 + slope) - label_smoothing / V)
        dx = tl.where(v == target - first, dx_t, dx)
        dx = tl.where(ignored, 0.0, dx)
        tl.store(x_ptr + v, dx.to(x_ptr.dtype.element_ty), mask=v < k)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    loss: Tensor,
    lse: Tensor,
) -> None:
    R, V = logits.shape
    launch = heuristic(V)
    scale = loss if row_scale is None else row_scale.contiguous()
    args = (logits, targets.contiguous(), scale, loss, lse, logits.stride(0), V, ignore_index, label_smoothing, z_loss)
    constants = (row_scale is not None, label_smoothing != 0.0, launch.BLOCK_V)
    with on_device_of(logits):
        start(_cross_entropy_rows_kernel, (R,), args, constants, num_warps=launch.num_warps)


def cross_entropy_piece(
    logits: Tensor,
    targets: Tensor,
    dtarget: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    first: int,
    V: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    B, k = logits.shape
    launch = heuristic(k)
    rows = (logits, targets.contiguous(), dtarget, lse, row_scale.contiguous())
    args = (*rows, logits.stride(0), k, first, V, ignore_index, label_smoothing, z_loss)
    with on_device_of(logits):
        start(_cross_entropy_piece_kernel, (B,), args, (launch.BLOCK_V,), num_warps=launch.num_warps)


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.primitives(cross_entropy_rows, cross_entropy_piece)
