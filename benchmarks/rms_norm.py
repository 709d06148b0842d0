"""rms_norm and add_rms_norm: a training batch and one token, at the widths of published models."""

from __future__ import annotations

import torch

from llama_fast.config import LlamaConfig
from llama_fast.verify import Case

from .harness import Benchmark


def _benchmark(op: str, preset: str, rows: int, dtype: torch.dtype, quick: bool = False) -> Benchmark:
    return Benchmark(Case(op, {"...": (rows,), "C": LlamaConfig.preset(preset).dim}), dtype, preset, quick)


BENCHMARKS = tuple(
    _benchmark(op, preset, rows, dtype, quick=quick and dtype == torch.bfloat16)
    for op in ("rms_norm", "add_rms_norm")
    for preset, rows, quick in (
        ("llama-7b", 4096, True),
        ("llama-3.2-1b", 2048, False),
        ("llama-65b", 2048, False),
        ("llama-7b", 1, False),
    )
    for dtype in (torch.bfloat16, torch.float32)
) + tuple(
    Benchmark(Case(op, {"...": (rows,), "C": C}), dtype, f"{rows}x{C}", device="cuda")
    for op, rows, C, dtype in (
        ("rms_norm", 32768, 4096, torch.bfloat16),
        ("rms_norm", 8192, 8192, torch.bfloat16),
        ("rms_norm", 262144, 128, torch.bfloat16),  # the heads of a model that normalises q and k
        ("rms_norm", 4096, 32768, torch.bfloat16),  # rows that no registers hold
        ("rms_norm", 16384, 4096, torch.float32),
        ("add_rms_norm", 32768, 4096, torch.bfloat16),
        ("add_rms_norm", 16384, 4096, torch.float32),
    )
)
