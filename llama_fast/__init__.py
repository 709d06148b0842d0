"""Custom kernels for LLaMA-architecture models, on the CPU and on GPUs, with a hand-written backward pass."""

import importlib
from typing import TYPE_CHECKING, Any

from llama_fast import nn
from llama_fast.config import LlamaConfig
from llama_fast.memory import keep_host_memory
from llama_fast.model import Llama
from llama_fast.ops.attention import attention
from llama_fast.ops.dispatch import NotSupported, backend, explain
from llama_fast.ops.linear_cross_entropy import linear_cross_entropy
from llama_fast.ops.rms_norm import add_rms_norm, rms_norm
from llama_fast.ops.rope import rope
from llama_fast.ops.swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "Llama",
    "LlamaConfig",
    "NotSupported",
    "add_rms_norm",
    "attention",
    "backend",
    "explain",
    "keep_host_memory",
    "linear_cross_entropy",
    "nn",
    "rms_norm",
    "rope",
    "swiglu",
]


if TYPE_CHECKING:
    from llama_fast import hf as hf
else:

    def __getattr__(name: str) -> Any:
        """`llama_fast.hf`, imported when first used, since it imports transformers."""
        if name == "hf":
            return importlib.import_module("llama_fast.hf")
        raise AttributeError(f"module 'llama_fast' has no attribute {name!r}")
