"""Loading the native libraries: one that was built for another version of this Python code is reported and not used."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch  # noqa: F401  before the libraries, whose OpenMP symbols resolve to the runtime that torch loads

INTERFACE = 1  # `kInterface` of csrc/ops.h
_CALLED = {
    "_native": ("the native library", "install g++ and reinstall llama_fast"),
    "_native_cuda": ("the CUDA library", "install CUDA's nvcc, and llama_fast again"),
    "_native_cuda_emulated": ("the emulated CUDA library", "run make build"),
}


@functools.cache
def load(name: str) -> tuple[Any, str | None]:
    """The module `llama_fast.<name>` and None, or None and why not; a library of another version is warned of too."""
    called, remedy = _CALLED[name]
    try:
        module = importlib.import_module(f"llama_fast.{name}")
    except ImportError as error:
        return None, f"{called} is not built ({error}): {remedy}"
    found = getattr(module, "interface", 0)  # 0: from before there was a number
    if found != INTERFACE:
        reason = f"{called} is of another version: run make build (its interface is {found}, expected {INTERFACE})"
        warnings.warn(f"llama_fast: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    return module, None
