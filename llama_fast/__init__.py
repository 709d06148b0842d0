"""Custom kernels for LLaMA-architecture models, on the CPU and on GPUs, with a hand-written backward pass."""

from llama_fast.ops.attention import attention
from llama_fast.ops.dispatch import NotSupported, backend, explain
from llama_fast.ops.rms_norm import add_rms_norm, rms_norm

__version__ = "0.1.0"

__all__ = ["NotSupported", "add_rms_norm", "attention", "backend", "explain", "rms_norm"]
