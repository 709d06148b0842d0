"""What a PyTorch user would write for each op: the yardstick of the error budgets and of the benchmarks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ops.reference import attention_mask


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:  # as Meta's: complex products in float32
        pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (x.shape[-1] // 2, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(-2)).flatten(-2).to(x.dtype)
    # as Hugging Face's: doubled tables in the dtype of x, rotate-half
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """scaled_dot_product_attention; with a mask tensor where is_causal cannot say it, one call a packed sequence."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            attention(
                q[a:b].unsqueeze(0), k[a:b].unsqueeze(0), v[a:b].unsqueeze(0), causal=causal, scale=scale, window=window
            ).squeeze(0)
            for a, b in pairwise(bounds)
            if b > a
        ]
        return torch.cat(parts) if parts else torch.zeros_like(q)
    T, S = q.shape[1], k.shape[1]
    q_BHTD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    square = causal and T == S and not window
    if not square and (causal or window):
        mask = attention_mask(T, S, causal=causal, window=window or 0, cu_seqlens=None, device=q.device)
    out = F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    if mask is not None:
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out.transpose(1, 2)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """As transformers computes it: all logits, in float32."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    flat = targets.reshape(-1)
    loss = F.cross_entropy(
        logits, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss:
        squares = torch.where(flat != ignore_index, torch.logsumexp(logits, dim=-1).square(), 0.0)
        if reduction == "mean":
            loss = loss + z_loss * squares.sum() / (flat != ignore_index).sum()
        else:
            loss = loss + z_loss * (squares.sum() if reduction == "sum" else squares)
    return loss.view(targets.shape) if reduction == "none" else loss
