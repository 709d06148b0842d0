"""Attention: the public function, its checks and its autograd."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops import table
from llama_fast.ops.dispatch import apply, autocast_dtype, forced, once_differentiable, plain, primitives

_MOST = sys.float_info.max
_attention_fwd, _attention_bwd = primitives["attention_fwd"], primitives["attention_bwd"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        causal: bool,
        window: int,
    ) -> Tensor:
        out, lse = _attention_fwd(q, k, v, cu_seqlens, scale, causal, window)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.scale, ctx.causal, ctx.window, ctx.backend = scale, causal, window, forced()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        dq, dk, dv = _attention_bwd(
            dout, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.causal, ctx.window, backend=ctx.backend
        )
        return dq, dk, dv, None, None, None, None


def check_packed(cu_seqlens: Tensor, rows: int, max_seqlen: int | None = None) -> None:
    """Checks the values against the `rows` of q: one pass over N numbers, which on a GPU waits for the device.

    Raises:
        ValueError: they do not ascend from 0 to `rows`, or a sequence is longer than `max_seqlen`.
    """
    if torch.compiler.is_compiling() or not plain(cu_seqlens):
        return
    if cu_seqlens.numel() == 0:
        raise ValueError("attention: cu_seqlens is empty, expected [N + 1] row numbers from 0 to the number of rows")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"attention: cu_seqlens runs from {bounds[0]} to {bounds[-1]}, expected 0 to {rows}, the rows of q"
        )
    longest = 0
    for n, (begin, end) in enumerate(pairwise(bounds)):
        if end < begin:
            raise ValueError(
                f"attention: cu_seqlens[{n + 1}] = {end} is below cu_seqlens[{n}] = {begin}, expected ascending order"
            )
        longest = max(longest, end - begin)
    if max_seqlen is not None:
        table.check_number("attention", "max_seqlen", max_seqlen, f"at least {longest}, the longest sequence", longest)


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
    """Softmax-weighted means of the values, never holding the T x S weights and never computing the masked part.

        out[b,t,h] = sum_j p_j v[b,j,g],   p = softmax_j(scale q[b,t,h] . k[b,j,g]) over the keys that t sees, g = h G/H

    Query t stands at key i = t + S - T: the last query sees the last key (a decode, a chunked prefill). Keys across,
    queries down, x where query t sees key j:

        causal, T = S     causal, S > T     causal, T > S     window = 2        causal=False
          x . . .           x x x . .         . .               x . . .           x x x x
          x x . .           x x x x .         . .  zeros        x x . .           x x x x
          x x x .           x x x x x         x .               . x x .           x x x x
          x x x x                             x x               . . x x           x x x x

    Args:
        q: [B, T, H, D], float32 | bfloat16 | float16 | float64; packed: [R, H, D], the sequences one after the other.
        k, v: [B, S, G, D], dtype of `q`; packed: [R, G, D]. G divides H: query heads g H/G to (g+1) H/G - 1 share g.
        causal: query at i sees key j only if j <= i.
        scale: of the scores; None is 1/sqrt(D).
        window: query at i sees key j only if i - window < j <= i, so that each query sees at most `window` keys,
            itself included; None is no such limit. With a window the mask is causal.
        cu_seqlens: [N + 1] int32, packed only: sequence n owns rows cu_seqlens[n] up to cu_seqlens[n + 1], and sees no
            other. Empty sequences are fine.
        max_seqlen: a bound on the length of the sequences; only checked.

    Returns:
        out: shape and dtype of `q`. A query that sees no key gives zeros.

    Gradient: dq, dk, dv, recomputing the weights; those of heads that share keys are summed in float32. Not twice
        differentiable.
    Memory:   saves q, k, v, out and 4 bytes a query and head. Scratch on the CPU, whatever T x S: about 32 MB, in the
        backward 8 MB a thread if that is more; or what one key/value head needs, if that is more: forward 2 S D
        elements, backward T H/G D times four elements and one float32 a part (docs/ops/attention.md).
    Error:    forward at most 1.0x, backward 1.5x that of F.scaled_dot_product_attention in the same dtype plus one ulp,
        against float64. A NaN or inf in k or v may also reach queries from which its key is hidden.
    Repeats:  bitwise, for equal shape, dtype and backend; on the CPU the forward for any number of threads, the
        backward for the same number.
    Autocast: float32 tensors are cast to its dtype, as for F.scaled_dot_product_attention.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an argument's value is out of range.
        NotSupported: no backend takes the call; the message lists every objection.

    Source: Dao 2023, arXiv:2307.08691; Rabe and Staats 2021, arXiv:2112.05682.
    """
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype != torch.float64 and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    dims = table.ATTENTION.check(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if not q.ndim == k.ndim == v.ndim:
        raise ValueError(f"attention: q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions, expected the same for all")
    packed = q.ndim == 3
    if packed != (cu_seqlens is not None):
        raise ValueError(
            f"attention: cu_seqlens is {'missing' if packed else 'given'} and q has shape {tuple(q.shape)}, expected "
            "[R, H, D] with cu_seqlens or [B, T, H, D] without"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(dims["D"]) if dims["D"] > 0 else 1.0
    table.check_number("attention", "scale", scale, "a finite number", low=-_MOST, high=_MOST)
    if window is not None:
        table.check_number("attention", "window", window, "None or a number of keys >= 1", 1, 2**63 - 1, whole=True)
        window = min(window, table.WIDEST)
    table.check_flag("attention", "causal", causal)
    if cu_seqlens is None:
        return apply(_Attention, q, k, v, None, scale, causal, window or 0)
    check_packed(cu_seqlens, dims["R"], max_seqlen)
    out = apply(_Attention, q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), cu_seqlens, scale, causal, window or 0)
    return out.squeeze(0)
