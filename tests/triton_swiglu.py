"""swiglu in Triton, under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_bug_is_caught, assert_results_may_replace_arguments, assert_within_budget

import llama_fast as lf
from llama_fast.kernels import launch, swiglu
from llama_fast.verify import Case

SHAPES = [
    {"...": (2, 5), "F": 3},
    {"...": (3, 7), "F": 512},
    {"...": (5,), "F": 4099},
    {"...": (0,), "F": 16},
    {"...": (), "F": 48},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget(dtype: torch.dtype) -> None:
    for dims in SHAPES:
        assert_within_budget(Case("swiglu", dims), "triton", dtype)
    assert_within_budget(Case("swiglu", {"...": (3, 7), "F": 100}, strided=True), "triton", dtype)
    assert_within_budget(Case("swiglu", {"...": (9,), "F": 100}, scale=30.0), "triton", dtype)


@pytest.mark.parametrize("parameters", swiglu.CANDIDATES, ids=str)
def test_every_candidate_gives_the_same_bits(parameters: swiglu.Launch) -> None:
    inputs = [x.requires_grad_() for x in Case("swiglu", {"...": (3,), "F": 1500}).inputs(torch.bfloat16).values()]

    def run() -> list[torch.Tensor]:
        with lf.backend("triton"):
            y = lf.swiglu(*inputs)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    expected = run()
    with launch.force("swiglu_fwd", parameters), launch.force("swiglu_bwd", parameters):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_infinite_gates() -> None:
    gate = torch.tensor([[torch.inf, -torch.inf, torch.nan, 200.0, -200.0]])
    with lf.backend("triton"):
        y = lf.swiglu(gate, torch.full_like(gate, 2.0))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * 2.0, equal_nan=True)


def test_results_may_take_the_place_of_gate_and_up() -> None:
    for shape in ((5, 515), (3, 4100)):
        assert_results_may_replace_arguments("swiglu_fwd", shape, (0,), "triton", torch.bfloat16)
        assert_results_may_replace_arguments("swiglu_bwd", shape, (1, 2), "triton", torch.bfloat16)


def test_measuring_leaves_the_arguments_that_results_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """To measure launch parameters runs the kernel many times, in place of its arguments not twice with one result."""
    timed: list[Any] = []

    def measure(*_: Any) -> Any:
        run = _[-1]
        timed.append([run(swiglu.HEURISTIC) for _ in range(3)])
        return swiglu.HEURISTIC

    monkeypatch.setattr(swiglu, "choose", measure)
    assert_results_may_replace_arguments("swiglu_fwd", (5, 515), (0,), "triton", torch.bfloat16)
    assert_results_may_replace_arguments("swiglu_bwd", (5, 515), (1, 2), "triton", torch.bfloat16)
    assert len(timed) == 4


def _slope_is_the_sigmoid(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0].copy_(args["dy"] * args["up"] * args["gate"].sigmoid())


def test_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("swiglu", {"...": (5,), "F": 515})
    assert_bug_is_caught(monkeypatch, case, "swiglu_bwd", _slope_is_the_sigmoid, target_name="triton")
