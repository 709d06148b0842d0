"""The attention of a block: to its own keys, to those of a cache, within packed sequences, past padding.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from llama_fast.ops.dispatch import primitives

if TYPE_CHECKING:
    from llama_fast.block import BlockOptions

_attention_fwd, _attention_bwd = primitives["attention_fwd"], primitives["attention_bwd"]

Spans = tuple[tuple[int, int], ...]  # of each row of the batch: its keys from the first number up to the second


class AnyCache(Protocol):
    """Keys and values of one layer, wherever they are kept."""

    def append(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in new rows and gives all of them, k and v [B, S, G, D], the new ones last."""


class Cache(NamedTuple):
    """Keys and values of one layer for generation: room [B, S_max, G, D] of which `used` rows are filled.

    With `starts`, B numbers, the tokens of row b begin there: what stands before is neither read nor attended to.
    """

    k_BSGD: Tensor
    v_BSGD: Tensor
    used: int
    starts: tuple[int, ...] | None = None

    def append(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new rows at `used` and gives all that are filled."""
        end = self.used + k_BTGD.shape[1]
        self.k_BSGD[:, self.used : end] = k_BTGD
        self.v_BSGD[:, self.used : end] = v_BTGD
        return self.k_BSGD[:, :end], self.v_BSGD[:, :end]


def check_spans(spans: Spans, B: int, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError where spans are not those of B rows."""
    if len(spans) != B or not all(0 <= begin <= end for begin, end in spans):
        raise ValueError(f"block: spans is {spans}, expected {B} pairs (begin, end) with 0 <= begin <= end")
    if cu_seqlens is not None:
        raise ValueError("block: spans are given beside cu_seqlens, expected one of the two")


def check_cache(cache: Cache, x: Tensor, G: int, D: int, dtype: torch.dtype) -> None:
    """Raises ValueError where the cache has no room for the keys of x [B, T, C]."""
    B, T, _ = x.shape
    for name, room in (("k_BSGD", cache.k_BSGD), ("v_BSGD", cache.v_BSGD)):
        if room.ndim != 4 or room.shape[0] != B or room.shape[2:] != (G, D) or cache.used + T > room.shape[1]:
            raise ValueError(
                f"block: cache.{name} has shape {tuple(room.shape)}, expected {(B, cache.used + T, G, D)}, "
                f"room for {cache.used} rows used and {T} new ones"
            )
        if room.device != x.device:
            raise ValueError(f"block: cache.{name} is on {room.device}, expected {x.device} as x")
        if room.dtype != dtype:
            raise ValueError(f"block: cache.{name} has dtype {room.dtype}, expected {dtype}")
    if cache.used < 0:
        raise ValueError(f"block: cache.used is {cache.used}, expected 0 or more")
    if cache.starts is not None and (len(cache.starts) != B or not all(s >= 0 for s in cache.starts)):
        raise ValueError(f"block: cache.starts is {cache.starts}, expected {B} numbers of 0 or more")


def append(cache: AnyCache, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
    """What `cache.append` gives. Raises ValueError where it is not of the kind of k and v, as which it is read."""
    (B, T, G, D), given = k_BTGD.shape, cache.append(k_BTGD, v_BTGD)
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(t, Tensor) for t in given):
        raise ValueError(f"block: cache.append gave a {type(given).__name__}, expected two tensors, k and v")
    k, v = given
    for name, t in (("k", k), ("v", v)):
        if t.shape[:1] + t.shape[2:] != (B, G, D) or t.shape[1] < T or t.shape != k.shape:
            raise ValueError(
                f"block: cache.append gave {name} of shape {tuple(t.shape)}, expected [B, S, G, D] with B = {B}, "
                f"G = {G}, D = {D} and one S of {T} or more for k and v"
            )
        if t.dtype != k_BTGD.dtype or t.device != k_BTGD.device:
            found, expected = (f"{x.dtype} on {x.device}" for x in (t, k_BTGD))
            raise ValueError(f"block: cache.append gave {name} in {found}, expected {expected}")
    return k, v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    options: BlockOptions,
    backend: str | None,
    spans: Spans | None,
    cache: AnyCache | None,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T]; with a cache, which takes in k and v, to all that it holds."""
    if cache is not None:
        k, v = append(cache, k, v)
    if isinstance(cache, Cache) and cache.starts is not None:
        S = k.shape[1]  # read here: a generator that held on to k would be more than torch.compile follows
        spans = tuple((start, S) for start in cache.starts)
    if spans is not None:
        return _attend_spans(spans, q, k, v, options, backend)
    out, lse = _attention_fwd(q, k, v, cu_seqlens, options.head_dim**-0.5, True, options.window, backend=backend)
    return out, lse


def attend_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    options: BlockOptions,
    backend: str | None,
    spans: Spans | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend` without a cache."""
    if spans is not None:
        return _attend_spans_bwd(spans, dout, (q, k, v), out, lse, options, backend)
    scale = options.head_dim**-0.5
    dq, dk, dv = _attention_bwd(dout, q, k, v, out, lse, cu_seqlens, scale, True, options.window, backend=backend)
    return dq, dk, dv


def _calls(spans: Spans, T: int, S: int, window: int) -> Iterator[tuple[slice, slice, slice, bool]]:
    """Row, queries, keys and causal, for each call of the attention that spans come to.

    Queries before their row's span see nothing; those beyond it, all of it, which beside a window no kernel can say.
    """
    if window and any(end < S for _, end in spans):
        raise ValueError(f"block: spans is {spans} beside a window of {window}, expected each to end at key {S}")
    for b, (begin, end) in enumerate(spans):
        first, last = (min(max(key - (S - T), 0), T) for key in (begin, end))
        if begin < end:
            yield from (
                (slice(b, b + 1), queries, slice(begin, end), causal)
                for queries, causal in ((slice(first, last), True), (slice(last, T), False))
                if queries.start < queries.stop
            )


def _attend_spans(
    spans: Spans, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, options: BlockOptions, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention of rows that have their own spans of keys, one after the other; a query that sees none gives zeros."""
    B, T, H, D = q_BTHD.shape
    out_BTHD, lse_BHT = torch.zeros_like(q_BTHD), q_BTHD.new_zeros(B, H, T, dtype=torch.float32)
    for row, queries, keys, causal in _calls(spans, T, k_BSGD.shape[1], options.window):
        q, k, v = q_BTHD[row, queries], k_BSGD[row, keys], v_BSGD[row, keys]
        out, lse = _attention_fwd(q, k, v, None, D**-0.5, causal, options.window, backend=backend)
        out_BTHD[row, queries], lse_BHT[row, :, queries] = out, lse
    return out_BTHD, lse_BHT


def _attend_spans_bwd(
    spans: Spans,
    dout_BTHD: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out_BTHD: Tensor,
    lse_BHT: Tensor,
    options: BlockOptions,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `_attend_spans`."""
    _, T, _, D = dout_BTHD.shape
    dq_BTHD, dk_BTGD, dv_BTGD = (torch.zeros_like(t) for t in qkv)
    for row, queries, keys, causal in _calls(spans, T, T, options.window):
        dout, q, out = (t[row, queries] for t in (dout_BTHD, qkv[0], out_BTHD))
        k, v, lse = qkv[1][row, keys], qkv[2][row, keys], lse_BHT[row, :, queries].contiguous()
        dq, dk, dv = _attention_bwd(
            dout, q, k, v, out, lse, None, D**-0.5, causal, options.window, backend=backend
        )  # fmt: skip
        dq_BTHD[row, queries] = dq
        dk_BTGD[row, keys] += dk
        dv_BTGD[row, keys] += dv
    return dq_BTHD, dk_BTGD, dv_BTGD
