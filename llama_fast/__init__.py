"""Custom kernels for LLaMA-architecture models, on the CPU and on GPUs, with a hand-written backward pass."""

from llama_fast.memory import keep_host_memory
from llama_fast.ops.dispatch import NotSupported, backend, explain
from llama_fast.ops.rms_norm import add_rms_norm, rms_norm
from llama_fast.ops.rope import rope
from llama_fast.ops.swiglu import swiglu

__version__ = "0.1.0"

__all__ = ["NotSupported", "add_rms_norm", "backend", "explain", "keep_host_memory", "rms_norm", "rope", "swiglu"]
