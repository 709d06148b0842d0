"""Custom kernels for LLaMA-architecture models, on the CPU and on GPUs, with a hand-written backward pass.

The names of `__all__` are imported when first used, and torch with them: who only asks for help or for the version does
not wait for it. `llama_fast.hf` imports transformers in the same way.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
else:
    _HOME = {
        "Llama": "model",
        "LlamaConfig": "config",
        "NotSupported": "ops.dispatch",
        "add_rms_norm": "ops.rms_norm",
        "backend": "ops.dispatch",
        "explain": "ops.dispatch",
        "keep_host_memory": "memory",
        **{name: f"ops.{name}" for name in ("attention", "linear_cross_entropy", "rms_norm", "rope", "swiglu")},
    }

    def __getattr__(name: str) -> Any:
        if name in ("hf", "nn"):
            return importlib.import_module(f"llama_fast.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'llama_fast' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"llama_fast.{_HOME[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted([*__all__, "__version__", "hf"])
