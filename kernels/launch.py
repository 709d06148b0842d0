"""What the launchers of the Triton kernels share: device guard, launch parameters by device class, autotuning.

A kernel's launch parameters are a frozen dataclass that `choose` gives: the heuristic of its file, each number with the
reason; or what `force` names; or, within `autotune()`, the fastest of the file's candidates, timed once
for a device and a key of sizes and kept on disk. Autotuning is off by default: the first call must not take minutes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llama_fast.ops import proven

P = TypeVar("P")

# Triton's interpreter runs the kernels in NumPy on a CPU's tensors; it needs TRITON_INTERPRET=1 before Triton's import.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HIP = torch.version.hip is not None


def unavailable() -> str | None:
    """Why Triton's kernels cannot run on this machine, or None."""
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


_pretended: str | None = None


def device_class(device: torch.device) -> str:
    """What heuristics go by: "sm_90" and the like."""
    return _pretended or proven.device_class(device)


@contextlib.contextmanager
def pretend(name: str) -> Iterator[None]:
    """Within the block every device is of the class `name`: for compiling without one."""
    global _pretended  # noqa: PLW0603
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one: Triton launches there."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 under the interpreter, so that loops over them have more than one turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def is_amd(device: torch.device) -> bool:
    """Whether a GPU is AMD's."""
    return device_class(device).startswith("gfx")


def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's CDNA (gfx9..), 32 elsewhere."""
    return 64 if device_class(device).startswith("gfx9") else 32


# ---- launching ------------------------------------------------------------------------------------------------------
_compiled: dict[tuple[Any, ...], Any] = {}
_launched: dict[tuple[Any, ...], Any] = {}  # the same by the numbers themselves: a call like one before
_MOST_COMPILED = 4096
_NUMBERS = frozenset({int, float, bool, type(None)})


def start(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
) -> None:
    """kernel[grid](*args, *constants, **options), with less of the processor's time from the second call on.

    Triton looks at every argument at every launch for what it has specialised: a pointer's or a size's alignment to 16,
    a size of 1, sizes of 64 bits. The same is looked at here, and the compiled kernel is then launched as the result of
    Triton's `warmup` is.

    Args:
        kernel: the JIT function; its parameters are the arguments and then the constants.
        grid: programs in each direction.
        args: tensors, tensor descriptors, numbers and None, a tensor or a descriptor first.
        constants: compile-time values, hashable.
        options: num_warps, of 32 threads each, and other options of the compiler.
    """
    if INTERPRETED:
        kernel[grid](*args, *constants, **options)
        return
    seen = [
        a
        if type(a) in _NUMBERS
        else (a.base.dtype, *a.block_shape)
        if type(a) is TensorDescriptor
        else (a.dtype, a.data_ptr() & 15)
        for a in args
    ]
    first = args[0] if type(args[0]) is not TensorDescriptor else args[0].base
    # AMD's kernels reach a tensor of less than 2 GB by buffer instructions, whose offsets have 32 bits
    far = tuple([a.untyped_storage().nbytes() >> 31 > 0 for a in args if isinstance(a, Tensor)]) if _HIP else ()
    call = (id(kernel), first.device, constants, far, *options.values(), *seen, *map(type, args))
    compiled = _launched.get(call)
    if compiled is None:
        if len(_launched) >= _MOST_COMPILED:
            _launched.clear()
            _compiled.clear()
        key = (*call[: -2 * len(args)], *map(_specialized, seen))
        compiled = _compiled.get(key)
        if compiled is None:
            if lanes(first.device) == 64 and "num_warps" in options:
                options["num_warps"] = max(options["num_warps"] // 2, 1)
            # said, for Triton's default is about to change: products and sums fused, as the budgets have been checked
            _compiled[key] = kernel[grid](*args, *constants, enable_fp_fusion=True, **options)
            return
        _launched[call] = compiled
    compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _specialized(a: Any) -> Any:
    """What Triton compiles a kernel anew for: of a number; of a tensor `start` has it already."""
    return (a & 15, a == 1, a > 0x7FFFFFFF) if type(a) is int else a if type(a) is tuple else type(a)


def rows(x: Tensor) -> Tensor:
    """`x` as a kernel wants it: the last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def cdiv(n: int, step: int) -> int:
    """n / step, rounded up; triton.cdiv takes ten times as long."""
    return -(-n // step)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


# ---- launch parameters ----------------------------------------------------------------------------------------------
# Module state and not context variables: autograd runs a backward in a thread of its own.
_forced: dict[str, Any] = {}
_cache_file: Path | None = None
_choices: dict[str, tuple[Any, tuple[Any, ...]]] | None = None


@contextlib.contextmanager
def force(kernel: str, parameters: Any) -> Iterator[None]:
    """Within the block `kernel` is launched with these parameters, in every thread: for tests and tuning."""
    before = dict(_forced)
    _forced[kernel] = parameters
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def record() -> Iterator[dict[str, tuple[Any, tuple[Any, ...]]]]:
    """Gives a dictionary in which each kernel launched within the block has its (heuristic, candidates)."""
    global _choices  # noqa: PLW0603
    before, _choices = _choices, {}
    try:
        yield _choices
    finally:
        _choices = before


@contextlib.contextmanager
def autotune(file: Path | None = None) -> Iterator[None]:
    """Within the block, in every thread, launch parameters are measured where `file` does not have them yet.

    Args:
        file: JSON to read and add to; None is ~/.cache/llama_fast/autotune.json, or its place under XDG_CACHE_HOME.
    """
    global _cache_file  # noqa: PLW0603
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_fast"
    before, _cache_file = _cache_file, file or folder / "autotune.json"
    try:
        yield
    finally:
        _cache_file = before


def choose(
    kernel: str,
    sizes: tuple[Any, ...],
    device: torch.device,
    heuristic: P,
    candidates: Callable[[], Sequence[P]],
    run: Callable[[P], object],
) -> P:
    """The launch parameters of a call.

    Args:
        kernel: name of the kernel, as in `force`.
        sizes: what the choice depends on, besides the device.
        heuristic: the parameters unless others are forced or measured.
        candidates: gives what to measure within `autotune()`.
        run: launches the kernel with given parameters, as often as wanted with the same result.
    """
    if _choices is not None:
        _choices[kernel] = (heuristic, tuple(candidates()))
    if _forced and kernel in _forced:
        return _forced[kernel]
    if _cache_file is None or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return heuristic
    key = f"{kernel} {' '.join(map(str, sizes))} {torch.cuda.get_device_name(device)} triton {triton.__version__}"
    known = _read(_cache_file)
    if key not in known:
        times = {c: _time_of(c, run) for c in dict.fromkeys([heuristic, *candidates()])}
        known = _read(_cache_file) | {key: asdict(min(times, key=lambda c: times[c]))}  # type: ignore[call-overload]
        _write(_cache_file, known)
    return type(heuristic)(**known[key])


def _time_of(parameters: P, run: Callable[[P], object]) -> float:
    """Milliseconds; infinite where the device has no room for such a program."""
    try:
        return triton.testing.do_bench(lambda: run(parameters))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _write(file: Path, known: dict[str, Any]) -> None:
    """Whole or not at all: another process may read it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(known, indent=1, sort_keys=True))
    part.replace(file)
