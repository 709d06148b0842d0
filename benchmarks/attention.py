"""attention, causal: training at several lengths, so that time and memory can be drawn against them, and a decode."""

from __future__ import annotations

import torch

from llama_fast.config import LlamaConfig
from llama_fast.verify import Case

from .harness import Benchmark


def _case(preset: str, T: int, S: int, share: int = 1) -> Case:
    """Heads of a preset, or of one of `share` devices that split them."""
    c = LlamaConfig.preset(preset)
    return Case(
        "attention",
        {"B": 1, "T": T, "S": S, "H": c.n_heads // share, "G": c.n_kv_heads // share, "D": c.head_dim},
    )


BENCHMARKS = tuple(
    Benchmark(case, dtype, label, quick=quick and dtype == torch.bfloat16)
    for case, label, quick in (
        (_case("llama-7b", 2048, 2048, share=4), "llama-7b, a quarter of its heads", True),
        (_case("llama-3.2-1b", 512, 512), "llama-3.2-1b", False),
        (_case("llama-3.2-1b", 1024, 1024), "llama-3.2-1b", False),
        (_case("llama-3.2-1b", 2048, 2048), "llama-3.2-1b", False),
        (_case("llama-3.2-1b", 4096, 4096), "llama-3.2-1b", False),
        (_case("llama-3.2-1b", 1, 2048), "llama-3.2-1b, a decode step", False),
    )
    for dtype in (torch.bfloat16, torch.float32)
) + tuple(
    Benchmark(
        Case("attention", {"B": B, "T": T, "S": T, "H": H, "G": G, "D": D}, options),
        dtype,
        label,
        device="cuda",
    )
    for label, dtype, B, T, H, G, D, options in (
        ("T16k D128", torch.bfloat16, 1, 16384, 16, 16, 128, {}),
        ("4xT4k D128", torch.bfloat16, 4, 4096, 16, 16, 128, {}),  # as FlashAttention-3 reports it
        ("4xT4k 32/8 D128", torch.bfloat16, 4, 4096, 32, 8, 128, {}),
        ("8xT2k D64", torch.bfloat16, 8, 2048, 32, 32, 64, {}),
        ("T16k window4k", torch.bfloat16, 1, 16384, 16, 16, 128, {"window": 4096}),
        ("2xT2k D128 fp32", torch.float32, 2, 2048, 16, 16, 128, {}),
    )
)
