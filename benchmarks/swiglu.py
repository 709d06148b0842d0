"""swiglu at the size of a 7B model's feed-forward, beside F.silu(gate) * up."""

from __future__ import annotations

import torch

from llama_fast.verify import Case

from .harness import Benchmark

BENCHMARKS = tuple(
    Benchmark(Case("swiglu", {"...": (2048,), "F": 11008}), dtype, quick=dtype == torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32)
)
