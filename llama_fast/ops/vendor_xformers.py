"""xFormers' memory_efficient_attention as the backend `xformers`, where it is installed: launchers of the primitives.

Written against xFormers 0.0.30's `fmha` and tested with a stand-in of that interface; `make test-gpu` runs it where
xFormers is installed. Queries and keys of one length or more keys than queries, no window, no packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xformers.ops import fmha


def unavailable() -> str | None:
    """None: the import above has succeeded."""
    return None


def _mask(causal: bool) -> Any:
    return fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None


def _expand(x: Tensor, H: int) -> Tensor:
    """[B, S, G, D] -> [B, S, H, D]"""
    return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    T, H = q.shape[1:3]
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, _expand(k, H), _expand(v, H), attn_bias=_mask(causal), scale=scale
    )
    return out.contiguous(), lse[..., :T].contiguous()  # it may be padded to a multiple of 32 queries


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, ...]:
    (B, S, G, D), H = k.shape, q.shape[2]
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        dout.contiguous(), out, lse, q, _expand(k, H), _expand(v, H), attn_bias=_mask(causal), scale=scale
    )
    if G != H:  # the sum over the heads that share keys, in float32
        dk, dv = (x.view(B, S, G, H // G, D).sum(3, dtype=torch.float32).to(k.dtype) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
