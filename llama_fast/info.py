"""What was built, what this machine can run, and why the rest cannot."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import llama_fast
from llama_fast.ops import cuda, dispatch, native
from llama_fast.ops.table import OPS, Backend, Op
from llama_fast.verify import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Support:
    """Whether a backend of an op can run on this machine.

    `dtypes` are those that run; `objection` says why none does, and is empty otherwise.
    """

    op: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    objection: str


def missing_tools() -> list[str]:
    """What a native build would lack on this machine."""
    missing = []
    if not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        missing.append("a C++ compiler (apt install g++)")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        missing.append(f"Python's headers in {include} (apt install python3-dev)")
    return missing


def machine() -> list[tuple[str, str]]:
    """Facts about this installation and machine, as (name, value)."""
    facts = [
        ("llama_fast", f"{llama_fast.__version__} in {Path(llama_fast.__file__).parent}"),
        ("Python, torch", f"{platform.python_version()}, {torch.__version__}"),
        ("machine", f"{platform.system()} {platform.machine()}, {_processor()}"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads, shared with PyTorch)"),
        ("native library", _native()),
    ]
    if native.unavailable() is None:
        best, *others = native.isas()
        rest = f"; also {', '.join(others)}" if others else ""
        facts.append(("instruction sets", f"{best}{rest}"))
    facts.append(("CUDA library", _cuda()))
    facts.append(("GPU", _gpu()))
    return facts


def support() -> Iterator[Support]:
    """Every op and backend, tried with the first case of `llama-fast verify` for that op."""
    for op in OPS.values():
        for b in op.backends:
            found = {dtype: _objection(op, b, dtype) for dtype in DTYPES}
            runs = tuple(dtype for dtype, text in found.items() if text is None)
            yield Support(op.name, b.name, runs, "" if runs else next(t for t in found.values() if t))


def brief() -> str:
    """One line: what runs the ops here; and where the native library is missing, what it lacks."""
    reason = native.unavailable()
    if reason is None:
        return f"llama_fast {llama_fast.__version__}: native library built, best instruction set {native.isas()[0]}"
    return f"llama_fast {llama_fast.__version__}: every op runs on plain PyTorch; {_native()}"


def _objection(op: Op, b: Backend, dtype: torch.dtype) -> str | None:
    device = b.device or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    case = next(c for c in CASES if c.op == op.name)
    return dispatch.objection(b, op.check(**case.inputs(dtype)), dtype, device)


def _native() -> str:
    reason = native.unavailable()
    if reason is None:
        return "built"
    if "not built" not in reason:
        return reason
    missing = missing_tools()
    lacks = f"this machine lacks {' and '.join(missing)}" if missing else "its tools are here now"
    return f"not built: {lacks}; then install llama_fast again"


def _cuda() -> str:
    if not cuda.architectures():
        return f"{cuda.unavailable()}"
    reason = cuda.unavailable()
    return f"built for {' '.join(cuda.architectures())}" + (f"; {reason}" if reason else "")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")
