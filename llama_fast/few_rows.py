"""A block of few rows on the CPU, where no gradients are recorded: two native calls, before and after its attention.

Between the products of so few rows Python takes as long as the products themselves. The attention, and where its keys
and values are kept, stays with block_attention.py. The kernels are those of the ops (csrc/cpu/decode.cpp), and so are
the bits, where each product is large enough for gemv.

Legend: B batch, T tokens, R = B T rows, C width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_fast.ops import linear, native
from llama_fast.ops.dispatch import forced, plain
from llama_fast.parallel import Single

if TYPE_CHECKING:
    from llama_fast.block import BlockOptions, Weights

_MOST = 4  # rows whose products read the weights once: `linear.RULES` has gemv for as many


def before(
    x_BTC: Tensor, w: Weights, cos: Tensor, sin: Tensor, options: BlockOptions
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q [B, T, H, D], k and v [B, T, G, D] of a block, q and k after rotary; its arguments have been checked.

    None, with nothing done, where the ops one by one must compute them.
    """
    B, T, _ = x_BTC.shape
    if not (
        1 <= B * T <= _MOST
        and x_BTC.is_cpu
        and x_BTC.dtype == w.wq_HDxC.dtype
        and not torch.compiler.is_compiling()
        and plain(x_BTC, cos, sin, *w.given())
        and forced() in (None, "cpu")
        and linear.forced() is None
        and type(options.collectives) is Single
    ):
        return None
    D = options.head_dim
    q, k, v = (x_BTC.new_empty(B, T, weight.shape[0] // D, D) for weight in (w.wq_HDxC, w.wk_GDxC, w.wv_GDxC))
    if not native.block_before(x_BTC, w, cos, sin, options.eps, options.interleaved, (q, k, v)):
        return None
    return q, k, v


def after(out_BTHD: Tensor, x_BTC: Tensor, w: Weights, options: BlockOptions) -> Tensor:
    """The block's result [B, T, C], where `before` took x and its attention gave `out`."""
    return native.block_after(out_BTHD, x_BTC, w, options.eps, options.head_dim)
