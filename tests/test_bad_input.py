"""Bad, empty and strided input, of every op of the table alike: a named error before anything is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast as lf
from llama_fast.ops.table import OPS
from llama_fast.verify import CASES, Case

FIRST = {op: next(c for c in CASES if c.op == op) for op in OPS}
# the same calls without a single row or token
EMPTY = {
    "rms_norm": [{"...": (0, 3), "C": 16}, {"...": (2, 0), "C": 16}, {"...": (3,), "C": 0}],
    "add_rms_norm": [{"...": (0, 3), "C": 16}, {"...": (3,), "C": 0}],
    "swiglu": [{"...": (0,), "F": 16}, {"...": (3,), "F": 0}],
    "rope": [{"B": 0, "T": 3, "H": 4, "G": 2, "D": 16}, {"B": 2, "T": 0, "H": 4, "G": 2, "D": 16}],
    "attention": [
        {"B": 0, "T": 3, "S": 3, "H": 4, "G": 2, "D": 16},
        {"B": 2, "T": 0, "S": 0, "H": 4, "G": 2, "D": 16},
        {"B": 2, "T": 0, "S": 5, "H": 4, "G": 2, "D": 16},
        {"B": 2, "T": 3, "S": 0, "H": 4, "G": 2, "D": 16},
    ],
    "linear_cross_entropy": [{"...": (0,), "C": 16, "V": 32}],
}
TENSORS = [(op, name) for op in OPS for name in FIRST[op].inputs(torch.float32)]


def _call(op: str, tensors: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    result = getattr(lf, op)(**tensors, **FIRST[op].options, **options)
    return result if isinstance(result, tuple) else (result,)


def _with(op: str, name: str, value: Any) -> dict[str, Any]:
    return {**FIRST[op].inputs(torch.float32), name: value}


def test_every_op_is_covered() -> None:
    assert set(EMPTY) == set(OPS)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op: str, name: str) -> None:
    good = FIRST[op].inputs(torch.float32)[name]
    for dtype in (torch.int16, torch.complex64, torch.bool):
        with pytest.raises(ValueError, match=rf"{op}: {name} has dtype {dtype}, expected"):
            _call(op, _with(op, name, good.to(dtype)))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_number_of_dimensions(op: str, name: str) -> None:
    good = FIRST[op].inputs(torch.float32)[name]
    with pytest.raises(ValueError, match=rf"{op}: "):
        _call(op, _with(op, name, good.reshape(-1)[0]))
    if "..." not in OPS[op].public[name]:  # any number of leading dimensions will do
        with pytest.raises(ValueError, match=rf"{op}: {name} has shape"):
            _call(op, _with(op, name, good.reshape(1, 1, *good.shape)))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_size(op: str, name: str) -> None:
    good = FIRST[op].inputs(torch.float32)[name]
    longer = torch.cat((good, good[..., :1]), dim=-1)
    with pytest.raises(ValueError, match=rf"{op}: "):
        _call(op, _with(op, name, longer))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if name != next(iter(OPS[op].public))])
def test_wrong_device(op: str, name: str) -> None:
    first = next(iter(OPS[op].public))
    with pytest.raises(ValueError, match=rf"{op}: {name} is on meta, expected cpu as {first}"):
        _call(op, _with(op, name, FIRST[op].inputs(torch.float32)[name].to("meta")))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_tensor(op: str, name: str) -> None:
    optional = any(a.name == name and a.type == "Tensor?" for a in OPS[op].fwd.args)
    for value, kind in (([1.0, 2.0], "list"), *([] if optional else [(None, "NoneType")])):
        with pytest.raises(Exception, match=f"{op}: {name} is a {kind}, expected a torch.Tensor") as caught:
            _call(op, _with(op, name, value))
        assert caught.type is ValueError, f"{op}: {name} as a {kind} raises {caught.value!r}"


@pytest.mark.parametrize("op", OPS)
def test_empty_input_gives_empty_results_and_gradients(op: str) -> None:
    for dims in EMPTY[op]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = Case(op, dims).inputs(dtype) if op != "linear_cross_entropy" else _no_rows(dims, dtype)
            leaves = {
                n: x.requires_grad_() if x.is_floating_point() and n not in ("cos", "sin") else x
                for n, x in inputs.items()
            }
            options = {"reduction": "sum"} if op == "linear_cross_entropy" else {}
            results = _call(op, leaves, **options)
            wanted = [x for x in leaves.values() if x.requires_grad]
            for x, g in zip(
                wanted, torch.autograd.grad(results, wanted, [torch.ones_like(r) for r in results]), strict=True
            ):
                assert g.shape == x.shape
                assert not g.any(), f"{op} {dims}: a gradient of nothing is not zero"
            for r in results:
                assert not r.any()


def _no_rows(dims: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "hidden": torch.empty(*dims["..."], dims["C"], dtype=dtype),
        "weight": torch.randn(dims["V"], dims["C"]).to(dtype),
        "targets": torch.empty(dims["..."], dtype=torch.int64),
    }


@pytest.mark.parametrize("op", OPS)
def test_strided_input_equals_contiguous(op: str) -> None:
    case = FIRST[op]
    plain = case.inputs(torch.float32)
    strided = {}
    for name, x in plain.items():
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        strided[name] = wide[..., ::2].copy_(x)  # not even the last dimension is contiguous
        assert x.numel() == 0 or not strided[name].is_contiguous()
    for a, b in zip(_call(op, strided), _call(op, plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(op: str) -> None:
    inputs = FIRST[op].inputs(torch.float32)
    before = {n: x.clone() for n, x in inputs.items()}
    leaves = [x.requires_grad_() for n, x in inputs.items() if x.is_floating_point() and n not in ("cos", "sin")]
    results = _call(op, inputs)
    torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
    for n, x in inputs.items():
        assert torch.equal(x, before[n]), n


def test_head_counts_that_do_not_divide() -> None:
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 4, 16)
    with pytest.raises(ValueError, match="attention: G = 4 does not divide H = 6"):
        lf.attention(q, k, k)


@pytest.mark.parametrize("bounds", [[0, 5, 3, 8], [1, 8], [0, 7], [0, 9], [0, -1, 8], [0], []])
def test_cu_seqlens_out_of_order(bounds: list[int]) -> None:
    q = torch.randn(8, 2, 16)
    with pytest.raises(ValueError, match="cu_seqlens"):
        lf.attention(q, q, q, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=8)


@pytest.mark.parametrize("value", [3, math.nan, "long"])
def test_max_seqlen_that_is_no_bound(value: Any) -> None:
    q = torch.randn(6, 2, 16)
    with pytest.raises(ValueError, match=f"attention: max_seqlen is {value!r}, expected at least 4, the longest sequ"):
        lf.attention(q, q, q, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32), max_seqlen=value)


@pytest.mark.parametrize("bad", [32, -1, 1 << 40])
def test_targets_outside_the_vocabulary(bad: int) -> None:
    hidden, weight = torch.randn(4, 16), torch.randn(32, 16)
    with pytest.raises(ValueError, match="targets"):
        lf.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, bad, 2]))


@pytest.mark.parametrize(
    ("op", "name", "values"),
    [
        ("rms_norm", "eps", [-1.0, math.nan, None, "small"]),
        ("add_rms_norm", "eps", [-1.0, math.nan, None, "small"]),
        ("rope", "interleaved", [None, "yes", 2]),
        ("attention", "window", [-1, 0, 2.5, "3", 2**63, True]),
        ("attention", "scale", [math.nan, math.inf, -math.inf, "a"]),
        ("attention", "causal", [None, "no", 2]),
        ("linear_cross_entropy", "ignore_index", [None, 2.5, "a", 2**63]),
        ("linear_cross_entropy", "label_smoothing", [-0.1, 1.5, math.nan, None]),
        ("linear_cross_entropy", "z_loss", [-1.0, math.nan, None]),
        ("linear_cross_entropy", "reduction", ["median", None]),
    ],
)
def test_options_out_of_range(op: str, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"{op}: {name} is {re.escape(repr(value))}, expected"):
            _call(op, FIRST[op].inputs(torch.float32), **{name: value})


def test_a_backend_of_no_op() -> None:
    with pytest.raises(ValueError, match="'quick' is not one of"), lf.backend("quick"):
        pass


def test_a_forced_backend_that_cannot_says_why_and_nothing_else_runs() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with lf.backend("cpu"), pytest.raises(lf.NotSupported, match=r"cpu: dtype torch.float64 not in"):
        lf.rms_norm(x, x[0])
