"""Cross entropy of a linear layer's output without its logits: public function and autograd.

Forward: for "mean" and "sum" the gradients are computed in the forward pass, chunk by chunk while a chunk's logits
exist, and kept until the backward, which only scales them, in place, by the incoming gradient: nothing of size [R, V]
is kept. Backward for "none": any gradient may come in, so the logits are computed again. So they are in float16, whose
gradients must not be rounded before a gradient scaler's factor is in: it is there to keep them from vanishing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import table
from llama_fast.ops.dispatch import (
    autocast_dtype,
    forced,
    no_autocast,
    once_differentiable,
    plain,
    primitives,
    readable,
    recorded,
    refuse_transforms,
)

_fwd, _bwd = primitives["linear_cross_entropy_fwd"], primitives["linear_cross_entropy_bwd"]

_REDUCTIONS = ("mean", "sum", "none")


def _wanted(gradients: tuple[Tensor, ...], options: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if wants else None for g, wants in zip(gradients, options[-2:], strict=True))


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple[Any, ...]) -> Tensor:
        loss = _fwd(hidden, weight, targets, None, *options[:-2], False, False)[0]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options, ctx.backend = options, forced()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _bwd(dloss.contiguous(), *ctx.saved_tensors, *ctx.options, backend=ctx.backend)
        return *_wanted(gradients, ctx.options), None, None


class _LinearCrossEntropySum(torch.autograd.Function):
    """sum_r loss[r] / count. The first backward hands out the gradients of the forward pass, scaled in place: they
    belong to nobody else. A second one through a retained graph computes them again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        loss, _, dhidden, dweight = _fwd(hidden, weight, targets, _row_scale(count.reciprocal(), targets), *options)
        ctx.save_for_backward(hidden, weight, targets, count)
        ctx.gradients, ctx.options, ctx.backend = (dhidden, dweight), options, forced()
        return _total(loss, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            *inputs, count = ctx.saved_tensors
            gradients = _bwd(_row_scale(dloss / count, inputs[-1]), *inputs, *ctx.options, backend=ctx.backend)
        # on a CPU reading the scalar costs nothing; elsewhere it would wait for the device
        elif dloss.device.type != "cpu" or dloss.item() != 1.0:
            for g in gradients:
                g.mul_(dloss)
        return *_wanted(gradients, ctx.options), None, None, None


class _LinearCrossEntropySumTraced(torch.autograd.Function):
    """The same for torch.compile and its like, which see saved tensors only and no change in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        loss, _, dhidden, dweight = _fwd(hidden, weight, targets, _row_scale(count.reciprocal(), targets), *options)
        ctx.save_for_backward(dhidden, dweight)
        ctx.options = options
        return _total(loss, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple((g * dloss).to(g.dtype) for g in ctx.saved_tensors)
        return *_wanted(gradients, ctx.options), None, None, None


def _row_scale(scale: Tensor, targets: Tensor) -> Tensor:
    return scale.expand(targets.shape)


def _total(loss: Tensor, count: Tensor) -> Tensor:
    """The sum in float64, rounded once."""
    return (loss.sum(dtype=torch.float64) / count).to(loss.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of the logits `hidden @ weight.T` against `targets`; the [R, V] logits never exist together.

        x = hidden W^T,   lse[r] = log sum_v e^x[r,v],   V classes, e = label_smoothing
        loss[r] = lse[r] - (1 - e) x[r,targets[r]] - e mean_v x[r,v] + z_loss lse[r]^2;   0 where ignored

    Args:
        hidden: [..., C], float32 | bfloat16 | float16 | float64.
        weight: [V, C], dtype of `hidden` (under autocast any float dtype, and both are cast as for F.linear).
        targets: [...], int64, each in [0, V) or ignore_index.
        ignore_index: rows with this target have loss 0 and no gradient.
        label_smoothing: in [0, 1], as F.cross_entropy's.
        z_loss: >= 0, weight of lse^2, which keeps the logits' size in check.
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum", or "none".

    Returns:
        loss: scalar, or [...] for "none"; float32, float64 for float64 inputs.

    Gradient: dhidden, dweight, each only if it is wanted, computed in the forward pass for "mean" and "sum", and in the
        backward for "none" and in float16, where the loss may be scaled. Logits and their gradients are rounded to the
        dtype of `hidden`, as eager PyTorch does.
    Memory:   keeps the inputs, dhidden and dweight for the backward ("none", float16: the inputs). Beyond them the
        logits of 512 rows in float32; in half precision those of R/4 rows, below R 4096 of R/2 (256 to 1024), or those
        of 1024 rows and a float32 copy of dweight where this is less; with the backends `cuda` and `triton`,
        4096 < R <= 2 C and many classes (from V 16384 on at R 8192, C 4096), those of 512 rows.
    Error:    forward at most 1.0x, backward 1.5x that of F.cross_entropy(F.linear(hidden, weight).float(), targets) in
        the same dtype plus one ulp, against float64.
    Repeats:  bitwise, for equal shape, dtype, number of threads and backend.

    Raises:
        ValueError: shapes, dtypes or devices disagree, a target is outside the vocabulary, or an option out of range.
        NotSupported: no backend takes the call; the message lists every objection.

    Source: chunks with gradients in the forward pass: Hsu et al. 2024 (Liger-Kernel), arXiv:2410.10989. z_loss:
        Chowdhery et al. 2022 (PaLM), arXiv:2204.02311.
    """
    refuse_transforms()
    dtype = autocast_dtype(hidden)
    if dtype is not None and isinstance(weight, Tensor):
        hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    table.LINEAR_CROSS_ENTROPY.check(hidden=hidden, weight=weight, targets=targets)
    number = functools.partial(table.check_number, "linear_cross_entropy")
    number("ignore_index", ignore_index, "an integer", -(2**63), 2**63 - 1, whole=True)
    number("label_smoothing", label_smoothing, "a number in [0, 1]", 0.0, 1.0)
    number("z_loss", z_loss, "a number >= 0", 0.0)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}")
    rows, flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    _check_targets(flat, weight.shape[0], ignore_index)
    grad = torch.is_grad_enabled()
    options = (
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )
    with no_autocast(dtype, hidden):
        if reduction == "none":
            return _LinearCrossEntropyRows.apply(rows, weight, flat, options).view(targets.shape)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if reduction == "mean":
            count = (flat != ignore_index).sum(dtype=wide)
        else:
            count = torch.ones((), dtype=wide, device=flat.device)
        if recorded(rows, weight):
            if rows.dtype == torch.float16:
                return _total(_LinearCrossEntropyRows.apply(rows, weight, flat, options), count)
            traced = torch.compiler.is_compiling() or not plain(rows, weight, flat)
            summed = _LinearCrossEntropySumTraced if traced else _LinearCrossEntropySum
            return summed.apply(rows, weight, flat, count, options)
        return _total(_fwd(rows, weight, flat, None, *options)[0], count)


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    """Only where they can be read at no cost: on a GPU to look at the values means to wait for them."""
    if not readable(targets) or targets.numel() == 0:
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bool(bad.any()):
        r = int(bad.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: targets has {int(targets[r])} at row {r}, expected 0 <= target < V = {V} or "
            f"ignore_index = {ignore_index}"
        )
