"""swiglu at the feed-forward widths of published models."""

from __future__ import annotations

import torch

from llama_fast.config import LlamaConfig
from llama_fast.verify import Case

from .harness import Benchmark

BENCHMARKS = tuple(
    Benchmark(
        Case("swiglu", {"...": (rows,), "F": LlamaConfig.preset(preset).ffn_dim}),
        dtype,
        preset,
        quick=preset == "llama-7b" and dtype == torch.bfloat16,
    )
    for preset, rows in (("llama-7b", 2048), ("llama-3.2-1b", 2048), ("llama-3-8b", 2048), ("llama-65b", 1024))
    for dtype in (torch.bfloat16, torch.float32)
) + tuple(
    Benchmark(Case("swiglu", {"...": (rows,), "F": F}), dtype, f"{rows}x{F}", device="cuda")
    for rows, F, dtype in ((16384, 14336, torch.bfloat16), (8192, 11008, torch.float32))
)
