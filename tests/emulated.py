"""Compiles CUDA sources for the emulator (csrc/emulator) with g++ alone, and loads them. Nothing of CUDA is needed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parents[1]
KERNELS = Path(__file__).parent / "kernels"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DLLAMA_FAST_EMULATE",
]


def unavailable() -> str | None:
    """Why sources cannot be compiled here, or None."""
    return None if shutil.which("g++") else "no g++"


def no_nvcc() -> str | None:
    """Why no PTX can be made of CUDA sources here, or None."""
    missing = [tool for tool in ("nvcc", "nm", "c++filt") if shutil.which(tool) is None]
    return f"no {', '.join(missing)}" if missing else None


@functools.cache
def _folder() -> Path:
    """Of this process."""
    folder = Path(os.environ["LLAMA_FAST_TESTS_FOLDER"], str(os.getpid()))
    folder.mkdir()
    return folder


def _compile(*arguments: str | Path) -> None:
    command = ["g++", *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{KERNELS}", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def _emulator() -> Path:
    """Compiled by the first of the processes that share a run (pytest -n) and waited for by the others."""
    folder = Path(os.environ["LLAMA_FAST_TESTS_FOLDER"], "emulator")
    folder.mkdir(exist_ok=True)
    target = folder / "libemulator.so"

    def compiled(source: Path) -> Path:
        _compile("-O2", "-c", source, "-o", part := folder / f"{source.stem}.o")
        return part

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            objects = list(pool.map(compiled, sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))))
            _compile("-shared", *objects, "-o", target)
    return target


@functools.cache
def _headers() -> Path:
    """What all kernels include, compiled once: parsing it takes longer than compiling a small kernel."""
    header = _folder() / "headers.h"
    header.write_text('#include "cuda/launch.cuh"\n#include "cuda/tensor_map.cuh"\n')
    _compile("-O1", "-x", "c++-header", header, "-o", f"{header}.gch")
    return header


@functools.cache
def load(name: str, planted: tuple[str, str] | None = None, copy: str = "") -> ctypes.CDLL:
    """tests/kernels/<name>.cu with the emulator; its functions `run_...` give a text, "" or the report of a fault.

    `planted`: a part of the source and what stands there instead, for a bug that has to be caught. `copy`: tells
    libraries apart that are otherwise equal.
    """
    text = (KERNELS / f"{name}.cu").read_text()
    if planted is not None:
        assert text.count(planted[0]) == 1, f"{name}.cu has {text.count(planted[0])} times: {planted[0]}"
        text = text.replace(*planted)
    source = _folder() / f"{name}{copy}_{abs(hash(planted))}.cu"
    source.write_text(text)
    target = source.with_suffix(".so")
    headers = ("-Winvalid-pch", "-include", _headers())
    _compile("-O1", "-shared", *headers, "-x", "c++", source, "-x", "none", _emulator(), "-o", target)
    return ctypes.CDLL(str(target))


def _names(mangled: Iterable[str]) -> list[str]:
    """Of kernels, without their parameters: those are other types in an emulated build."""
    done = subprocess.run(["c++filt"], check=True, capture_output=True, text=True, input="\n".join(mangled))
    return [re.sub(r"\((?!anonymous).*", "", line) for line in done.stdout.splitlines()]


@functools.cache
def ptx(source: Path, arch: str) -> str:
    """What nvcc makes of a CUDA source, without fused multiply-adds, which g++ does not make either."""
    target = _folder() / f"{source.stem}.ptx"
    flags = ["-std=c++17", f"-arch={arch}", "-fmad=false", "-w", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
    subprocess.run(["nvcc", *flags, "-ptx", str(source), "-o", str(target)], check=True)
    return target.read_text()


def replace_kernels(library: ctypes.CDLL, function: str, text: str, emulator: ctypes.CDLL | None = None) -> list[str]:
    """Has the kernels of an emulated library run what PTX says in place of what g++ made; gives their names.

    `function`: one that the library exports, to find it in memory. `emulator`: what it is linked with, where that is
    another than `load` links.
    """
    symbols = subprocess.run(["nm", library._name], check=True, capture_output=True, text=True).stdout
    entries = re.findall(r"\.entry\s+(\w+)", text)
    mangled = [line.split() for line in symbols.splitlines() if re.search(r" [tTwW] _Z\w+$", line)]
    offsets = dict(zip(_names(name for *_, name in mangled), (int(at, 16) for at, *_ in mangled), strict=True))
    replaced = []
    replace = (emulator or ctypes.CDLL(str(_emulator()))).llama_fast_emulator_replace
    replace.restype = ctypes.c_char_p
    for entry, name in zip(entries, _names(entries), strict=True):
        if name in offsets:
            anchor, offset = ctypes.cast(getattr(library, function), ctypes.c_void_p), ctypes.c_size_t(offsets[name])
            report = replace(anchor, offset, text.encode(), entry.encode())
            assert report == b"", report
            replaced.append(name)
    return replaced


def run(library: ctypes.CDLL, function: str, *arguments: object) -> str:
    """Calls `run_<function>`; tensors go as their addresses."""
    f = getattr(library, f"run_{function}")
    f.restype = ctypes.c_char_p
    return f(*[ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in arguments]).decode()


def configure(seed: int = 0, race_check: bool = True, workers: int = 2, proxy_fences: bool = True) -> None:
    """What the launches from here on run under: `Options` of csrc/emulator/block.h."""
    f = ctypes.CDLL(str(_emulator())).llama_fast_emulator_configure
    f(ctypes.c_uint64(seed), race_check, workers, proxy_fences)


def counters() -> dict[str, int]:
    """What the launches since the last call did."""
    values = (ctypes.c_int64 * 7)()
    ctypes.CDLL(str(_emulator())).llama_fast_emulator_counters(values)
    return dict(
        zip(("launches", "blocks", "switches", "mma", "wgmma", "ldmatrix", "bank_conflicts"), values, strict=True)
    )


class Device:
    """Tensors as the emulated device knows them, and the PTX interpreter."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(_emulator()))
        self._library.llama_fast_emulator_map.restype = ctypes.c_void_p
        self._library.llama_fast_emulator_run_ptx.restype = ctypes.c_char_p

    def pointer(self, x: Tensor, label: str) -> int:
        """The address of `x` as a kernel's argument; `x` has to outlive its use."""
        bytes_ = x.untyped_storage().nbytes()
        return self._library.llama_fast_emulator_map(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(bytes_), label.encode()
        )

    def tensor_map(self, x: Tensor, box: tuple[int, ...], label: str) -> bytes:
        """A TMA map of `x`, fastest dimension first, with the 128-byte swizzle."""
        out, size = ctypes.create_string_buffer(128), x.element_size()
        sizes = (ctypes.c_int64 * x.ndim)(*reversed(x.shape))
        strides = (ctypes.c_int64 * x.ndim)(*(s * size for s in reversed(x.stride())))
        base = ctypes.c_void_p(self.pointer(x, label))
        self._library.llama_fast_emulator_tensor_map(
            out, base, x.ndim, size, sizes, strides, (ctypes.c_int * x.ndim)(*box)
        )
        return out.raw

    def run_ptx(self, text: str, entry: str, grid: tuple[int, ...], block: int, shared: int, parameters: bytes) -> str:
        """Runs an entry of a PTX module; "" or what went wrong."""
        shapes = [(ctypes.c_uint * 3)(*g, *[1] * (3 - len(g))) for g in (grid, (block,))]
        shared_size, size = ctypes.c_size_t(shared), ctypes.c_size_t(len(parameters))
        run = self._library.llama_fast_emulator_run_ptx
        return run(text.encode(), entry.encode(), *shapes, shared_size, parameters, size).decode()


def size(x: Tensor) -> ctypes.c_size_t:
    """Bytes, as an argument of `run`."""
    return ctypes.c_size_t(x.numel() * x.element_size())
