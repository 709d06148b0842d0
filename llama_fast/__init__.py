"""Custom kernels for LLaMA-architecture models, on the CPU and on GPUs, with a hand-written backward pass."""

__version__ = "0.1.0"
