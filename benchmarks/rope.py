"""rope at the sizes of a 7B model, beside eager PyTorch; transformers' apply_rotary_pos_emb on its own layout too.

transformers keeps heads before tokens. Its function is given that layout as a view of ours, so no copy is counted.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from llama_fast.verify import Case

from .harness import Benchmark


def transformers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(0).to(q.dtype) for t in (cos, sin))
    q_BHTD, k_BGTD = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)


PEERS = {"transformers": transformers} if find_spec("transformers") else {}
_SIZES = {"B": 2, "T": 2048, "H": 32, "G": 32, "D": 128}

BENCHMARKS = tuple(
    Benchmark(
        Case("rope", _SIZES, {"interleaved": True} if interleaved else {}),
        dtype,
        quick=dtype == torch.bfloat16 and not interleaved,
        peers={} if interleaved else PEERS,
    )
    for interleaved in (False, True)
    for dtype in (torch.bfloat16, torch.float32)
)
