"""Launchers of the native library: allocate the results, call the kernel. Tensors are checked before they come here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import chunks, library, table
from llama_fast.ops.dispatch import plain
from llama_fast.ops.linear import flat, rows
from llama_fast.ops.table import Op

_native, _reason = library.load("_native")

INPLACE = frozenset({"swiglu_fwd", "swiglu_bwd"})  # whose results may be the memory of arguments


def unavailable() -> str | None:
    """Why the native library cannot be used, or None."""
    return _reason


def isas() -> list[str]:
    """Instruction sets that this processor runs, best first; the last is "portable". Empty without the library."""
    return [] if _native is None else _native.cpu.isas()


def isa() -> str:
    """The instruction set in use."""
    return _native.cpu.isa()


def amd_family() -> int:
    """Family of an AMD processor (25: Zen 3 and 4, 26: Zen 5), 0 for any other maker's."""
    return _native.cpu.amd_family()


def set_isa(name: str) -> None:
    """Makes the CPU kernels use one of `isas()`; "" goes back to the best. For tests: holds for the whole process."""
    _native.cpu.set_isa(name)


def _launcher(op: Op, direction: str) -> Callable[..., tuple[Tensor, ...]]:
    name = f"{op.name}_{direction}"

    def launch(*args: Any, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        args = tuple(rows(a) if isinstance(a, Tensor) and a.ndim > 0 else a for a in args)
        results = into or op.allocate(direction, args)
        getattr(_native.cpu, name)(*args, *results)
        return results

    launch.__name__ = name
    return launch


rms_norm_fwd = _launcher(table.RMS_NORM, "fwd")
rms_norm_bwd = _launcher(table.RMS_NORM, "bwd")
add_rms_norm_fwd = _launcher(table.ADD_RMS_NORM, "fwd")
add_rms_norm_bwd = _launcher(table.ADD_RMS_NORM, "bwd")
swiglu_fwd = _launcher(table.SWIGLU, "fwd")
swiglu_bwd = _launcher(table.SWIGLU, "bwd")
rope_fwd = _launcher(table.ROPE, "fwd")
rope_bwd = _launcher(table.ROPE, "bwd")
attention_fwd = _launcher(table.ATTENTION, "fwd")
attention_bwd = _launcher(table.ATTENTION, "bwd")


# ---- the parts of a block of few rows, and a whole step of a decode --------------------------------------------------
def block_before(
    x_BTC: Tensor,
    weights: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
    qkv: tuple[Tensor, Tensor, Tensor],
) -> bool:
    """Writes q [B, T, H, D], k and v [B, T, G, D] of a block, `block_before` of csrc/ops.h; False where it takes no
    such tensors. weights: those of `block.Weights` in its order; cos, sin: [1 or B, T, D/2] float32."""
    if _native is None:
        return False
    layer = (*weights, None, None, eps, interleaved, 0)
    try:
        _native.cpu.block_before(rows(flat(x_BTC)), layer, cos, sin, *(t.flatten(2).flatten(0, 1) for t in qkv))
    except ValueError:
        return False
    return True


def block_after(out_BTHD: Tensor, x_BTC: Tensor, weights: Sequence[Tensor | None], eps: float, head_dim: int) -> Tensor:
    """The result [B, T, C] of a block whose `block_before` took x and whose attention gave `out`."""
    y = x_BTC.new_empty(x_BTC.shape)
    layer = (*weights, None, None, eps, False, 0)
    _native.cpu.block_after(flat(out_BTHD.flatten(2)), rows(flat(x_BTC)), layer, head_dim, flat(y))
    return y


def decode_plan(
    embed: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Sequence[tuple[Any, ...]],
    norm: Tensor,
    eps: float,
    head: Tensor,
) -> Any:
    """The native plan of these CPU tensors (`DecodePlan` of csrc/ops.h), or None where it does not take them.

    layers: of each, those of `block.Weights` in its order, the caches of k and v [B, S, G, D], eps, interleaved,
    window. The plan holds addresses, and nothing alive.
    """
    if _native is None:
        return None
    try:
        return _native.cpu.DecodePlan(embed, cos, sin, list(layers), norm, eps, head)
    except ValueError:  # another dtype, sizes that do not fit each other, too many rows
        return None


def argmax(x: Tensor) -> Tensor:
    """The place of the largest number of each row of x [R, V], V >= 1, as float32: [R] int64, the first of equals."""
    if _native is None or not x.is_cpu or not plain(x) or x.dtype == torch.float64:
        return x.float().argmax(-1)
    best = x.new_empty(x.shape[0], dtype=torch.int64)
    _native.cpu.argmax(rows(x), best)
    return best


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------
_row_kernel: Any = None if _native is None else _native.cpu.cross_entropy_rows
_huge_pages: Any = None if _native is None else _native.cpu.use_huge_pages
linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.primitives(_row_kernel, on_new=_huge_pages)
