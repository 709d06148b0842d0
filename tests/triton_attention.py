"""attention in Triton, under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_bug_is_caught, assert_within_budget
from torch import Tensor

import llama_fast as lf
from llama_fast.kernels import launch
from llama_fast.kernels.attention import forward
from llama_fast.kernels.attention_launch import Tiles
from llama_fast.kernels.attention_tiles import aligned
from llama_fast.ops import reference
from llama_fast.ops.dispatch import primitives
from llama_fast.verify import Case

SMALL = Tiles(32, 16, 4, 1)
WALKED = {"attention_fwd": SMALL, "attention_dkdv": SMALL, "attention_dq": SMALL}  # products equal bit for bit


def _case(
    T: int, S: int, H: int = 2, G: int = 1, D: int = 32, B: int = 1, options: dict[str, Any] | None = None, **kw: Any
) -> Case:
    return Case("attention", {"B": B, "T": T, "S": S, "H": H, "G": G, "D": D}, options or {}, **kw)


def _packed(*bounds: int, D: int = 32, options: dict[str, Any] | None = None) -> Case:
    dims = {"R": bounds[-1], "N": len(bounds), "H": 2, "G": 1, "D": D}
    return Case(
        "attention", dims, options or {}, tensors={"cu_seqlens": lambda _: torch.tensor(bounds, dtype=torch.int32)}
    )


# The tiles of SMALL: sizes on both sides of 16 and 32 keys and queries.
CASES = [
    _case(70, 70),
    _case(33, 64, options={"causal": False}),
    _case(40, 90, D=24, H=3, B=2),
    _case(70, 37, D=40, G=2),  # the first 33 rows see nothing
    _case(80, 80, D=16, options={"window": 40}),
    _case(60, 20, D=16, options={"window": 9}),
    _case(9, 100, H=4, D=16),
    _case(3, 40, H=6, G=2, D=16, strided=True),
    _case(50, 50, D=16, scale=4.0, options={"scale": 0.3}),
    _packed(0, 0, 33, 34, 34, 80),
    _packed(0, 20, 52, 70, D=16, options={"causal": False}),
    _packed(0, 20, 70, D=16, options={"window": 20}),
]


def _forced(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    for kernel, tiles in WALKED.items():
        monkeypatch.setitem(launch._forced, kernel, replace(tiles, **changes))


# dq and dk are exactly 0 here in float32, as eager PyTorch's; in half precision only the CPU's are
ONE_KEY = [_case(20, 70, D=16, options={"window": 1}), _case(1, 1, D=16)]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"tma": True, "swapped": False})],
    ids=["float32", "bfloat16", "bfloat16 with descriptors, not transposed"],
)
def test_budget(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """Every loop of the kernels: float32 has its own, half precision one with the mask and one without."""
    _forced(monkeypatch, **changes)
    for case in CASES + (ONE_KEY if dtype == torch.float32 else []):
        assert_within_budget(case, "triton", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_with_the_launch_parameters_of_every_day(dtype: torch.dtype) -> None:
    """D = 256 in half precision only: in float32 the order in which NumPy adds 256 products decides."""
    for case in (
        _case(150, 150, H=1, D=64),
        _case(130, 200, H=1, D=128),
        *([_case(20, 70, D=256)] if dtype != torch.float32 else []),
        _case(40, 40, D=96, options={"window": 30}),
        _case(1, 600, H=8, G=2, D=80),
        _packed(0, 100, 101, 140, D=64),
    ):
        assert_within_budget(case, "triton", dtype)


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_shares_of_the_keys_are_joined(splits: int) -> None:
    """7 shares of 6 blocks: one is empty."""
    for T, options in ((1, (True, 0)), (3, (True, 40)), (5, (False, 0)), (20, (True, 0))):
        q, k, v = _case(T, 90, H=4, G=2, D=16).inputs(torch.float32).values()
        out, lse = forward(q, k, v, None, 0.25, *options, SMALL, 2, splits)
        exact = reference.attention_fwd(q.double(), k.double(), v.double(), None, 0.25, *options)
        torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [0, 1, 20])
def test_no_keys(T: int) -> None:
    q = torch.randn(1, T, 2, 16)
    k = torch.randn(1, 0, 1, 16)
    with lf.backend("triton"):
        out, lse = primitives["attention_fwd"](q, k, k, None, 0.25, True, 0, backend="triton")
        dq, dk, dv = primitives["attention_bwd"](q, q, k, k, out, lse, None, 0.25, True, 0, backend="triton")
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(dq, torch.zeros_like(q))
    assert torch.isneginf(lse).all()
    assert dk.shape == dv.shape == k.shape


def test_rows_that_see_nothing_and_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    _forced(monkeypatch)
    q, k, v = _case(80, 50, D=16).inputs(torch.float32).values()
    out, lse = primitives["attention_fwd"](q, k, v, None, 0.2, True, 30, backend="triton")
    exact = reference.attention_fwd(q.double(), k.double(), v.double(), None, 0.2, True, 30)
    assert torch.equal(out[:, :30], torch.zeros(1, 30, 2, 16))
    assert torch.isneginf(lse[..., :30]).all()
    torch.testing.assert_close(lse[..., 30:].double(), exact[1][..., 30:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"scale": -0.7}, {"window": 1}])
def test_gradients_of_a_query_that_sees_one_key_are_exact(monkeypatch: pytest.MonkeyPatch, changes: Any) -> None:
    """Its weight is 1 and dq is 0, though products are rounded: eager PyTorch's are exact, so the budget is nothing."""
    _forced(monkeypatch)
    T = 40 if "window" in changes else 1
    leaves = [x.requires_grad_() for x in _case(T, T, H=4, G=2, D=48, scale=3.0).inputs(torch.float32).values()]
    dout = torch.randn(1, T, 4, 48)
    with lf.backend("triton"):
        out = lf.attention(*leaves, **changes)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert torch.equal(out, leaves[2].repeat_interleave(2, dim=2))
    assert torch.equal(dq, torch.zeros_like(dq))
    assert torch.equal(dk, torch.zeros_like(dk))
    torch.testing.assert_close(dv, dout.unflatten(2, (2, 2)).sum(3), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_negative_and_zero_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    _forced(monkeypatch)
    leaves = [x.requires_grad_() for x in _case(60, 60, D=16).inputs(torch.float32).values()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with lf.backend("triton"):
        out = lf.attention(*leaves, scale=scale)
        ours = [out, *torch.autograd.grad(out.sum(), leaves)]
    out = reference.attention(*exact, scale=scale)
    for a, b in zip(ours, [out, *torch.autograd.grad(out.sum(), exact)], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_huge_scores_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of -1e4 to 1e4, one key ahead of all others: the weights are 0 and 1, and nothing overflows."""
    _forced(monkeypatch)
    T = 70
    q, v = torch.ones(1, T, 2, 16), torch.randn(1, T, 2, 16)
    k = torch.full((1, T, 2, 16), -625.0)
    k[:, 40] = 625.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with lf.backend("triton"):
        out = lf.attention(*leaves, scale=1.0)
        gradients = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(out[:, 40:], v[:, 40:41].expand(1, T - 40, 2, 16), rtol=1e-6, atol=0.0)
    assert all(torch.isfinite(x).all() for x in gradients)


def test_nan_and_inf_reach_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    _forced(monkeypatch)
    q, k, v = _case(80, 80, H=4, G=4, D=16).inputs(torch.float32).values()
    q[0, 7, 1, 3] = math.nan
    q[0, 60, 2, 5] = math.inf
    k[0, 0, 3, 0] = math.nan
    v[0, 0, 0, 2] = math.inf
    with lf.backend("triton"):
        out = lf.attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    assert torch.equal(torch.isnan(out), torch.isnan(truth))
    assert torch.equal(torch.isinf(out), torch.isinf(truth))


def test_views_are_copied_only_where_rows_are_not_aligned() -> None:
    fused = torch.randn(2, 9, 4, 48)
    for x in (fused, fused[..., 16:32], fused.transpose(1, 2), fused[:, :, 1:3]):
        assert aligned(x) is x
    for x in (fused[..., 1:17], torch.randn(2, 9, 4, 49)[..., :16], fused.transpose(2, 3)):
        assert torch.equal(aligned(x), x)
        assert aligned(x).is_contiguous()


def test_bounds_of_sequences_may_be_strided() -> None:
    bounds = torch.tensor([[0, 9], [13, 9], [40, 9]], dtype=torch.int32)[:, 0]
    inputs = [torch.randn(40, 2, 16).requires_grad_() for _ in range(3)]
    found = []
    for cu in (bounds, bounds.contiguous()):
        with lf.backend("triton"):
            out = lf.attention(*inputs, cu_seqlens=cu)
        found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bounds_of_sequences_that_are_no_rows_stay_within_the_tensors() -> None:
    """Under torch.compile nobody checks them; the kernels clamp what they read."""
    q, k, v = (x[0] for x in _case(30, 30, D=16).inputs(torch.float32).values())
    for bounds in ([0, 900, 30], [-5, 12, 30], [0, 20, 10]):
        cu = torch.tensor(bounds, dtype=torch.int32)
        primitives["attention_fwd"](q[None], k[None], v[None], cu, 0.25, True, 0, backend="triton")


def _first_key_hidden(results: tuple[Tensor, ...], args: Any) -> None:
    q, k, v = args["q"], args["k"][:, 1:], args["v"][:, 1:]
    results[0][:, -1:] = reference.attention(q[:, -1:], k, v)


def _one_head_of_the_group_missing(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].mul_(0.5)


@pytest.mark.parametrize(
    ("primitive", "bug"), [("attention_fwd", _first_key_hidden), ("attention_bwd", _one_head_of_the_group_missing)]
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Any) -> None:
    assert_bug_is_caught(monkeypatch, _case(40, 40, D=16), primitive, bug, target_name="triton")
