"""PyTorch's own fused ops as the backend `torch`, on a CPU: the error budget, rows without keys, options."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_within_budget

import llama_fast as lf
from llama_fast.ops import reference, vendor
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

SIZES = {"B": 2, "T": 33, "S": 33, "H": 4, "G": 2, "D": 32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"scale": 0.5}], ids=str)
def test_attention_budget(options: dict[str, Any], dtype: torch.dtype) -> None:
    for sizes in (
        SIZES,
        {**SIZES, "S": 50},
        {**SIZES, "S": 20},
        {**SIZES, "G": 4},
        {**SIZES, "T": 0},
        {**SIZES, "S": 0},
    ):
        assert_within_budget(Case("attention", sizes, options), "torch", dtype)
    bounds = {"cu_seqlens": lambda _: torch.tensor([0, 7, 7, 33], dtype=torch.int32)}
    packed = Case("attention", {"R": 33, "N": 4, "H": 4, "G": 2, "D": 32}, options, tensors=bounds)
    assert_within_budget(packed, "torch", dtype)


@pytest.mark.parametrize(("S", "window"), [(50, 5), (50, 1), (34, 30), (50, 100)])
def test_window_with_fewer_queries_than_keys_as_a_square(S: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way round a kernel whose gradients are wrong there, taken on the CPU's kernel, whose are right."""
    calls, square = [], vendor._bwd_square
    monkeypatch.setattr(vendor, "_WINDOW_NEEDS_SQUARE", frozenset({"cpu"}))
    monkeypatch.setattr(vendor, "_bwd_square", lambda *a: calls.append(1) or square(*a))
    for dtype in DTYPES:
        assert_within_budget(Case("attention", {**SIZES, "S": S}, {"window": window}), "torch", dtype)
    assert len(calls) >= len(DTYPES)


def test_log_sum_exp_is_the_references() -> None:
    q, k, v = Case("attention", {**SIZES, "S": 20}).inputs(torch.float32).values()
    found, expected = (
        lf.ops.dispatch.primitives["attention_fwd"](q, k, v, None, 0.2, True, 0, backend=b)[1]
        for b in ("torch", "reference")
    )
    torch.testing.assert_close(found, expected)
    assert (found[:, :, :13] == -torch.inf).all()


def test_rms_norm_objects_off_a_gpu() -> None:
    x = torch.randn(3, 8)
    with lf.backend("torch"), pytest.raises(lf.NotSupported, match="runs on cuda, the tensors are on cpu"):
        lf.rms_norm(x, torch.ones(8))


def _stand_in() -> dict[str, types.ModuleType]:
    """xformers.ops.fmha's interface, computed by PyTorch on a CPU."""
    fmha: Any = types.ModuleType("xformers.ops.fmha")

    class LowerTriangularFromBottomRightMask:
        pass

    fmha.attn_bias = types.SimpleNamespace(LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask)

    def forward(q: Any, k: Any, v: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None) -> Any:
        out, lse = vendor.attention_fwd(q, k, v, None, scale, attn_bias is not None, 0)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def backward(
        grad: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Any:
        return vendor.attention_bwd(grad, q, k, v, out, lse, None, scale, attn_bias is not None, 0)

    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    ops: Any = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    return {"xformers": types.ModuleType("xformers"), "xformers.ops": ops, "xformers.ops.fmha": fmha}


@pytest.mark.parametrize("causal", [True, False])
def test_xformers_is_called_as_its_interface_says(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llama_fast.ops.vendor_xformers", raising=False)
    xformers = importlib.import_module("llama_fast.ops.vendor_xformers")
    q, k, v = Case("attention", {**SIZES, "S": 50}).inputs(torch.float32).values()
    options = (None, 0.2, causal, 0)
    out, lse = xformers.attention_fwd(q, k, v, *options)
    expected, expected_lse = reference.attention_fwd(q, k, v, *options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    found = xformers.attention_bwd(torch.ones_like(out), q, k, v, out, lse, *options)
    for a, b in zip(found, reference.attention_bwd(torch.ones_like(out), q, k, v, out, lse, *options), strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.delitem(sys.modules, "llama_fast.ops.vendor_xformers")


def test_xformers_objects_to_what_it_is_not_handed() -> None:
    (b,) = (b for b in OPS["attention"].backends if b.name == "xformers")
    dims = {**SIZES, "causal": True, "window": 0}

    def objection(**changes: int) -> str | None:
        return next((text for limit in b.limits if (text := limit({**dims, **changes})) is not None), None)

    assert objection() is None
    assert objection(window=4) == objection(N=3) == "neither windows nor packed sequences are handed on"
    assert objection(T=40) == "T = 40 not in 1..S = 33"
