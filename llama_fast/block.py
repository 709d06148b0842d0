"""The transformer block as one function with a hand-written backward pass.

    n1 = rms_norm(x)         q, k = rope(n1 Wq^T, n1 Wk^T)    v = n1 Wv^T
    h  = x + attention(q, k, v) Wo^T
    n2 = rms_norm(h)         gate = n2 Wg^T    up = n2 Wu^T
    y  = h + (silu(gate) up) Wd^T

Qwen2 adds biases to q, k and v; Qwen3 norms q and k, each head for itself, before rotary. Each product may have an
addition of low rank (`llama_fast.low_rank`).

What a policy keeps between forward and backward, a layer; all else is computed again in the backward:

    "recompute-cheap"   x, q, k (after rotary; where they have norms, before those), v, the attention output and its
                        log-sum-exp, h, gate, up, the two row statistics: what a matrix product or the attention made,
                        (6 + 2F/C) C numbers a token if H = G
    "save"              also n1, n2 and silu(gate) up, (8 + 3F/C) C numbers a token
    "recompute-linear"  x, the attention output and its log-sum-exp, 2 C numbers a token; the backward does every
                        product again but the last, and not the attention, which costs most where T is long
    "recompute-all"     x alone, C numbers a token; the backward runs the forward again, up to the last product

Contract of the backward: saved tensors are freed as they are used, and gate and up overwritten, where the graph is not
retained, and left alone where it is; each gradient is rounded once to the dtype of the computation; gradients of
weights that need none are not computed. Under autocast the block computes in autocast's dtype (with `keep_residual`: x,
h, y, the norms and their gradients in x's) and casts each weight for its product, in the forward and again in the
backward, so that one copy at a time is held.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.4. Derivation: docs/block.md.

Legend: B batch, T query tokens, S key tokens, R = B T rows, C width, F ffn width, H query heads, G key/value heads,
D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fast import few_rows
from llama_fast.block_attention import AnyCache, Cache, Spans, attend, attend_bwd, check_cache, check_spans
from llama_fast.low_rank import LowRank, Products, check_added, tensors
from llama_fast.ops import linear, table
from llama_fast.ops.attention import check_packed
from llama_fast.ops.dispatch import (
    autocast_dtype,
    forced,
    no_autocast,
    once_differentiable,
    plain,
    primitives,
    recorded,
    refuse_transforms,
    release,
)
from llama_fast.parallel import Collectives, Single

POLICIES = ("save", "recompute-cheap", "recompute-linear", "recompute-all")

_rms_norm_fwd, _rms_norm_bwd = primitives["rms_norm_fwd"], primitives["rms_norm_bwd"]
_add_rms_norm_fwd, _add_rms_norm_bwd = primitives["add_rms_norm_fwd"], primitives["add_rms_norm_bwd"]
_swiglu_fwd, _swiglu_bwd = primitives["swiglu_fwd"], primitives["swiglu_bwd"]
_rope_fwd, _rope_bwd = primitives["rope_fwd"], primitives["rope_bwd"]


class Weights(NamedTuple):
    """The parameters of a block: in the order of the forward pass what each has, then what some have and others not."""

    norm1_C: Tensor
    wq_HDxC: Tensor  # [H D, C]
    wk_GDxC: Tensor  # [G D, C]
    wv_GDxC: Tensor
    wo_CxHD: Tensor  # [C, H D]
    norm2_C: Tensor
    wgate_FC: Tensor
    wup_FC: Tensor
    wdown_CF: Tensor
    bq_HD: Tensor | None = None  # biases
    bk_GD: Tensor | None = None
    bv_GD: Tensor | None = None
    normq_D: Tensor | None = None  # gains of the norms of each head's query and key, both or neither
    normk_D: Tensor | None = None

    def given(self) -> list[Tensor]:
        """Those that there are."""
        return [w for w in self if w is not None]


@dataclass(frozen=True)
class BlockOptions:
    """What a block's call does not learn from its tensors.

    Args:
        head_dim: D.
        eps: of all norms.
        policy: one of POLICIES.
        window: sliding window of the attention, 0 for none.
        interleaved: rotary layout, see `llama_fast.rope`.
        keep_residual: under autocast the residual stream and the norms stay in the dtype of x.
        collectives: joins the parts of a block that is split over devices.
    """

    head_dim: int
    eps: float = 1e-5
    policy: str = "recompute-cheap"
    window: int = 0
    interleaved: bool = False
    keep_residual: bool = False
    collectives: Collectives = field(default_factory=Single)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}, expected one of {', '.join(POLICIES)}")
        number = functools.partial(table.check_number, "block")
        number("head_dim", self.head_dim, "an even number >= 2", 2, whole=True)
        if self.head_dim % 2:
            raise ValueError(f"block: head_dim is {self.head_dim}, expected an even number >= 2")
        number("eps", self.eps, "a number >= 0", 0.0)
        number("window", self.window, f"0 or a number of keys up to {table.WIDEST}", 0, table.WIDEST, whole=True)
        for name in ("interleaved", "keep_residual"):
            table.check_flag("block", name, getattr(self, name))


class _Activations:
    """What the forward makes, each None where it is not kept or has been taken."""

    NAMES = (
        *("n1_RC", "rstd1_R", "rawq_BTHD", "rawk_BTGD", "q_BTHD", "k_BTGD", "v_BTGD", "out_BTHD", "lse_BHT"),
        *("h_RC", "n2_RC", "rstd2_R", "gate_RF", "up_RF", "act_RF"),
    )

    def __init__(self, *tensors: Tensor | None) -> None:
        self.held = dict(zip(self.NAMES, tensors or (None,) * len(self.NAMES), strict=True))

    def __getitem__(self, name: str) -> Any:
        return self.held[name]

    def take(self, name: str) -> Any:
        """The tensor, no longer held here: its memory is free as soon as the caller is done with it."""
        tensor, self.held[name] = self.held[name], None
        return tensor

    def put(self, kept: frozenset[str], **tensors: Tensor) -> None:
        """Holds those whose names are in `kept`."""
        self.held.update({name: t for name, t in tensors.items() if name in kept})


_RAW = frozenset({"rawq_BTHD", "rawk_BTGD"})  # before their norms; q and k are made of them again
_KEYS = frozenset({"k_BTGD", "v_BTGD"})
# What stays of the activations, by policy
_KEPT = {
    "save": frozenset(_Activations.NAMES) - _RAW,
    "recompute-cheap": frozenset(_Activations.NAMES) - _RAW - {"n1_RC", "n2_RC", "act_RF"},
    "recompute-linear": frozenset({"out_BTHD", "lse_BHT"}),
    "recompute-all": frozenset(),
}


def _kept(policy: str, w: Weights) -> frozenset[str]:
    kept = _KEPT[policy]
    return kept if w.normq_D is None or "q_BTHD" not in kept else kept - {"q_BTHD", "k_BTGD"} | _RAW


def _turned(
    q: Tensor,
    k: Tensor,
    w: Weights,
    stream: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    options: BlockOptions,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """q [B, T, H, D] and k [B, T, G, D] after their norms, where there are any, and rotary; and the norms' statistics.

    Norms, and rotary behind them, are in the dtype of the residual stream, as all norms.
    """
    if w.normq_D is None or w.normk_D is None:
        q, k = _rope_fwd(q, k, cos, sin, options.interleaved, backend=backend)
        return q, k, None, None
    gains = (w.normq_D.to(stream), w.normk_D.to(stream))
    (q_rows, rstdq), (k_rows, rstdk) = (
        _rms_norm_fwd(t.to(stream).view(-1, t.shape[-1]), gain, options.eps, backend=backend)
        for t, gain in zip((q, k), gains, strict=True)
    )
    q_turned, k_turned = _rope_fwd(
        q_rows.view(q.shape), k_rows.view(k.shape), cos, sin, options.interleaved, backend=backend
    )  # fmt: skip
    return q_turned.to(q.dtype), k_turned.to(k.dtype), rstdq, rstdk


def _head_norm_bwd(
    dy: Tensor, raw: Tensor, gain: Tensor, rstd: Tensor, stream: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the raw heads [B, T, H, D] and of their gain [D], from dy, behind the norm."""
    rows, D = raw.to(stream).view(-1, raw.shape[-1]), raw.shape[-1]
    dx, dgain = _rms_norm_bwd(dy.to(stream).reshape(-1, D), rows, gain.to(stream), rstd, backend=backend)
    return dx.view(raw.shape).to(raw.dtype), dgain.to(gain.dtype)


def _forward(
    x_BTC: Tensor,
    products: Products,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    options: BlockOptions,
    backend: str | None,
    spans: Spans | None = None,
    cache: AnyCache | None = None,
    kept: frozenset[str] = frozenset(),
    attended: tuple[Tensor, Tensor] | None = None,
) -> tuple[_Activations, Tensor, Tensor]:
    """The forward up to the last product: the activations that are `kept`, and act and h, which `_result` takes.

    All else is freed as soon as it has been used. attended: the attention's results, where they are known.
    """
    w, dtype = products.w, products.dtype
    B, T, C = x_BTC.shape
    D, join = options.head_dim, options.collectives
    stream = x_BTC.dtype
    a = _Activations()
    x_RC = x_BTC.reshape(B * T, C)
    n1_RC, rstd1_R = _rms_norm_fwd(x_RC, w.norm1_C.to(stream), options.eps, backend=backend)
    n1_RC = n1_RC.to(dtype)
    a.put(kept, n1_RC=n1_RC, rstd1_R=rstd1_R)
    n1_all = join.gather(n1_RC)
    del n1_RC
    tokens = cos.shape[1]  # of the whole sequence, where x holds a part of it
    q, k, v = (
        products.nt("wq_HDxC", n1_all, w.bq_HD),
        products.nt("wk_GDxC", n1_all, w.bk_GD),
        products.nt("wv_GDxC", n1_all, w.bv_GD),
    )
    del n1_all
    q, k, v = (t.view(B, tokens, t.shape[1] // D, D) for t in (q, k, v))
    a.put(kept, rawq_BTHD=q, rawk_BTGD=k)
    q, k, *_ = _turned(q, k, w, stream, cos, sin, options, backend)
    a.put(kept, q_BTHD=q, k_BTGD=k, v_BTGD=v)
    out_BTHD, lse_BHT = attended or attend(q, k, v, cu_seqlens, options, backend, spans, cache)
    a.put(kept, out_BTHD=out_BTHD, lse_BHT=lse_BHT)
    del q, k, v
    attended_RC = join.reduce(products.nt("wo_CxHD", out_BTHD.flatten(2).flatten(0, 1))).to(stream)
    del out_BTHD
    n2_RC, h_RC, rstd2_R = _add_rms_norm_fwd(attended_RC, x_RC, w.norm2_C.to(stream), options.eps, backend=backend)
    del attended_RC
    n2_RC = n2_RC.to(dtype)
    a.put(kept, h_RC=h_RC, n2_RC=n2_RC, rstd2_R=rstd2_R)
    n2_all = join.gather(n2_RC)
    del n2_RC
    gate_RF, up_RF = products.nt("wgate_FC", n2_all), products.nt("wup_FC", n2_all)
    del n2_all
    a.put(kept, gate_RF=gate_RF, up_RF=up_RF)
    into = () if "gate_RF" in kept else (gate_RF,)
    (act_RF,) = _swiglu_fwd(gate_RF, up_RF, backend=backend, into=into)
    a.put(kept, act_RF=act_RF)
    return a, act_RF, h_RC


def _result(act_RF: Tensor, h_RC: Tensor, products: Products, options: BlockOptions, shape: torch.Size) -> Tensor:
    """The last product and sum of the forward: y, [B, T, C] = `shape`."""
    y_RC = options.collectives.reduce(products.nt("wdown_CF", act_RF)).to(h_RC.dtype)
    # in place, unless a dispatch mode has seen the product: selective checkpointing may keep it
    alone = torch.compiler.is_compiling() or plain(y_RC)
    y_RC = y_RC.add_(h_RC) if alone else y_RC + h_RC
    # no view to autograd: an in-place change of a view would drop the hook that FSDP2 puts on what a layer gives
    return torch.ops.aten._unsafe_view(y_RC, shape)


def _backward(
    dy_BTC: Tensor,
    x_BTC: Tensor,
    products: Products,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    a: _Activations,
    options: BlockOptions,
    backend: str | None,
    spans: Spans | None,
    own: bool,
    dk_BTGD: Tensor | None = None,
    dv_BTGD: Tensor | None = None,
) -> tuple[Tensor, Weights]:
    """Gradients of x and of the weights, `None` where none is needed; those of what is of low rank are in `products`.

    Takes each activation out of `a` for its last use. dk, dv: gradients of the keys after rotary and of the values from
    outside the block. own: nobody else reads gate and up any more, so that their gradients may take their place.
    """
    w, needs, dtype = products.w, products.needs, products.dtype
    B, T, C = x_BTC.shape
    join, eps = options.collectives, options.eps
    stream = x_BTC.dtype
    x_RC, dy_RC = x_BTC.reshape(B * T, C), dy_BTC.reshape(B * T, C)

    dy_all = join.gather(dy_RC.to(dtype))
    gate_RF, up_RF, act_RF = a.take("gate_RF"), a.take("up_RF"), a.take("act_RF")
    if act_RF is None and products.reads("wdown_CF"):
        (act_RF,) = _swiglu_fwd(gate_RF, up_RF, backend=backend)
    dwdown = products.tn("wdown_CF", dy_all, act_RF)
    del act_RF
    dact_RF = products.nn("wdown_CF", dy_all)
    del dy_all
    into = (gate_RF, up_RF) if own else ()
    dgate_RF, dup_RF = _swiglu_bwd(dact_RF, gate_RF, up_RF, backend=backend, into=into)
    del dact_RF, gate_RF, up_RF, into
    dwgate = dwup = None
    n2_RC = a.take("n2_RC")
    if products.reads("wgate_FC", "wup_FC"):
        n2_RC = n2_RC if n2_RC is not None else _rms_norm_fwd(a["h_RC"], w.norm2_C.to(stream), eps, backend=backend)[0]
        n2_all = join.gather(n2_RC.to(dtype))
        dwgate, dwup = products.tn("wgate_FC", dgate_RF, n2_all), products.tn("wup_FC", dup_RF, n2_all)
        del n2_all
    del n2_RC
    dn2_RC = products.nn("wgate_FC", dgate_RF)
    del dgate_RF
    dn2_RC = join.reduce(products.nn("wup_FC", dup_RF, dn2_RC)).to(stream)
    del dup_RF
    dh_RC, dnorm2 = _add_rms_norm_bwd(
        dn2_RC, dy_RC, a.take("h_RC"), w.norm2_C.to(stream), a["rstd2_R"], backend=backend
    )
    del dn2_RC, dy_RC

    dh_all = join.gather(dh_RC.to(dtype))
    out_BTHD, lse_BHT, qkv = a.take("out_BTHD"), a["lse_BHT"], (a.take("q_BTHD"), a.take("k_BTGD"), a.take("v_BTGD"))
    rawq, rawk, rstdq, rstdk = a.take("rawq_BTHD"), a.take("rawk_BTGD"), None, None
    if rawq is not None:
        q, k, rstdq, rstdk = _turned(rawq, rawk, w, stream, cos, sin, options, backend)
        qkv = q, k, qkv[2]
        del q, k
    dwo = products.tn("wo_CxHD", dh_all, out_BTHD.flatten(2).flatten(0, 1))
    dout_BTHD = products.nn("wo_CxHD", dh_all).view(out_BTHD.shape)
    del dh_all
    dq, dk, dv = attend_bwd(dout_BTHD, *qkv, out_BTHD, lse_BHT, cu_seqlens, options, backend, spans)
    del dout_BTHD, qkv, out_BTHD, lse_BHT
    dk = dk if dk_BTGD is None else dk + dk_BTGD
    dv = dv if dv_BTGD is None else dv + dv_BTGD
    dq, dk = _rope_bwd(dq, dk, cos, sin, options.interleaved, backend=backend)
    dnormq = dnormk = None
    if w.normq_D is not None and w.normk_D is not None and rstdq is not None and rstdk is not None:
        dq, dnormq = _head_norm_bwd(dq, rawq, w.normq_D, rstdq, stream, backend)
        dk, dnormk = _head_norm_bwd(dk, rawk, w.normk_D, rstdk, stream, backend)
    del rawq, rawk
    dq, dk, dv = (d.flatten(2).flatten(0, 1) for d in (dq, dk, dv))
    dbq = linear.sum_rows(dq).to(w.bq_HD.dtype) if w.bq_HD is not None and needs.bq_HD else None
    dbk = linear.sum_rows(dk).to(w.bk_GD.dtype) if w.bk_GD is not None and needs.bk_GD else None
    dbv = linear.sum_rows(dv).to(w.bv_GD.dtype) if w.bv_GD is not None and needs.bv_GD else None
    dwq = dwk = dwv = None
    n1_RC = a.take("n1_RC")
    if products.reads("wq_HDxC", "wk_GDxC", "wv_GDxC"):
        n1_RC = n1_RC if n1_RC is not None else _rms_norm_fwd(x_RC, w.norm1_C.to(stream), eps, backend=backend)[0]
        n1_all = join.gather(n1_RC.to(dtype))
        dwq, dwk, dwv = (
            products.tn("wq_HDxC", dq, n1_all),
            products.tn("wk_GDxC", dk, n1_all),
            products.tn("wv_GDxC", dv, n1_all),
        )
        del n1_all
    del n1_RC
    dn1_RC = products.nn("wk_GDxC", dk, products.nn("wq_HDxC", dq))
    dn1_RC = join.reduce(products.nn("wv_GDxC", dv, dn1_RC)).to(stream)
    del dq, dk, dv
    dx_RC, dnorm1 = _add_rms_norm_bwd(dn1_RC, dh_RC, x_RC, w.norm1_C.to(stream), a["rstd1_R"], backend=backend)
    dnorm1, dnorm2 = dnorm1.to(w.norm1_C.dtype), dnorm2.to(w.norm2_C.dtype)
    dw: tuple[Any, ...] = (dnorm1, dwq, dwk, dwv, dwo, dnorm2, dwgate, dwup, dwdown, dbq, dbk, dbv, dnormq, dnormk)
    return dx_RC.view(B, T, C), Weights(*dw)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None,
        spans: Spans | None,
        options: BlockOptions,
        dtype: torch.dtype,
        with_keys: bool,
        numbers: dict[str, tuple[float, float]],
        *parameters: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        backend = forced()
        products = _products(parameters, numbers, dtype)
        w = products.w
        names = _kept(options.policy, w)
        kept = names | _KEYS if with_keys else names
        a, act_RF, h_RC = _forward(x_BTC, products, cos, sin, cu_seqlens, options, backend, spans, kept=kept)
        y_BTC = _result(act_RF, h_RC, products, options, x_BTC.shape)
        saved = [t if name in names else None for name, t in a.held.items()]
        ctx.save_for_backward(x_BTC, cos, sin, cu_seqlens, *parameters, *saved)
        ctx.options, ctx.backend, ctx.dtype, ctx.spans = options, backend, dtype, spans
        ctx.numbers, ctx.seeds = numbers, products.seeds
        ctx.set_materialize_grads(False)
        return (y_BTC, a["k_BTGD"], a["v_BTGD"]) if with_keys else y_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTC: Tensor | None, *dkv: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BTC, cos, sin, cu_seqlens, *rest = ctx.saved_tensors
        own = release(ctx)
        dy_BTC = torch.zeros_like(x_BTC) if dy_BTC is None else dy_BTC
        n = len(Weights._fields) + 2 * len(ctx.numbers)
        products = _products(rest[:n], ctx.numbers, ctx.dtype, ctx.needs_input_grad[9:], ctx.seeds)
        a = _Activations(*rest[n:])
        del rest
        options, backend, spans = ctx.options, ctx.backend, ctx.spans
        if options.policy in ("recompute-linear", "recompute-all"):
            attended = None if a["out_BTHD"] is None else (a.take("out_BTHD"), a.take("lse_BHT"))
            kept = _kept("recompute-cheap", products.w) | {"act_RF"}
            a, *_ = _forward(
                x_BTC, products, cos, sin, cu_seqlens, options, backend, spans, kept=kept, attended=attended
            )
            del attended, _
            own = not torch.compiler.is_compiling()
        dx, dw = _backward(dy_BTC, x_BTC, products, cos, sin, cu_seqlens, a, options, backend, spans, own, *dkv)
        added = [d for name in ctx.numbers for d in products.gradients.get(name, (None, None))]
        return dx, None, None, None, None, None, None, None, None, *dw, *added


def _products(
    parameters: Sequence[Any],
    numbers: Mapping[str, tuple[float, float]],
    dtype: torch.dtype,
    needs: Any = None,
    seeds: dict[str, int] | None = None,
) -> Products:
    """Of a block's weights, then A and B of what is added to the products that `numbers` names; it has scale and
    dropout of each."""
    n = len(Weights._fields)

    def ab(values: Sequence[Any]) -> dict[str, tuple[Any, Any]]:
        return {name: (values[n + 2 * i], values[n + 2 * i + 1]) for i, name in enumerate(numbers)}

    added = {name: LowRank(a, b, *numbers[name]) for name, (a, b) in ab(parameters).items()}
    if needs is None:
        return Products(Weights(*parameters[:n]), added, dtype)
    return Products(Weights(*parameters[:n]), added, dtype, Weights(*needs[:n]), ab(needs), seeds)


def _check(
    x: Tensor,
    w: Weights,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor | None,
    spans: Spans | None,
    options: BlockOptions,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"block: x has shape {tuple(x.shape)}, expected [B, T, C]")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError(f"block: cu_seqlens is a {type(cu_seqlens).__name__}, expected a torch.Tensor")
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
            found = f"shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}"
            raise ValueError(f"block: cu_seqlens has {found}, expected [N + 1] torch.int32")
        if cu_seqlens.device != x.device:
            raise ValueError(f"block: cu_seqlens is on {cu_seqlens.device}, expected {x.device} as x")
        if x.shape[0] != 1:
            raise ValueError(f"block: x has B = {x.shape[0]}, expected 1 with cu_seqlens: the sequences lie in one row")
        check_packed(cu_seqlens, x.shape[1])
    B, T, C = x.shape
    D = options.head_dim
    for name, p in (*zip(w._fields, w, strict=True), ("cos", cos), ("sin", sin)):
        if p is None and name in w._field_defaults:
            continue
        if not isinstance(p, Tensor):
            raise ValueError(f"block: {name} is a {type(p).__name__}, expected a torch.Tensor")
        if p.device != x.device:
            raise ValueError(f"block: {name} is on {p.device}, expected {x.device} as x")
    HD, GD, F = w.wq_HDxC.shape[0], w.wk_GDxC.shape[0], w.wgate_FC.shape[0]
    shapes = ((C,), (HD, C), (GD, C), (GD, C), (C, HD), (C,), (F, C), (F, C), (C, F), (HD,), (GD,), (GD,), (D,), (D,))
    for name, p, shape in zip(w._fields, w, shapes, strict=True):
        if p is not None and tuple(p.shape) != shape:
            raise ValueError(f"block: {name} has shape {tuple(p.shape)}, expected {shape}")
    if (w.normq_D is None) != (w.normk_D is None):
        raise ValueError("block: one of normq_D and normk_D is None, expected both or neither")
    if D <= 0 or HD % D or GD % D or HD % GD:
        raise ValueError(f"block: head_dim is {D}, expected to divide {HD} and {GD}, and {GD} to divide {HD}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.ndim != 3 or t.shape[0] not in (1, B) or t.shape[1:] != (T, D // 2):
            raise ValueError(f"block: {name} has shape {tuple(t.shape)}, expected [1 or B, T, D/2] = {(T, D // 2)}")
        if t.dtype != torch.float32:
            raise ValueError(f"block: {name} has dtype {t.dtype}, expected a float type")
    if sin.shape != cos.shape:
        raise ValueError(f"block: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)} as cos")
    if spans is not None:
        check_spans(spans, B, cu_seqlens)


def transformer_block(
    x: Tensor,
    weights: Weights,
    cos: Tensor,
    sin: Tensor,
    options: BlockOptions,
    *,
    cu_seqlens: Tensor | None = None,
    spans: Spans | None = None,
    cache: AnyCache | None = None,
    return_keys: bool = False,
    low_rank: Mapping[str, LowRank] | None = None,
) -> Any:
    """One LLaMA block, with the backward pass of this file.

    Args:
        x: [B, T, C], the residual stream.
        weights: the block's parameters; dtype of `x`, or any float dtype under autocast. Biases [H D], [G D] and norms
            of heads [D] may be None.
        cos, sin: [T, D/2] or [B, T, D/2], of the positions of these T tokens; float32, or another float type, which is
            converted (FSDP2's mixed precision makes bfloat16 of all that a layer is given).
        options: head dim, epsilon, policy, window, rotary layout, collectives.
        cu_seqlens: [N+1] int32, sequences packed in one row (B = 1); attention stays within each.
        spans: B pairs (begin, end), padding: row b sees only its keys from begin up to end. A query before its span
            sees none, one beyond it all of the span; beside a window each span ends at the last key.
        cache: keys and values so far; this call appends its own and attends to all, or to those of `spans`. No
            gradient, no `cu_seqlens`.
        return_keys: give k and v too.
        low_rank: additions to the products (LoRA), by the weight's name in `Weights`; those of the norms have none. Not
            for a block that is split over devices.

    Returns:
        y: [B, T, C], dtype of `x` (under autocast without `keep_residual` autocast's).
        k, v: [B, T, G, D] each, the keys after rotary and the values; only with `return_keys`.

    Gradient: of x, of each weight and of what is added that require one; those of k and v are taken in.
    Memory:   by policy, see the top of the file.
    Error:    at most that of the same block by autograd in the same dtype, both against float64 (tests/test_block.py).
    Repeats:  bitwise, for equal shapes, dtype, backend and number of threads; with dropout from an equal seed.

    Raises:
        ValueError: shapes, dtypes or devices disagree, those that a cache gives among them, or a cache is given where
            gradients are recorded or with `return_keys` or `cu_seqlens`.
        NotSupported: no backend takes an op of the block.

    Source: Touvron et al. 2023, arXiv:2302.13971.
    """
    refuse_transforms()
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"block: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if cos.ndim == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    cos, sin = (t.float() if t.is_floating_point() else t for t in (cos, sin))
    autocast = autocast_dtype(x)
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast  # which leaves float64 as it is
    stream = x.dtype if options.keep_residual else dtype
    _check(x, weights, cos, sin, cu_seqlens, spans, options)
    if low_rank is not None and not isinstance(low_rank, Mapping):
        raise ValueError(f"block: low_rank is a {type(low_rank).__name__}, expected a mapping of names to LowRank")
    added, parameters = dict(low_rank) if low_rank else {}, tuple(weights)
    if added:
        check_added(added, weights, x)
        if type(options.collectives) is not Single:
            raise ValueError("block: low_rank is given to a block that is split over devices, expected None")
        parameters += tuple(tensors(added))
    if autocast is None:
        for name, p in zip(weights._fields, weights, strict=True):
            if p is not None and p.dtype != dtype:
                raise ValueError(f"block: {name} has dtype {p.dtype}, expected {dtype} as x")
    if cache is not None:
        if recorded(x, *parameters):  # in forward mode too, where the kernels would drop the tangents
            raise ValueError("block: cache is given while gradients are recorded, expected torch.no_grad()")
        if return_keys:
            raise ValueError("block: return_keys is True beside a cache, expected one of the two")
        if cu_seqlens is not None:
            raise ValueError("block: cu_seqlens is given beside a cache, expected one of the two")
        if isinstance(cache, Cache):
            if spans is not None and cache.starts is not None:
                raise ValueError("block: spans are given beside cache.starts, expected one of the two")
            check_cache(cache, x, weights.wk_GDxC.shape[0] // options.head_dim, options.head_dim, dtype)
    with no_autocast(autocast, x):
        x = x.to(stream)
        if cache is None and (recorded(x, *parameters) or torch.compiler.is_compiling()):
            numbers = {name: (float(a.scale), float(a.dropout)) for name, a in added.items()}
            return _Block.apply(x, cos, sin, cu_seqlens, spans, options, dtype, return_keys, numbers, *parameters)
        few = x.dtype == dtype and not return_keys and not added
        if few and (qkv := few_rows.before(x, weights, cos, sin, options)) is not None:
            out_BTHD, _ = attend(*qkv, cu_seqlens, options, forced(), spans, cache)
            return few_rows.after(out_BTHD, x, weights, options)
        kept = _KEYS if return_keys else frozenset()
        products = Products(weights, added, dtype)
        a, act_RF, h_RC = _forward(x, products, cos, sin, cu_seqlens, options, forced(), spans, cache, kept)
        y = _result(act_RF, h_RC, products, options, x.shape)
        return (y, a["k_BTGD"], a["v_BTGD"]) if return_keys else y
