"""rms_norm and add_rms_norm in Triton, under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_bug_is_caught, assert_within_budget

import llama_fast as lf
from llama_fast.kernels import launch, rms_norm
from llama_fast.ops.dispatch import primitives
from llama_fast.verify import Case

OPS = ["rms_norm", "add_rms_norm"]
SHAPES = [
    {"...": (2, 5), "C": 3},
    {"...": (3, 7), "C": 512},
    {"...": (70,), "C": 100},
    {"...": (9,), "C": 4100},
    {"...": (0,), "C": 16},
    {"...": (), "C": 48},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_budget(op: str, dtype: torch.dtype) -> None:
    for dims in SHAPES:
        assert_within_budget(Case(op, dims), "triton", dtype)
    assert_within_budget(Case(op, {"...": (3, 7), "C": 512}, strided=True), "triton", dtype)
    assert_within_budget(Case(op, {"...": (9,), "C": 100}, {"eps": 1e-2}, scale=0.01), "triton", dtype)
    if dtype == torch.float16:
        assert_within_budget(Case(op, {"...": (2,), "C": 17000}), "triton", dtype)  # past both limits


@pytest.mark.parametrize("op", OPS)
def test_both_paths_of_long_rows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for rows that fit no registers, on rows of several pieces with a tail, and more parts than one."""
    for name, value in {"_FWD_COLUMNS": 8, "_BWD_COLUMNS": 8, "_LOOP_COLUMNS": 16, "_PART_ROWS": 4}.items():
        monkeypatch.setattr(rms_norm, name, value)
    for dtype in DTYPES:
        assert_within_budget(Case(op, {"...": (11,), "C": 75}), "triton", dtype)
        assert_within_budget(Case(op, {"...": (11,), "C": 75}, strided=True), "triton", dtype)


def _run(op: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with lf.backend("triton"):
        outputs = getattr(lf, op)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])]


@pytest.mark.parametrize("op", OPS)
def test_candidates_are_right(op: str) -> None:
    inputs = [x.requires_grad_() for x in Case(op, {"...": (23,), "C": 600}).inputs(torch.float32).values()]
    expected = _run(op, inputs)
    for forward in rms_norm.forward_candidates(600)[::2]:
        with launch.force(f"{op}_fwd", forward):
            torch.testing.assert_close(_run(op, inputs), expected)
    for backward in rms_norm.backward_candidates(600)[::5]:
        with launch.force(f"{op}_bwd", backward):
            torch.testing.assert_close(_run(op, inputs), expected)


@pytest.mark.parametrize("op", OPS)
def test_repeats_bitwise(op: str) -> None:
    inputs = [x.requires_grad_() for x in Case(op, {"...": (45,), "C": 300}).inputs(torch.bfloat16).values()]
    assert all(torch.equal(a, b) for a, b in zip(_run(op, inputs), _run(op, inputs), strict=True))


def test_statistics_are_the_references() -> None:
    x, w = torch.randn(7, 33), torch.randn(33)
    ours, theirs = (primitives["rms_norm_fwd"](x, w, 1e-6, backend=b)[1] for b in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs)


def test_transposed_input_and_zero_row() -> None:
    x = torch.randn(16, 8).T
    x[3] = 0.0
    with lf.backend("triton"):
        y = lf.rms_norm(x, torch.ones(16))
    assert torch.equal(y[3], torch.zeros(16))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (16,), None, 1e-6))


def _dweight_misses_a_row(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[1].sub_(args["dy"][-1] * args["x"][-1] * args["rstd"][-1])


def test_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rms_norm", {"...": (20,), "C": 515})
    assert_bug_is_caught(monkeypatch, case, "rms_norm_bwd", _dweight_misses_a_row, target_name="triton")
