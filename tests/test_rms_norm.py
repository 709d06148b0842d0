"""rms_norm and add_rms_norm: error budget on every target, gradients, bad input, and bugs that must be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import DTYPES, TARGETS, assert_bug_is_caught, assert_within_budget, target

import llama_fast as lf
from llama_fast.ops import reference
from llama_fast.verify import Case

SHAPES = [
    {"...": (2, 5), "C": 3},
    {"...": (3, 37), "C": 512},
    {"...": (300,), "C": 1003},
    {"...": (2,), "C": 70000},
    {"...": (0,), "C": 16},
    {"...": (), "C": 48},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_budget(op: str, target_name: str, dtype: torch.dtype) -> None:
    for dims in SHAPES:
        assert_within_budget(Case(op, dims), target_name, dtype)
    assert_within_budget(Case(op, {"...": (3, 37), "C": 512}, strided=True), target_name, dtype)
    assert_within_budget(Case(op, {"...": (9,), "C": 100}, {"eps": 1e-2}, scale=0.01), target_name, dtype)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_gradcheck(op: str) -> None:
    inputs = [x.double().requires_grad_() for x in Case(op, {"...": (2, 3), "C": 5}).inputs(torch.float64).values()]
    assert torch.autograd.gradcheck(getattr(lf, op), inputs)


@pytest.mark.parametrize("target_name", TARGETS)
def test_one_column_gives_the_sign(target_name: str) -> None:
    x = torch.tensor([[3.0], [-0.5], [1e-3]])
    with target(target_name):
        torch.testing.assert_close(lf.rms_norm(x, torch.full((1,), 2.0), 0.0), 2.0 * x.sign())


@pytest.mark.parametrize("target_name", TARGETS)
def test_transposed_input_and_zero_row(target_name: str) -> None:
    x = torch.randn(16, 8).T
    x[3] = 0.0
    with target(target_name):
        y = lf.rms_norm(x, torch.ones(16))
    assert torch.equal(y[3], torch.zeros(16))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (16,), None, 1e-6))


@pytest.mark.parametrize("size", [1e-18, 1e18])
@pytest.mark.parametrize("target_name", [name for name in TARGETS if name != "reference"])
def test_gradient_of_rows_whose_squares_just_fit(target_name: str, size: float) -> None:
    """Without a budget: of F.rms_norm's gradient nothing is left here."""
    x, weight, dy = torch.randn(8, 100) * size, torch.randn(100), torch.randn(8, 100)
    grads = []
    with target(target_name):
        for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
            y = (lf if leaf.dtype == torch.float32 else reference).rms_norm(leaf, weight.to(leaf.dtype), 0.0)
            grads += torch.autograd.grad(y, leaf, dy.to(leaf.dtype))
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=0.0, atol=1e-6 * float(grads[1].abs().max()))


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_repeats_bitwise_for_any_number_of_threads(op: str) -> None:
    inputs = [x.requires_grad_() for x in Case(op, {"...": (999,), "C": 515}).inputs(torch.float32).values()]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            outputs = getattr(lf, op)(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            found.append([*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_of_both_inputs_of_add_rms_norm_are_tensors_of_their_own() -> None:
    """Else the second backward, which adds into `.grad`, would add to both twice."""
    for shape in ((6, 8), (2, 3, 8), (8,)):
        leaves = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        for _ in range(2):
            sum(y.square().sum() for y in lf.add_rms_norm(*leaves, torch.ones(8))).backward()
        copies = [x.detach().double().requires_grad_() for x in leaves]
        sum(y.square().sum() for y in lf.add_rms_norm(*copies, torch.ones(8, dtype=torch.float64))).backward()
        for x, exact in zip(leaves, copies, strict=True):
            torch.testing.assert_close(x.grad, 2 * exact.grad.float())


def test_the_results_of_add_rms_norm_may_be_changed_in_place() -> None:
    """As nn.Dropout(inplace=True) does with the normalised one."""
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8)
    found, expected = lf.add_rms_norm(x, x, weight), lf.add_rms_norm(x, x, weight)
    (found[0].mul_(2.0) + found[1]).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad((expected[0] * 2.0 + expected[1]).sum(), x)[0])


def test_compiles_without_graph_break() -> None:
    x, w = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    compiled = torch.compile(lambda x, w: lf.rms_norm(x, w).sin(), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(x, w).sum(), (x, w)),
        torch.autograd.grad(lf.rms_norm(x, w).sin().sum(), (x, w)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def _forget_last_column(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0][:, -1] = args["x"][:, -1] if "x" in args else 0.0


def _dweight_misses_a_row(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[1].sub_(args["dy"][-1] * args["x"][-1] * args["rstd"][-1])


def _mean_over_one_column_less(results: tuple[torch.Tensor, ...], args: Any) -> None:
    C = args["x"].shape[1]
    results[0].mul_(((C - 1) / C) ** 0.5)


@pytest.mark.parametrize(
    ("primitive", "bug"),
    [
        ("rms_norm_fwd", _forget_last_column),
        ("rms_norm_fwd", _mean_over_one_column_less),
        ("rms_norm_bwd", _dweight_misses_a_row),
    ],
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None]) -> None:
    case = Case("rms_norm", {"...": (50,), "C": 515})
    assert_bug_is_caught(monkeypatch, case, primitive, bug)


def test_bad_input_names_argument_value_and_expectation() -> None:
    x, w = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \[C\] with C = 8"):
        lf.rms_norm(x, w[:7])
    with pytest.raises(ValueError, match=r"weight has dtype torch.bfloat16, expected torch.float32 as x"):
        lf.rms_norm(x, w.bfloat16())
    with pytest.raises(ValueError, match=r"weight is on meta, expected cpu as x"):
        lf.rms_norm(x, w.to("meta"))
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        lf.rms_norm(x.long(), w)
    with pytest.raises(ValueError, match=r"eps is -1"):
        lf.rms_norm(x, w, -1)
    with pytest.raises(ValueError, match=r"residual has shape \(3, 8\)"):
        lf.add_rms_norm(x, x[:3], w)
