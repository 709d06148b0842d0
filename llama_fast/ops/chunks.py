"""linear_cross_entropy by chunks of rows, whose logits are the only ones that exist (but see pieces.py).

A backend gives the kernel that turns a chunk's logits into losses and, in place, into their own gradient; the products
are the vendor's (llama_fast/ops/linear.py). Reasons and derivation: docs/ops/linear_cross_entropy.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llama_fast.ops import linear, pieces, table

# (logits [r, V], targets [r], row_scale [r] | None, ignore_index, label_smoothing, z_loss, loss [r], lse [r]) -> None:
# writes loss and lse; with row_scale, overwrites the logits with the gradient of sum_r row_scale[r] loss[r].
RowKernel = Callable[[Tensor, Tensor, "Tensor | None", int, float, float, Tensor, Tensor], None]

_CHUNKS = (
    4  # each adds its dweight to the sum in half precision, rounding: 4 keep the error within 1.5x of one rounding
)
_CHUNK_ROWS = 512  # fewer make W, read once a chunk and a product, the bottleneck
_SUMMED_ROWS = 1024  # the same where a half-precision dweight, or its float32 accumulator, is read and written too


def plan(R: int, C: int, V: int, item: int, dweight: bool) -> tuple[int, bool]:
    """(rows of a chunk, whether dweight is summed in a float32 copy): the least memory that keeps speed and error."""
    if not dweight or item == 4:
        return min(R, _CHUNK_ROWS), False
    rows = max(-(-R // _CHUNKS), min(-(-R // 2), _SUMMED_ROWS), min(R, _CHUNK_ROWS // 2))
    if rows * item <= _SUMMED_ROWS * item + C * 4:  # bytes for each class of V
        return rows, False
    return _SUMMED_ROWS, True


def _part(x: Tensor, chunk: slice | None) -> Tensor:
    """Rows of `x`; all where chunk is None, without the microseconds of a slice."""
    return x if chunk is None else x[chunk]


def primitives(
    row_kernel: RowKernel,
    piece_kernel: pieces.PieceKernel | None = None,
    on_new: Callable[[Tensor], None] = lambda _: None,
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """The launchers `linear_cross_entropy_fwd` and `linear_cross_entropy_bwd` made of a row kernel.

    With a `piece_kernel` half-precision gradients of weights are summed as in llama_fast/ops/pieces.py where that has a
    plan. `on_new` is called with each large tensor before it is first written.
    """

    def linear_cross_entropy_fwd(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_scale: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        wants_dhidden: bool,
        wants_dweight: bool,
    ) -> tuple[Tensor, ...]:
        hidden, weight = linear.rows(hidden), linear.rows(weight)
        wants = (wants_dhidden, wants_dweight)
        args = (hidden, weight, targets, row_scale, ignore_index, label_smoothing, z_loss, *wants)
        loss, lse, dhidden, dweight = results = table.LINEAR_CROSS_ENTROPY.allocate("fwd", args)
        (R, C), V = hidden.shape, weight.shape[0]
        if R == 0:
            dweight.zero_()
            return results
        step, accumulator = plan(R, C, V, hidden.element_size(), wants_dweight)
        options = (ignore_index, label_smoothing, z_loss)
        by_classes = None
        if wants_dweight:
            by_classes = pieces.start(piece_kernel, hidden, weight, targets, lse, row_scale, dweight, options)
        if by_classes is not None:
            step, accumulator = pieces.SIZES.rows, False
        logits_buffer = hidden.new_empty(step, V)
        total = hidden.new_empty(V, C, dtype=torch.float32) if accumulator else dweight
        for new in (logits_buffer, total):
            on_new(new)
        if accumulator:
            total.zero_()
        for begin in range(0, R, step):
            if by_classes is not None and begin == by_classes.plan.end:
                by_classes.finish(logits_buffer)
            end = min(begin + step, R)
            chunk = None if step == R else slice(begin, end)
            some_hidden = _part(hidden, chunk)
            logits = linear.nt(some_hidden, weight, out=_part(logits_buffer, chunk and slice(0, end - begin)))
            scale = None if row_scale is None else _part(row_scale, chunk)
            row_kernel(logits, _part(targets, chunk), scale, *options, _part(loss, chunk), _part(lse, chunk))
            # the logits are their own gradient now
            if wants_dhidden:
                linear.nn(logits, weight, out=_part(dhidden, chunk))
            if by_classes is not None and begin < by_classes.plan.end:
                by_classes.add(logits, begin)
            elif wants_dweight:
                linear.tn(logits, some_hidden, out=total, accumulate=accumulator or begin > 0)
        if by_classes is not None and by_classes.plan.end == R:
            by_classes.finish(logits_buffer)
        elif accumulator:
            dweight.copy_(total)
        return results

    def linear_cross_entropy_bwd(
        dloss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        wants_dhidden: bool,
        wants_dweight: bool,
    ) -> tuple[Tensor, ...]:
        options = (ignore_index, label_smoothing, z_loss, wants_dhidden, wants_dweight)
        return linear_cross_entropy_fwd(hidden, weight, targets, dloss, *options)[2:]

    return linear_cross_entropy_fwd, linear_cross_entropy_bwd
