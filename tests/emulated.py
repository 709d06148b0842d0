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
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLLAMA_FAST_EMULATE"]


def unavailable() -> str | None:
    """Why sources cannot be compiled here, or None."""
    return None if shutil.which("g++") else "no g++"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="llama_fast_emulated_"))


def _compile(*arguments: str | Path) -> None:
    command = ["g++", *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{KERNELS}", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def _emulator() -> Path:
    target = _folder() / "libemulator.so"
    _compile("-O2", "-shared", *sorted((ROOT / "csrc" / "emulator").glob("*.cpp")), "-o", target)
    return target


@functools.cache
def load(name: str, planted: tuple[str, str] | None = None) -> ctypes.CDLL:
    """tests/kernels/<name>.cu with the emulator; its functions `run_...` give a text, "" or the report of a fault.

    `planted`: a part of the source and what stands there instead, for a bug that has to be caught.
    """
    text = (KERNELS / f"{name}.cu").read_text()
    if planted is not None:
        assert text.count(planted[0]) == 1, f"{name}.cu has {text.count(planted[0])} times: {planted[0]}"
        text = text.replace(*planted)
    source = _folder() / f"{name}_{abs(hash(planted))}.cu"
    source.write_text(text)
    target = source.with_suffix(".so")
    _compile("-O1", "-shared", "-x", "c++", source, "-x", "none", _emulator(), "-o", target)
    return ctypes.CDLL(str(target))


def run(library: ctypes.CDLL, function: str, *arguments: object) -> str:
    """Calls `run_<function>`; tensors go as their addresses."""
    f = getattr(library, f"run_{function}")
    f.restype = ctypes.c_char_p
    return f(*[ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in arguments]).decode()


def configure(seed: int = 0, race_check: bool = True, workers: int = 2) -> None:
    """What the launches from here on run under: the schedule's seed, the race checker, OS threads."""
    ctypes.CDLL(str(_emulator())).llama_fast_emulator_configure(ctypes.c_uint64(seed), race_check, workers)


def counters() -> dict[str, int]:
    """What the launches since the last call did."""
    values = (ctypes.c_int64 * 7)()
    ctypes.CDLL(str(_emulator())).llama_fast_emulator_counters(values)
    return dict(
        zip(("launches", "blocks", "switches", "mma", "wgmma", "ldmatrix", "bank_conflicts"), values, strict=True)
    )
