"""rms_norm and add_rms_norm at the sizes of a 4096-wide model, beside F.rms_norm (plus the addition)."""

from __future__ import annotations

import torch

from llama_fast.verify import Case

from .harness import Benchmark

BENCHMARKS = tuple(
    Benchmark(Case(op, {"...": (4096,), "C": 4096}), dtype, quick=dtype == torch.bfloat16)
    for op in ("rms_norm", "add_rms_norm")
    for dtype in (torch.bfloat16, torch.float32)
)
