"""Compiles CUDA sources for the emulator (csrc/emulator) with g++ alone, and loads them. Nothing of CUDA is needed."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = Path(__file__).parent / "kernels"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLLAMA_FAST_EMULATE"]


def unavailable() -> str | None:
    """Why sources cannot be compiled here, or None."""
    return None if shutil.which("g++") else "no g++"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="llama_fast_emulated_"))


def _compile(*arguments: str | Path) -> None:
    subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, arguments)], check=True)


@functools.cache
def _emulator() -> tuple[Path, ...]:
    objects = []
    for source in sorted((ROOT / "csrc" / "emulator").glob("*.cpp")):
        target = _folder() / f"{source.stem}.o"
        _compile("-c", source, "-o", target)
        objects.append(target)
    return tuple(objects)


@functools.cache
def load(name: str, *defines: str) -> ctypes.CDLL:
    """tests/kernels/<name>.cu with the emulator. Its functions `run_...` give a text: "" or the report of a fault."""
    target = _folder() / f"{'_'.join((name, *defines)).replace('=', '_')}.so"
    _compile(
        "-shared",
        *[f"-D{d}" for d in defines],
        "-x",
        "c++",
        KERNELS / f"{name}.cu",
        "-x",
        "none",
        *_emulator(),
        "-o",
        target,
    )
    return ctypes.CDLL(str(target))


def run(library: ctypes.CDLL, function: str, *arguments: object) -> str:
    """Calls `run_<function>`; tensors go as their addresses."""
    f = getattr(library, f"run_{function}")
    f.restype = ctypes.c_char_p
    return f(*[ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in arguments]).decode()
