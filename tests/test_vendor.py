"""PyTorch's own fused ops as the backend `torch`, on a CPU: the error budget, rows without keys, options."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_within_budget

import llama_fast as lf
from llama_fast.ops import dispatch, reference, vendor
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


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-300])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"cu_seqlens": [0, 7, 7, 33]}], ids=str)
def test_negative_and_zero_scale(options: dict[str, Any], scale: float) -> None:
    """Of a head dim that the public function has this backend for."""
    options = {"scale": scale, **options}
    dims = {**SIZES, "D": 8}
    if "cu_seqlens" in options:
        options["cu_seqlens"], dims = torch.tensor(options["cu_seqlens"]).int(), {"R": 33, "H": 4, "G": 2, "D": 8}
    for sizes in (dims, *([] if "R" in dims else [{**dims, "S": 50}, {**dims, "S": 20}])):
        q, k, v = (x.requires_grad_() for x in Case("attention", sizes).inputs(torch.float32).values())
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, truth = lf.attention(q, k, v, **options), reference.attention(*exact, **options)
        dout = torch.randn_like(out)
        found = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        expected = [truth, *torch.autograd.grad(truth, exact, dout.double())]
        for a, b in zip(found, expected, strict=True):
            largest = max(float(b.detach().abs().max()), 1e-20)  # dq and dk vanish with the scale
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("S", "window"), [(50, 5), (50, 1), (34, 30), (50, 100)])
def test_window_with_fewer_queries_than_keys_as_a_square(S: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way round a kernel whose gradients are wrong there, taken on the CPU's kernel, whose are right."""
    calls, square = [], vendor._bwd_square
    monkeypatch.setattr(vendor, "_WINDOW_NEEDS_SQUARE", frozenset({"cpu"}))
    monkeypatch.setattr(vendor, "_bwd_square", lambda *a: calls.append(1) or square(*a))
    for dtype in DTYPES:
        assert_within_budget(Case("attention", {**SIZES, "S": S}, {"window": window}), "torch", dtype)
    assert len(calls) >= len(DTYPES)


def test_the_default_device_is_not_the_tensors() -> None:
    q, k, v = Case("attention", {**SIZES, "S": 50}).inputs(torch.float32).values()
    with torch.device("meta"), lf.backend("torch"):
        found = lf.attention(q, k, v)
    torch.testing.assert_close(found, lf.attention(q, k, v))


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


class _Operator:
    """An operator class of xFormers, which takes heads of up to 128."""

    @staticmethod
    def not_supported_reasons(inputs: Any) -> list[str]:
        return [f"K = {inputs.query.shape[-1]} > 128"] if inputs.query.shape[-1] > 128 else []


class _Broken:
    @staticmethod
    def not_supported_reasons(inputs: Any) -> list[str]:
        return ["not built"]


def _stand_in(**modules: Any) -> dict[str, types.ModuleType]:
    """xformers.ops.fmha's interface, computed by PyTorch on a CPU; `modules`: its families of operators."""
    fmha: Any = types.ModuleType("xformers.ops.fmha")
    fmha.Inputs = lambda q, k, v, attn_bias, scale: types.SimpleNamespace(query=q, key=k, value=v, attn_bias=attn_bias)
    for name, module in modules.items():
        setattr(fmha, name, module)

    class LowerTriangularFromBottomRightMask:
        pass

    fmha.attn_bias = types.SimpleNamespace(LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask)

    def forward(q: Any, k: Any, v: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None) -> Any:
        assert scale > 0.0
        out, lse = vendor.attention_fwd(q, k, v, None, scale, attn_bias is not None, 0)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def backward(
        grad: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Any:
        assert scale > 0.0
        return vendor.attention_bwd(grad, q, k, v, out, lse, None, scale, attn_bias is not None, 0)

    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    ops: Any = types.ModuleType("xformers.ops")
    ops.fmha = fmha
    top: Any = types.ModuleType("xformers")
    top.__version__, top._has_cpp_library = "0.0.99", True
    return {"xformers": top, "xformers.ops": ops, "xformers.ops.fmha": fmha}


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Imports the backend over a stand-in that is given."""

    def load(modules: dict[str, Any]) -> Any:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "llama_fast.ops.vendor_xformers", raising=False)
        dispatch.unavailable.cache_clear()
        return importlib.import_module("llama_fast.ops.vendor_xformers")

    yield load
    sys.modules.pop("llama_fast.ops.vendor_xformers", None)
    dispatch.unavailable.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
def test_xformers_is_called_as_its_interface_says(scale: float, causal: bool, xformers: Callable[..., Any]) -> None:
    backend = xformers(_stand_in())
    q, k, v = Case("attention", {**SIZES, "S": 50}).inputs(torch.float32).values()
    options = (None, scale, causal, 0)
    out, lse = backend.attention_fwd(q, k, v, *options)
    expected, expected_lse = reference.attention_fwd(q, k, v, *options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    found = backend.attention_bwd(torch.ones_like(out), q, k, v, out, lse, *options)
    for a, b in zip(found, reference.attention_bwd(torch.ones_like(out), q, k, v, out, lse, *options), strict=True):
        torch.testing.assert_close(a, b)


def test_xformers_objects_to_what_it_is_not_handed() -> None:
    (b,) = (b for b in OPS["attention"].backends if b.name == "xformers")
    dims = {**SIZES, "causal": True, "window": 0}

    def objection(**changes: int) -> str | None:
        return next((text for limit in b.limits if (text := limit({**dims, **changes})) is not None), None)

    assert objection() is None
    assert objection(window=4) == objection(N=3) == "neither windows nor packed sequences are handed on"
    assert objection(T=40) == "T = 40 not in 1..S = 33"


def _anywhere() -> Any:
    (b,) = (b for b in OPS["attention"].backends if b.name == "xformers")
    return dataclasses.replace(b, device=None)


def test_xformers_whose_kernels_cannot_be_loaded_is_unavailable(xformers: Callable[..., Any]) -> None:
    modules = _stand_in()
    modules["xformers"]._has_cpp_library = False  # type: ignore[attr-defined]
    reason = "xFormers 0.0.99: its kernels cannot be loaded beside torch "
    assert reason in str(xformers(modules).unavailable())
    dims = {**SIZES, "causal": True, "window": 0}
    assert reason in str(dispatch.objection(_anywhere(), dims, torch.bfloat16, "cpu"))
    library, again, told = (
        OSError("libcudart.so.12: cannot open"),
        OSError("could not load"),
        Exception("another torch"),
    )
    again.__cause__, told.__cause__ = library, again
    modules["xformers"]._cpp_lib = types.SimpleNamespace(_cpp_library_load_exception=told)  # type: ignore[attr-defined]
    assert str(xformers(modules).unavailable()).endswith(": libcudart.so.12: cannot open")


def test_xformers_that_does_not_import_is_unavailable(xformers: Callable[..., Any]) -> None:
    modules = _stand_in()
    del modules["xformers.ops.fmha"], modules["xformers.ops"].fmha  # type: ignore[attr-defined]
    assert "xFormers cannot be imported: " in str(xformers(modules).unavailable())


@pytest.mark.parametrize("broken", ["FwOp", "BwOp"])
def test_xformers_objects_with_its_own_operators_reasons(broken: str, xformers: Callable[..., Any]) -> None:
    good = types.SimpleNamespace(FwOp=_Operator, BwOp=_Operator)
    bad = types.SimpleNamespace(**{**vars(good), broken: _Broken})
    dims = {**SIZES, "causal": True, "window": 0}

    def objection(dims: dict[str, int], **modules: Any) -> str | None:
        assert xformers(_stand_in(**modules)).unavailable() is None
        return dispatch.objection(_anywhere(), dims, torch.bfloat16, "cpu")

    assert objection(dims, flash=good, cutlass=bad) is None
    direction = "forward" if broken == "FwOp" else "backward"
    assert objection(dims, cutlass=bad) == f"xFormers has no {direction} operator for this (cutlass: not built)"
    wide = objection({**dims, "D": 256}, flash=good, flash3=good)
    assert wide == "xFormers has no forward operator for this (flash3: K = 256 > 128 | flash: K = 256 > 128)"
