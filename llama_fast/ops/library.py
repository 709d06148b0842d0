"""Loading the native libraries: one that was built for another version of this Python code is reported and not used."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

import torch  # before the libraries, whose OpenMP symbols resolve to the runtime that torch loads

INTERFACE = 6  # `kInterface` of csrc/ops.h
PACKAGE = Path(__file__).resolve().parents[1]
_CALLED = {
    "_native": ("the native library", "install g++ and reinstall llama_fast"),
    "_native_cuda": ("the CUDA library", "install CUDA's nvcc, and llama_fast again"),
    "_native_cuda_emulated": ("the emulated CUDA library", "run make build"),
}


@functools.cache
def load(name: str) -> tuple[Any, str | None]:
    """The module `llama_fast.<name>` and None, or None and why not.

    One that is there and not used is warned of too, and an installed one that a source tree without it hides.
    """
    called, remedy = _CALLED[name]
    _share_openmp()
    try:
        module = importlib.import_module(f"llama_fast.{name}")
    except ModuleNotFoundError as error:
        hidden = _installed(name)
        if hidden is None:
            return None, f"{called} is not built ({error}): {remedy}"
        return None, _refuse(
            f"{called} in {hidden} is not used: Python found the source tree {PACKAGE.parent} before it; start "
            "Python in another folder, or run `pip install -e .` in this one"
        )
    except ImportError as error:  # it lacks a library or a symbol that was there when it was built
        return None, _refuse(f"{called} cannot be loaded ({error}): run make build, or reinstall llama_fast")
    found = getattr(module, "interface", 0)  # 0: from before there was a number
    if found != INTERFACE:
        return None, _refuse(
            f"{called} is of another version: run make build (its interface is {found}, expected {INTERFACE})"
        )
    return module, None


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _share_openmp() -> None:
    """Lets other libraries see torch's own OpenMP runtime, and no other copy: on ARM64 torch keeps it to itself."""
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    try:  # a lookup in a library goes on in those that it needs
        parallel = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
    except (AttributeError, OSError):  # a torch without OpenMP, or of another make: loading ours says what is missing
        return
    symbol = _Symbol()
    if ctypes.CDLL(None).dladdr(ctypes.cast(parallel, ctypes.c_void_p), ctypes.byref(symbol)) != 0:
        ctypes.CDLL(symbol.file.decode(), mode=ctypes.RTLD_GLOBAL)


def _installed(name: str) -> Path | None:
    """The folder of another, installed llama_fast that has the library."""
    folders = (Path(str(d.locate_file(PACKAGE.name))) for d in importlib.metadata.distributions(name=PACKAGE.name))
    return next((f for f in folders if f.resolve() != PACKAGE and any(f.glob(f"{name}.*"))), None)


def _refuse(reason: str) -> str:
    warnings.warn(f"llama_fast: {reason}", RuntimeWarning, stacklevel=3)
    return reason
