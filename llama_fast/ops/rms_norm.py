"""RMSNorm, alone and fused with the residual addition before it: public functions and their autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import table
from llama_fast.ops.dispatch import apply, autocast_dtype, forced, once_differentiable, primitives
from llama_fast.ops.linear import flat

_rms_norm_fwd, _rms_norm_bwd = primitives["rms_norm_fwd"], primitives["rms_norm_bwd"]
_add_rms_norm_fwd, _add_rms_norm_bwd = primitives["add_rms_norm_fwd"], primitives["add_rms_norm_bwd"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _rms_norm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = forced()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _rms_norm_bwd(dy, x, weight, rstd, backend=ctx.backend)
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = _add_rms_norm_fwd(flat(x), flat(residual), weight, eps)
        # no views to autograd, which allows no change in place of one of several
        y, total = (torch.ops.aten._unsafe_view(t, x.shape) for t in (y, total))
        ctx.save_for_backward(total, weight, rstd)
        ctx.backend = forced()
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = _add_rms_norm_bwd(flat(dy), flat(dtotal), flat(total), weight, rstd, backend=ctx.backend)
        # one tensor for both, so that autograd sees it: two views of dx would become the memory of two .grad
        dx = dx.view(*total.shape)
        return dx, dx, dweight, None


def _weight_like(x: Tensor, weight: Tensor) -> Tensor:
    """Under autocast the gain may be float32 beside a half-precision x, as for F.rms_norm."""
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)  # the check that follows refuses anything else
    if tensors and weight.dtype != x.dtype and autocast_dtype(x) is not None:
        return weight.to(x.dtype)
    return weight


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of `x` to unit root-mean-square, then by `weight`.

        y[..., c] = x[..., c] * rstd[...] * weight[c],   rstd = (mean_c x^2 + eps)^(-1/2)

    Args:
        x: [..., C], float32 | bfloat16 | float16 | float64; a copy is made where the rows have no one stride or the
            last dimension is not contiguous.
        weight: [C], dtype of `x` (under autocast any float dtype).
        eps: added to mean(x^2), so in units of x^2.

    Returns:
        y: [..., C], dtype of `x`.

    Gradient: dx, dweight; dweight is summed over rows in float32 and rounded once.
    Memory:   saves x, weight, rstd; beyond its output allocates 4 bytes a row, and in the backward at most 64 float32
        rows of C.
    Error:    forward at most 1.0x, backward 1.5x that of F.rms_norm in the same dtype plus one ulp, against float64.
    Repeats:  bitwise, for equal shape, dtype and backend; on the CPU for any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or eps is negative.
        NotSupported: no backend takes the call; the message lists every objection.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    weight = _weight_like(x, weight)
    table.RMS_NORM.check(x=x, weight=weight)
    table.check_number("rms_norm", "eps", eps, "a number >= 0", low=0.0)
    if x.ndim == 2:
        return apply(_RMSNorm, x, weight, eps)
    return apply(_RMSNorm, flat(x), weight, eps).view(*x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add the residual stream, then `rms_norm` the sum: one pass over memory instead of two.

        sum = x + residual, rounded to the dtype of x;   y = rms_norm(sum, weight, eps)

    Args:
        x, residual: [..., C], float32 | bfloat16 | float16 | float64.
        weight: [C], dtype of `x` (under autocast any float dtype).
        eps: added to mean(sum^2).

    Returns:
        y, sum: [..., C] each, dtype of `x`.

    Gradient: d(sum) flows to x and residual alike, and dy through the norm; dweight is summed in float32.
    Memory:   saves sum, weight, rstd.
    Error:    as `rms_norm`.
    Repeats:  as `rms_norm`.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or eps is negative.
        NotSupported: no backend takes the call; the message lists every objection.
    """
    weight = _weight_like(x, weight)
    table.ADD_RMS_NORM.check(x=x, residual=residual, weight=weight)
    table.check_number("add_rms_norm", "eps", eps, "a number >= 0", low=0.0)
    return apply(_AddRMSNorm, x, residual, weight, eps)
