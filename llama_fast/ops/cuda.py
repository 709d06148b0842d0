"""Launchers of the CUDA library: allocate the results, queue the kernels on torch's current stream.

LLAMA_FAST_EMULATE=1, before the first import, takes the library in which the same kernels run in an emulator, on a
CPU's tensors: for tests (docs/emulator.md).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import chunks, library, table
from llama_fast.ops.native import rows
from llama_fast.ops.table import Op

INPLACE = frozenset({"swiglu_fwd", "swiglu_bwd"})  # whose results may be the memory of arguments
EMULATED = os.environ.get("LLAMA_FAST_EMULATE") == "1"

_library, _reason = library.load("_native_cuda_emulated" if EMULATED else "_native_cuda")


if _library is not None and not EMULATED and os.environ.get("LLAMA_FAST_LOG") == "debug":
    _library.set_synchronous(True)  # a fault in a kernel is then reported by its own op


def architectures() -> list[str]:
    """What the library was compiled for, as CMake names it: "80-real", "90a-real", "100". Empty without the library."""
    return [] if _library is None else _library.architectures.split()


def _runs_on(capability: tuple[int, int]) -> bool:
    """Whether the library has code for a device: a cubin of its major version, or PTX of an older or equal one."""
    version = 10 * capability[0] + capability[1]
    for name in architectures():
        number = int("".join(c for c in name if c.isdigit()))
        cubin, ptx = not name.endswith("-virtual"), not name.endswith("-real")
        if name.endswith("a-real"):  # instructions of this architecture alone
            runs = number == version
        else:
            runs = number <= version and (ptx or (cubin and number // 10 == capability[0]))
        if runs:
            return True
    return False


def unavailable() -> str | None:
    """Why the CUDA library cannot be used on this machine, or None."""
    if _library is None:
        return _reason
    if EMULATED:
        return None
    if torch.version.hip is not None:  # which answers to the name of cuda, with AMD's GPUs
        return "the CUDA library runs on NVIDIA GPUs, and this torch is built for AMD's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: no NVIDIA driver, no GPU, or a torch built without CUDA"
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not any(map(_runs_on, found)):
        names = ", ".join(f"sm_{major}{minor}" for major, minor in found)
        return f"the CUDA library was built for {' '.join(architectures())}, this machine has {names}"
    return None


def untimed(device: torch.device) -> str | None:
    """What of this build is not what the timings behind proven.json speak for on the device, or None."""
    if EMULATED or torch.cuda.get_device_capability(device) != (9, 0) or "90a-real" in architectures():
        return None
    # attention is another kernel there
    return f"the library is built for {' '.join(architectures())}, without 90a-real"


def _stream(x: Tensor) -> tuple[int, int]:
    """The current stream of the device of `x`, as the library takes it."""
    if EMULATED:
        return 0, 0
    index = x.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


Scratch = Callable[[list[Any]], Tensor]


def _launcher(op: Op, direction: str, scratch: Scratch | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The primitive of the library's function of its name; `scratch` gives a tensor that follows the results."""
    name = f"{op.name}_{direction}"
    tensors = [i for i, arg in enumerate(op.schema(direction).args) if arg.type == "Tensor"]

    def launch(*arguments: Any, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        args = list(arguments)
        for i in tensors:
            if args[i].stride(-1) != 1:
                args[i] = rows(args[i])
        results = into or op.allocate(direction, args)
        temporary = () if scratch is None else (scratch(args),)
        getattr(_library, name)(*args, *results, *temporary, _stream(args[0]))
        return results

    launch.__name__ = name
    return launch


@functools.lru_cache(maxsize=table.MOST_SHAPES)
def _norm_elements(R: int, C: int, item: int, device: int) -> int:
    return _library.norm_scratch(R, C, item, device)


def _norm_scratch(args: list[Any]) -> Tensor:
    """float32, for the parts of dweight."""
    dy = args[0]
    R, C = dy.shape
    return dy.new_empty(_norm_elements(R, C, dy.element_size(), dy.device.index or 0), dtype=torch.float32)


rms_norm_fwd = _launcher(table.RMS_NORM, "fwd")
rms_norm_bwd = _launcher(table.RMS_NORM, "bwd", _norm_scratch)
add_rms_norm_fwd = _launcher(table.ADD_RMS_NORM, "fwd")
add_rms_norm_bwd = _launcher(table.ADD_RMS_NORM, "bwd", _norm_scratch)
swiglu_fwd = _launcher(table.SWIGLU, "fwd")
swiglu_bwd = _launcher(table.SWIGLU, "bwd")
rope_fwd = _launcher(table.ROPE, "fwd")
rope_bwd = _launcher(table.ROPE, "bwd")


# ---- attention -------------------------------------------------------------------------------------------------------
def _heads(x: Tensor) -> Tensor:
    """`x` [B, T, heads, D] as the kernels read it: every row of D contiguous and on a 16-byte boundary."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[-1] % 8 == 0:
        return x  # the same as below, in a quarter of the time
    strides = x.stride()
    used = [s for s, n in zip(strides[:-1], x.shape, strict=False) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in used)
    return x if aligned and strides[-1] == 1 else x.clone(memory_format=torch.contiguous_format)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, ...]:
    q, k, v = _heads(q), _heads(k), _heads(v)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    results = table.ATTENTION.allocate("fwd", (q, k, v, cu_seqlens, scale, causal, window))
    scratch = q.new_empty(_library.attention_fwd_scratch() // 4, dtype=torch.int32)
    _library.attention_fwd(q, k, v, cu_seqlens, scale, causal, window, *results, scratch, _stream(q))
    return results


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, ...]:
    dout, q, k, v, out, lse = _heads(dout), _heads(q), _heads(k), _heads(v), _heads(out), lse.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    args = (dout, q, k, v, out, lse, cu_seqlens, scale, causal, window)
    results = table.ATTENTION.allocate("bwd", args)
    size = _library.attention_bwd_scratch(q, k, v, cu_seqlens, scale, q.device.index or 0)
    scratch = lse.new_empty(-(-size // 4))
    _library.attention_bwd(*args, *results, scratch, _stream(q))
    return results


def _cross_entropy_rows(logits: Tensor, *args: Any) -> None:
    _library.cross_entropy_rows(logits, *args, _stream(logits))


def _cross_entropy_piece(logits: Tensor, *args: Any) -> None:
    _library.cross_entropy_piece(logits, *args, _stream(logits))


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.primitives(_cross_entropy_rows, _cross_entropy_piece)
