"""rope at the heads of published models, halves and interleaved pairs."""

from __future__ import annotations

import torch

from llama_fast.config import LlamaConfig
from llama_fast.verify import Case

from .harness import Benchmark


def _case(preset: str, B: int, T: int, interleaved: bool) -> Case:
    c = LlamaConfig.preset(preset)
    sizes = {"B": B, "T": T, "H": c.n_heads, "G": c.n_kv_heads, "D": c.head_dim}
    return Case("rope", sizes, {"interleaved": True} if interleaved else {})


BENCHMARKS = tuple(
    Benchmark(
        _case(preset, B, 2048, interleaved),
        dtype,
        preset,
        quick=preset == "llama-7b" and dtype == torch.bfloat16 and not interleaved,
    )
    for preset, B, interleaved in (
        ("llama-7b", 2, False),
        ("llama-7b", 2, True),
        ("llama-3.2-1b", 1, False),
        ("llama-3-8b", 1, False),
    )
    for dtype in (torch.bfloat16, torch.float32)
) + tuple(
    Benchmark(Case("rope", {"B": B, "T": 8192, "H": 32, "G": 8, "D": 128}, options), dtype, label, device="cuda")
    for label, B, options, dtype in (
        ("4x8192 32+8x128", 4, {}, torch.bfloat16),
        ("interleaved", 4, {"interleaved": True}, torch.bfloat16),
        ("2x8192 fp32", 2, {}, torch.float32),
    )
)
