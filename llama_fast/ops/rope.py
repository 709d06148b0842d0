"""Rotary position embedding of queries and keys: public function and its autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import table
from llama_fast.ops.dispatch import apply, forced, once_differentiable, primitives

_rope_fwd, _rope_bwd = primitives["rope_fwd"], primitives["rope_bwd"]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        q_out, k_out = _rope_fwd(q, k, cos, sin, interleaved)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, forced()
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk = _rope_bwd(dq_out, dk_out, cos, sin, ctx.interleaved, backend=ctx.backend)
        return dq, dk, None, None, None


def _angles(table_: Tensor, D: int) -> Tensor:
    """cos or sin as the primitives take it: float32, the first half of a doubled one."""
    if table_.ndim and table_.shape[-1] == D:
        table_ = table_[..., : D // 2]
    if table_.requires_grad or table_.dtype != torch.float32:
        return table_.detach().float() if table_.is_floating_point() else table_
    return table_


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Turn each pair of components of queries and keys by the angle of its position.

        (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin)

    Args:
        q: [B, T, H, D], float32 | bfloat16 | float16 | float64, D even; a copy is made where the last dimension is not
            contiguous.
        k: [B, T, G, D], dtype of `q`; G need not divide H.
        cos, sin: [T, D/2], or [B, T, D/2] for positions that differ between sequences ([1, T, D/2] for all alike);
            float32, or another float type, which is converted. Of Hugging Face's doubled [..., D] the first half is
            taken.
        interleaved: a pair is (2d, 2d + 1), Meta's layout; else (d, d + D/2), Hugging Face's.

    Returns:
        q_out, k_out: shapes and dtype of `q` and `k`, contiguous.

    Gradient: dq, dk: the incoming gradients turned the other way. None for cos and sin.
    Memory:   saves cos and sin.
    Error:    forward at most 1.0x, backward 1.5x that of eager PyTorch in the same dtype plus one ulp, against float64.
    Repeats:  bitwise, for equal shape, dtype and backend; on the CPU for any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or D is odd.
        NotSupported: no backend takes the call; the message lists every objection.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if isinstance(q, Tensor) and q.ndim == 4 and isinstance(cos, Tensor) and isinstance(sin, Tensor):
        cos, sin = _angles(cos, q.shape[-1]), _angles(sin, q.shape[-1])
    table.ROPE.check(q=q, k=k, cos=cos, sin=sin)
    table.check_flag("rope", "interleaved", interleaved)
    if cos.ndim == 2:
        cos = cos.unsqueeze(0)
    if sin.ndim == 2:
        sin = sin.unsqueeze(0)
    return apply(_Rope, q, k, cos, sin, interleaved)
