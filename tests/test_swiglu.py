"""swiglu: error budget on every target, the edges of the exponential, streaming stores, and bugs that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import (
    DTYPES,
    TARGETS,
    assert_bug_is_caught,
    assert_results_may_replace_arguments,
    assert_within_budget,
    target,
)

import llama_fast as lf
from llama_fast.ops import native
from llama_fast.verify import Case

CPU_TARGETS = [t for t in TARGETS if t != "reference"]
EDGES = [0.0, -0.0, 1.0, -20.0, 20.0, -88.0, -90.0, -104.0, -200.0, 200.0, 3e38, -3e38, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_budget(target_name: str, dtype: torch.dtype) -> None:
    for lead, F in (((2, 5), 1), ((7,), 3), ((3, 37), 512), ((30,), 1003), ((2,), 70001), ((0,), 16), ((), 48)):
        assert_within_budget(Case("swiglu", {"...": lead, "F": F}), target_name, dtype)
    assert_within_budget(Case("swiglu", {"...": (3, 37), "F": 515}, strided=True), target_name, dtype)
    assert_within_budget(Case("swiglu", {"...": (9,), "F": 1000}, scale=8.0), target_name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_edge_values_are_where_pytorch_has_them(target_name: str, dtype: torch.dtype) -> None:
    gate = torch.tensor([*EDGES, *EDGES]).to(dtype).requires_grad_()
    up = torch.tensor([1.0] * len(EDGES) + [0.0] * len(EDGES)).to(dtype).requires_grad_()
    theirs = torch.nn.functional.silu(gate) * up
    with target(target_name):
        ours = lf.swiglu(gate, up)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    wanted = torch.autograd.grad(theirs.sum(), (gate, up))
    for found, expected in zip(torch.autograd.grad(ours.sum(), (gate, up)), wanted, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("target_name", CPU_TARGETS)
@pytest.mark.parametrize(
    ("dtype", "ulps"), [(torch.float32, 4.0), (torch.float16, 0.6), (torch.bfloat16, 0.6)], ids=str
)
def test_sigmoid_over_its_whole_domain(target_name: str, dtype: torch.dtype, ulps: float) -> None:
    if dtype == torch.float32:
        gate = torch.linspace(-87.0, 87.0, 1_000_001)
    else:
        gate = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)  # every value that there is
        gate = gate[gate.isfinite() & (gate.float().abs() < 87.0)]
    exact = torch.nn.functional.silu(gate.double())
    with target(target_name):
        found = lf.swiglu(gate, torch.ones_like(gate)).double()
    info = torch.finfo(dtype)
    unit = info.eps * torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=info.tiny))))
    # below the smallest normal number AVX-512's conversion to bfloat16 gives zero
    normal = exact.abs() >= 2 * info.tiny
    assert ((found - exact).abs() / unit)[normal].max().item() <= ulps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", CPU_TARGETS)
def test_streamed_outputs_equal_stored_ones(target_name: str, dtype: torch.dtype) -> None:
    R, F = 2100, 4099  # 17 MB of half precision: past the caches; rows of 7 are not
    dy, gate, up = (torch.randn(R, F).to(dtype) for _ in range(3))
    buffers = [torch.full((R * F + 3,), math.nan, dtype=dtype)[3:].view(R, F) for _ in range(3)]  # off a boundary
    with target(target_name):
        native._native.cpu.swiglu_fwd(gate, up, buffers[0])
        native._native.cpu.swiglu_bwd(dy, gate, up, *buffers[1:])
        few = slice(0, 7), slice(R - 7, R)
        for rows in few:
            stored = [*native.swiglu_fwd(gate[rows], up[rows]), *native.swiglu_bwd(dy[rows], gate[rows], up[rows])]
            assert all(torch.equal(a[rows], b) for a, b in zip(buffers, stored, strict=True))
    assert not any(b.isnan().any() for b in buffers)


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in Case("swiglu", {"...": (2, 3), "F": 5}).inputs(torch.float64).values()]
    assert torch.autograd.gradcheck(lf.swiglu, inputs)


@pytest.mark.parametrize("target_name", TARGETS)
def test_transposed_and_broadcast_inputs(target_name: str) -> None:
    gate, up = torch.randn(16, 8).T, torch.randn(16).expand(8, 16)
    with target(target_name):
        torch.testing.assert_close(lf.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_repeats_bitwise_for_any_number_of_threads() -> None:
    inputs = [x.requires_grad_() for x in Case("swiglu", {"...": (333,), "F": 515}).inputs(torch.bfloat16).values()]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            y = lf.swiglu(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiles_without_graph_break() -> None:
    gate, up = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    compiled = torch.compile(lambda g, u: lf.swiglu(g, u).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(gate, up).sum(), (gate, up)),
        torch.autograd.grad(lf.swiglu(gate, up).sin().sum(), (gate, up)),
    )


def _last_column_is_missing(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0][:, -1] = 0.0


def _slope_is_the_sigmoid(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0].copy_(args["dy"] * args["up"] * args["gate"].sigmoid())


def _dup_forgets_a_factor(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[1][0] = args["dy"][0] * args["gate"][0]


@pytest.mark.parametrize(
    ("primitive", "bug"),
    [
        ("swiglu_fwd", _last_column_is_missing),
        ("swiglu_bwd", _slope_is_the_sigmoid),
        ("swiglu_bwd", _dup_forgets_a_factor),
    ],
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None]) -> None:
    assert_bug_is_caught(monkeypatch, Case("swiglu", {"...": (50,), "F": 515}), primitive, bug)


def test_bad_input_names_argument_value_and_expectation() -> None:
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"up has shape \(4, 7\), expected \[..., F\] with F = 8"):
        lf.swiglu(gate, up[:, :7])
    with pytest.raises(ValueError, match=r"up has dtype torch.bfloat16, expected torch.float32 as gate"):
        lf.swiglu(gate, up.bfloat16())
    with pytest.raises(ValueError, match=r"up has shape \(8,\), expected leading dimensions"):
        lf.swiglu(gate, up[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", [t for t in TARGETS if t != "reference"])
def test_results_may_take_the_place_of_gate_and_up(target_name: str, dtype: torch.dtype) -> None:
    passes_the_caches = (2100, 4096)
    for shape in ((5, 515), (1, 3), *([passes_the_caches] if dtype == torch.bfloat16 else [])):
        assert_results_may_replace_arguments("swiglu_fwd", shape, (0,), target_name, dtype)
        assert_results_may_replace_arguments("swiglu_bwd", shape, (1, 2), target_name, dtype)
