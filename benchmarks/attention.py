"""attention, causal, at the sizes of a training step and of a decode, beside scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.verify import Case

from .harness import Benchmark


def _sdpa_repeated(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Grouped heads with k and v repeated: the way to PyTorch's fused kernel where enable_gqa takes the plain one."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


def _case(T: int, S: int, H: int, G: int, D: int) -> Case:
    return Case("attention", {"B": 1, "T": T, "S": S, "H": H, "G": G, "D": D})


BENCHMARKS = tuple(
    Benchmark(case, dtype, quick=quick and dtype == torch.bfloat16, peers=peers)
    for case, quick, peers in (
        (_case(2048, 2048, 8, 8, 128), True, {}),
        (_case(2048, 2048, 32, 8, 64), False, {"sdpa_repeated": _sdpa_repeated}),
        (_case(1, 2048, 32, 8, 64), False, {}),
    )
    for dtype in (torch.bfloat16, torch.float32)
)
