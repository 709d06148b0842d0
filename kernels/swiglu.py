"""swiglu: y = gate s up, s = sigmoid(gate), elementwise over [R, F].

Everything is computed in float32 from the rounded inputs and rounded once. The backward reads dy, gate and up once and
writes dgate and dup; nothing accumulates. A program reads all that it needs before it writes: the results may take the
place of arguments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.launch import cdiv, choose, on_device_of, rows, start, unavailable
from llama_fast.ops import table

__all__ = ["INPLACE", "swiglu_bwd", "swiglu_fwd", "unavailable"]

INPLACE = frozenset({"swiglu_fwd", "swiglu_bwd"})


@dataclass(frozen=True)
class Launch:
    """A program computes BLOCK_F columns of one row, or of the whole as one row where no tensor has gaps."""

    BLOCK_F: int
    num_warps: int


HEURISTIC = Launch(BLOCK_F=2048, num_warps=8)  # 8 bf16 a thread: one 16-byte access a tensor
CANDIDATES = tuple(Launch(b, w) for b in (1024, 2048, 4096, 8192) for w in (4, 8))


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr,  # [R, F] T
    up_ptr,  # [R, F] T
    y_ptr,  # [R, F] T
    gate_stride_r,
    up_stride_r,
    y_stride_r,
    F,
    BLOCK_F: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK_F)  # of a row
    # int64: r * stride passes 2^31 at 64k rows of 32k columns
    r = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    gate = tl.load(gate_ptr + r * gate_stride_r + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + r * up_stride_r + f, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + r * y_stride_r + f, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr,  # [R, F] T
    gate_ptr,  # [R, F] T
    up_ptr,  # [R, F] T
    dgate_ptr,  # [R, F] T
    dup_ptr,  # [R, F] T
    dy_stride_r,
    gate_stride_r,
    up_stride_r,
    dx_stride_r,
    F,
    BLOCK_F: tl.constexpr,
):
    blocks = tl.cdiv(F, BLOCK_F)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    dy = tl.load(dy_ptr + r * dy_stride_r + f, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + r * gate_stride_r + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + r * up_stride_r + f, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    dup = dy * gate * s
    tl.store(dgate_ptr + r * dx_stride_r + f, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + r * dx_stride_r + f, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _launch(name: str, kernel: triton.JITFunction, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    first = inputs[0]
    R, F = first.shape
    if R * F == 0:
        return
    strides = [x.stride(0) for x in (*inputs, outputs[0])]
    if all(x.is_contiguous() for x in inputs):
        R, F = 1, R * F  # one long row: no block ends at a row's end

    def run(launch: Launch, outputs: tuple[Tensor, ...] = outputs) -> None:
        grid = (R * cdiv(F, launch.BLOCK_F),)
        start(kernel, grid, (*inputs, *outputs, *strides, F), (launch.BLOCK_F,), num_warps=launch.num_warps)

    @functools.cache
    def elsewhere() -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in outputs)

    def measured(launch: Launch) -> None:
        run(launch, elsewhere())  # many times: the arguments have to outlive it, whose place the outputs may take

    with on_device_of(first):
        run(choose(name, (first.dtype, R, F), first.device, HEURISTIC, lambda: CANDIDATES, measured))


def swiglu_fwd(gate: Tensor, up: Tensor, *, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    results = into or table.SWIGLU.allocate("fwd", (gate, up))
    _launch("swiglu_fwd", _swiglu_fwd_kernel, (rows(gate), rows(up)), results)
    return results


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, *, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    results = into or table.SWIGLU.allocate("bwd", (dy, gate, up))
    _launch("swiglu_bwd", _swiglu_bwd_kernel, (rows(dy), rows(gate), rows(up)), results)
    return results
