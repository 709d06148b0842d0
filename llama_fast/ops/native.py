"""Launchers of the native library: allocate the results, call the kernel. Tensors are checked before they come here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import chunks, table
from llama_fast.ops.dispatch import plain
from llama_fast.ops.table import Op

_import_error: str | None = None
try:
    # torch (imported above) comes first: the library's OpenMP symbols resolve to the runtime that torch loads.
    from llama_fast import _native  # type: ignore[attr-defined]
except ImportError as error:
    _native = None
    _import_error = str(error)


def unavailable() -> str | None:
    """Why the native library cannot be used, or None."""
    if _native is None:
        return f"the native library is not built ({_import_error}): install g++ and reinstall llama_fast"
    return None


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


def rows(x: Tensor) -> Tensor:
    """`x` as a kernel wants it: the last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _launcher(op: Op, direction: str) -> Callable[..., tuple[Tensor, ...]]:
    name = f"{op.name}_{direction}"

    def launch(*args: Any) -> tuple[Tensor, ...]:
        args = tuple(rows(a) if isinstance(a, Tensor) and a.ndim > 0 else a for a in args)
        results = op.allocate(direction, args)
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


# ---- a whole block of a decode ---------------------------------------------------------------------------------------
DECODE_ROWS = 4  # gemv's


def decode_block(
    x: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    used: int,
    eps: float,
    interleaved: bool,
    window: int,
) -> Tensor | None:
    """The block on 1 to 4 rows x [B, T, C], whose keys and values are written to the caches at `used`; gives y.

    None, with nothing written, where the native call does not take these tensors: too many rows, another dtype or
    device, or shapes that do not fit. The ops one by one then compute it, or name what is wrong.
    """
    tensors = (x, *weights, cos, sin, k_cache, v_cache)
    few = 1 <= x.shape[0] * x.shape[1] <= DECODE_ROWS
    if _native is None or not few or not plain(*tensors) or not all(tensor.is_cpu for tensor in tensors):
        return None
    x = x.contiguous()
    y = torch.empty_like(x)
    try:
        done = _native.cpu.decode_block(x, *weights, cos, sin, k_cache, v_cache, used, eps, interleaved, window, y)
    except ValueError:  # a dtype that the library does not know, float64: costs nothing where there is none
        return None
    return y if done else None


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------
_row_kernel: Any = None if _native is None else _native.cpu.cross_entropy_rows
linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.primitives(_row_kernel)
