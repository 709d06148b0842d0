"""One device: nothing to join."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """What the block calls where a tensor enters and leaves its column- and row-parallel products.

    Each is the other's transpose, so the backward pass calls the opposite one on the gradient.
    """

    def gather(self, x: Tensor) -> Tensor:
        """Rows [r, C] of this device -> rows [R, C] of all, before a column-parallel product."""

    def reduce(self, x: Tensor) -> Tensor:
        """Partial sums [R, C] of this device -> their sum over devices, its rows [r, C], after a row-parallel one."""


class Single:
    """The collectives of one device: each gives its argument back."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor) -> Tensor:
        return x
