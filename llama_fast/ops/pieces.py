"""dweight of linear_cross_entropy by blocks of classes, in no more memory than the logits of 512 rows.

Summed by chunks of rows, dweight is rounded once a chunk: few, large chunks are needed. Summed by blocks of classes it
is rounded once, but every block needs the gradients P of all rows' logits, which are too large to keep. Yet dweight
[V, C] itself has room for P of C rows until it is computed: they wait there, block by block, and leave as their block's
sum moves in. Of the rows behind them the last chunk is added afterwards, and the others' logits are computed again, a
block at a time.

    letters: R rows, C inputs, V classes, K classes of a block, A rows whose P is kept, B rows computed again, A + B = E
    dweight, block b: [K, C] at b K C, and until then P of the first A rows: [A, K] at the same place, A <= C
    scratch [512, V]: first the logits of a chunk of rows, then P [E, K] of a block

Reasons, error and time: docs/ops/linear_cross_entropy.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.ops import linear

# (logits [B, k], targets [B], dtarget [B], lse [B], row_scale [B], first, V, ignore_index, label_smoothing, z_loss) ->
# None: overwrites the logits of the classes from `first` on with their gradient, which at the target is `dtarget`.
PieceKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int, float, float], None]


@dataclass(frozen=True)
class Sizes:
    """From which size on, and in what units; another one in `SIZES` is for tests.

    Args:
        rows: of a chunk; fewer make W, read once a chunk and a product, the bottleneck.
        most_in_chunks: up to so many rows four chunks of rows take little more memory, and less time.
        classes: K is a multiple: whole tiles of the products, and rows that start on 16-byte boundaries.
        waste: what the products by blocks may take, over those of all classes at once: few classes leave
            multiprocessors without a tile.
    """

    rows: int = 512
    most_in_chunks: int = 4096
    classes: int = 128
    waste: float = 1.15


SIZES = Sizes()
_MULTIPROCESSORS = 132  # of a Hopper; with another number the last turn of a block's products is less full


@dataclass(frozen=True)
class Plan:
    """kept: A, the rows whose gradients wait in dweight. end: E, the rows in blocks of classes. classes: K."""

    kept: int
    end: int
    classes: int


@functools.lru_cache
def plan(R: int, C: int, V: int, sizes: Sizes) -> Plan | None:
    """The blocks, of those that fill more than half of the scratch, that keep the multiprocessors busiest.

    None: by chunks of rows.
    """
    if sizes.most_in_chunks >= R or R > 2 * C:  # beyond, most rows would have their logits computed twice
        return None
    end = R if R <= C else (R - 1) // sizes.rows * sizes.rows
    again = end - min(end, C)
    most = sizes.rows * V // end // sizes.classes * sizes.classes

    def cost(K: int) -> int:
        blocks = (V // K, K), (1, V % K)
        return sum(n * (end * _turns(k, C) + C * _turns(again, k)) for n, k in blocks)

    K = min(range(most, most // 2, -sizes.classes), key=cost, default=0)
    whole = (end * _tiles(V, C) + C * _tiles(again, V)) / _MULTIPROCESSORS
    return Plan(min(end, C), end, K) if K and cost(K) <= sizes.waste * whole else None


def _tiles(M: int, N: int) -> int:
    """128 x 256 each, of a product [M, N]."""
    return -(-M // 128) * -(-N // 256)


def _turns(M: int, N: int) -> int:
    """That the multiprocessors take to make the tiles of a product."""
    return -(-_tiles(M, N) // _MULTIPROCESSORS)


class Pieces:
    """The sum of the first `plan.end` rows: `add` every chunk of these in turn, then `finish`.

    Args:
        plan: of these sizes.
        kernel: the backend's.
        hidden: [R, C]. weight: [V, C]. targets, row_scale: [R].
        lse: [R], of these rows complete when `finish` is called.
        dweight: [V, C], contiguous: scratch until `finish`, then the result.
        options: ignore_index, label_smoothing, z_loss.
    """

    def __init__(
        self,
        plan: Plan,
        kernel: PieceKernel,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lse: Tensor,
        row_scale: Tensor,
        dweight: Tensor,
        options: tuple[int, float, float],
    ) -> None:
        self.plan, self.kernel, self.options = plan, kernel, options
        self.weight, self.dweight = weight, dweight
        self.hidden = hidden[: plan.end]
        self.targets, self.lse, self.row_scale = (x[plan.kept : plan.end] for x in (targets, lse, row_scale))
        self.dtarget = hidden.new_empty(plan.end - plan.kept)

    def add(self, dlogits: Tensor, begin: int) -> None:
        """Takes what is needed later of the gradients [r, V] of rows from `begin` on: all of them, or the target's.

        The target's, p - 1, cannot be had again from a logit without a difference of near numbers.
        """
        kept = min(max(self.plan.kept - begin, 0), dlogits.shape[0])
        if kept:
            self._keep(dlogits[:kept], begin)
        if kept < dlogits.shape[0]:
            first = begin + kept - self.plan.kept
            rows = slice(first, first + dlogits.shape[0] - kept)
            # a target outside the classes has a row of NaN, and ignore_index one of zeros, in any column
            column = self.targets[rows].clamp(0, dlogits.shape[1] - 1).unsqueeze(1)
            torch.gather(dlogits[kept:], 1, column, out=self.dtarget[rows].unsqueeze(1))

    def _keep(self, dlogits: Tensor, begin: int) -> None:
        (V, C), K, rows = self.dweight.shape, self.plan.classes, dlogits.shape[0]
        blocks, rest, start = V // K, V % K, self.dweight.storage_offset()
        place = self.dweight.as_strided((blocks, rows, K), (K * C, K, 1), start + begin * K)
        _copy(dlogits[:, : blocks * K].unflatten(1, (blocks, K)).transpose(0, 1), place)
        if rest:
            place = self.dweight.as_strided((rows, rest), (rest, 1), start + blocks * K * C + begin * rest)
            _copy(dlogits[:, blocks * K :], place)

    def finish(self, scratch: Tensor) -> None:
        """The sum, block by block, through `scratch` of at least SIZES.rows * V elements."""
        V, (A, E, K) = self.dweight.shape[0], (self.plan.kept, self.plan.end, self.plan.classes)
        scratch = scratch.view(-1)
        for first in range(0, V, K):
            classes = slice(first, min(first + K, V))
            dweight, k = self.dweight[classes], min(K, V - first)
            dlogits = scratch[: E * k].view(E, k)
            dlogits[:A].copy_(dweight.view(-1)[: A * k].view(A, k))
            if E > A:
                logits = linear.nt(self.hidden[A:], self.weight[classes], out=dlogits[A:])
                rows = (self.targets, self.dtarget, self.lse, self.row_scale)
                self.kernel(logits, *rows, first, V, *self.options)
            linear.tn(dlogits, self.hidden, out=dweight)


def start(
    kernel: PieceKernel | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    row_scale: Tensor | None,
    dweight: Tensor,
    options: tuple[int, float, float],
) -> Pieces | None:
    """The sum of these sizes, or None: by chunks of rows. float32 is summed in place, by any number of chunks."""
    if kernel is None or row_scale is None or hidden.element_size() != 2:
        return None
    found = plan(hidden.shape[0], hidden.shape[1], weight.shape[0], SIZES)
    return None if found is None else Pieces(found, kernel, hidden, weight, targets, lse, row_scale, dweight, options)


def _copy(x: Tensor, to: Tensor) -> None:
    """Eight bytes at a time where rows allow: torch copies what has gaps element by element."""
    if all(n % 4 == 0 for y in (x, to) for n in (y.shape[-1], y.storage_offset(), *y.stride()[:-1])):
        x, to = x.view(torch.int64), to.view(torch.int64)
    to.copy_(x)
