"""The products of a block's linear layers, of which some have an addition of low rank (LoRA) beside their weight:

    y = x W^T + s (x A^T) B^T

With u = x A^T and e = dy (s B), what the addition has in the backward is

    dB = s dy^T u        dA = e^T x        dx = dy W + e A

u is computed again there: r numbers a row for 2 r C operations, where the product itself took 2 C V. So an addition
keeps nothing between forward and backward but what the product's own weight would need, its input.

With dropout p, A has m x in place of x, where m is a mask of 0 and 1, and s / (1 - p) stands for s:

    y = x W^T + s/(1-p) ((m x) A^T) B^T        dA = e^T (m x)        dx = dy W + m (e A)

m is drawn again in the backward, from the seed that it had in the forward.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. Derivation: docs/block.md.

Legend: R rows, C inputs of a layer, V its outputs, r rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from llama_fast.ops import linear, table
from llama_fast.ops.dispatch import plain

if TYPE_CHECKING:
    from llama_fast.block import Weights

PARTS = 1 << 16  # of a dropout's probability
LINEAR = ("wq_HDxC", "wk_GDxC", "wv_GDxC", "wo_CxHD", "wgate_FC", "wup_FC", "wdown_CF")


class LowRank(NamedTuple):
    """What a linear layer adds to its product: scale (dropout(x) A^T) B^T.

    a_rC [r, C] and b_Vr [V, r] in float64, float32, bfloat16 or float16, which their gradients have too; they are cast
    to the dtype of the computation. scale is a number: a tensor would get no gradient.

    dropout is the probability, to the nearest of 65536 parts, with which a number of x is taken for 0 here; the others
    are divided by 1 - dropout. Each call draws a seed for that from torch's default generator of the CPU. nn.Dropout,
    from the same seed, drops others.
    """

    a_rC: Tensor
    b_Vr: Tensor
    scale: float = 1.0
    dropout: float = 0.0


def tensors(added: Mapping[str, LowRank]) -> list[Tensor]:
    """A and B of each addition."""
    return [t for a in added.values() for t in (a.a_rC, a.b_Vr)]


def check_added(added: Mapping[str, LowRank], w: Weights, x: Tensor) -> None:
    """Raises ValueError for an addition that fits no linear layer of the block."""
    for name, addition in added.items():
        if name not in LINEAR:
            raise ValueError(f"block: low_rank has {name!r}, expected one of {', '.join(LINEAR)}")
        where = f"block: low_rank[{name!r}]"
        if not isinstance(addition, LowRank):
            raise ValueError(f"{where} is a {type(addition).__name__}, expected a LowRank")
        V, C = getattr(w, name).shape
        for what, t in (("a_rC", addition.a_rC), ("b_Vr", addition.b_Vr)):
            if not isinstance(t, Tensor):
                raise ValueError(f"{where}.{what} is a {type(t).__name__}, expected a torch.Tensor")
            if t.device != x.device:
                raise ValueError(f"{where}.{what} is on {t.device}, expected {x.device} as x")
            if t.dtype not in table.FLOATS:
                raise ValueError(f"{where}.{what} has dtype {t.dtype}, expected a float type of 16 bits or more")
        a, b = tuple(addition.a_rC.shape), tuple(addition.b_Vr.shape)
        if len(a) != 2 or a[1] != C or a[0] < 1:
            raise ValueError(f"{where}.a_rC has shape {a}, expected [r, {C}], r >= 1")
        if b != (V, a[0]):
            raise ValueError(f"{where}.b_Vr has shape {b}, expected {(V, a[0])}")
        most = sys.float_info.max
        for what, value, expected, low, high in (
            ("scale", addition.scale, "a finite number", -most, most),
            ("dropout", addition.dropout, "a probability from 0 to 1", 0.0, 1.0),
        ):
            if isinstance(value, Tensor):
                raise ValueError(f"{where}.{what} is a {type(value).__name__}, expected {expected}")
            table.check_number("block", f"low_rank[{name!r}].{what}", value, expected, low, high)
        if addition.dropout and torch.compiler.is_compiling():
            raise ValueError(f"{where}.dropout is {addition.dropout} under torch.compile, expected 0")


class Products:
    """The products of one pass, forward or backward, each in the dtype of the computation.

    A weight is cast for its product, and its copy is freed behind it.

    Args:
        w: the block's weights.
        added: additions by the name of the weight.
        dtype: of the computation.
        needs, needs_added: in the backward, which gradients are asked for: a bool for each weight; two, of A and of B,
            for each addition.
        seeds: in the backward, of the forward's Products: one for each addition with dropout.
    """

    def __init__(
        self,
        w: Weights,
        added: Mapping[str, LowRank],
        dtype: torch.dtype,
        needs: Any = None,
        needs_added: Mapping[str, tuple[bool, bool]] | None = None,
        seeds: dict[str, int] | None = None,
    ) -> None:
        self.w, self.added, self.dtype, self.needs, self.needs_added = w, added, dtype, needs, needs_added or {}
        self.gradients: dict[str, tuple[Tensor | None, Tensor | None]] = {}  # of A and B
        self.seeds = {} if seeds is None else seeds
        self._e: dict[str, Tensor] = {}  # dy (s B), from `tn` to `nn`
        self._masks: dict[str, Tensor | None] = {}  # from `tn` to `nn` too

    def _mask(self, name: str, x: Tensor) -> Tensor | None:
        """Of x, what an addition's A is given: see `kept`."""
        p = self.added[name].dropout
        if p == 0:
            return None
        if name not in self.seeds:
            seed = torch.empty((), dtype=torch.int64, device="cpu").random_()
            if x.is_meta or isinstance(x, FakeTensor) or isinstance(seed, FakeTensor):
                return torch.empty_like(x, dtype=torch.int16)
            self.seeds[name] = int(seed)
        return kept(x, p, self.seeds[name])

    def _scale(self, name: str) -> float:
        """s, with dropout s / (1 - p)."""
        part = _dropped(self.added[name].dropout)
        return self.added[name].scale * (PARTS / (PARTS - part) if part < PARTS else 1.0)

    def _ab(self, name: str) -> tuple[Tensor, Tensor]:
        """A and s B in the dtype of the computation."""
        a, b, *_ = self.added[name]
        wide = torch.promote_types(b.dtype, self.dtype)  # s B is not rounded to less than the computation has
        return a.to(self.dtype), (b.to(wide) * self._scale(name)).to(self.dtype)

    def nt(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [R, V] of x [R, C]."""
        y = linear.nt(x, getattr(self.w, name).to(self.dtype), None if bias is None else bias.to(self.dtype))
        if name not in self.added:
            return y
        a, b = self._ab(name)
        u = linear.nt(_masked(x, self._mask(name, x)), a)
        # in place, unless a dispatch mode has seen the product: selective checkpointing may keep it
        if torch.compiler.is_compiling() or plain(y):
            return linear.nt(u, b, out=y, accumulate=True)
        return y + linear.nt(u, b)

    def reads(self, *names: str) -> bool:
        """Whether the gradients of these layers' parameters, as far as they are asked for, need the layers' input."""
        return any([getattr(self.needs, name) or any(self.needs_added.get(name, ())) for name in names])

    def tn(self, name: str, dy: Tensor, x: Tensor | None) -> Tensor | None:
        """The gradient of the weight, None where it is not asked for; those of its addition go to `gradients`.

        x is the layer's input, or None where `reads` says that it is not needed.
        """
        if x is None:
            return None
        needs_a, needs_b = self.needs_added.get(name, (False, False))
        da = db = None
        if needs_a or needs_b:
            a, b = self._ab(name)
            mask = self._masks[name] = self._mask(name, x)
            seen = _masked(x, mask)
            if needs_a:
                e = self._e[name] = linear.nn(dy, b)
                da = _gradient(self.added[name].a_rC, e, seen)
            if needs_b:
                # as (u^T dy)^T: the paths are for wide products, and B is narrow
                db = _gradient(self.added[name].b_Vr.t(), linear.nt(seen, a), dy, self._scale(name)).t().contiguous()
            self.gradients[name] = (da, db)
        weight = getattr(self.w, name)
        return linear.tn(dy, x).to(weight.dtype) if getattr(self.needs, name) else None

    def nn(self, name: str, dy: Tensor, dx: Tensor | None = None) -> Tensor:
        """dx [R, C] of dy [R, V], added to the `dx` that is given."""
        weight = getattr(self.w, name).to(self.dtype)
        dx = linear.nn(dy, weight) if dx is None else linear.nn(dy, weight, out=dx, accumulate=True)
        if name in self.added:
            a, b = self._ab(name)
            e = self._e.pop(name) if name in self._e else linear.nn(dy, b)
            mask = self._masks.pop(name) if name in self._masks else self._mask(name, dx)
            if mask is None:
                linear.nn(e, a, out=dx, accumulate=True)
            else:
                dx += _masked(linear.nn(e, a), mask)
        return dx


def kept(x: Tensor, p: float, seed: int) -> Tensor | None:
    """Which numbers of x a dropout of probability p keeps: 1 for those, 0 for the others, int16; None for all.

    16 bits are drawn for each number: torch draws 64 at a time in a sixth of the time of four calls of its bernoulli_.
    """
    part, n = _dropped(p), x.numel()
    if part in (0, PARTS):
        return None if part == 0 else torch.zeros(x.shape, dtype=torch.int16, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.empty((n + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None, generator=generator)
    return drawn.view(torch.int16)[:n].ge_(part - PARTS // 2).view(x.shape)


def _dropped(p: float) -> int:
    """The probability p in parts."""
    return round(p * PARTS)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _gradient(p: Tensor, dy: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale dy^T x in the dtype of p; added up, and where the product's path can scaled, in float32 at least."""
    half = dy.dtype in (torch.bfloat16, torch.float16)
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device) if half else None
    d = linear.tn(dy, x, out=out)
    return (d if scale == 1.0 else d * scale).to(p.dtype)
