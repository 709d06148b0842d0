"""The CUDA kernels of the row ops in the emulator (tests/test_cuda.py): the error budget on every path of the kernels,
repeats under other schedules, and bugs that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loss_pieces import check_budget, check_frozen_hidden, check_memory, check_piece, small  # noqa: F401
from numerics import DTYPES, assert_bug_is_caught, assert_results_may_replace_arguments, assert_within_budget
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import cuda
from llama_fast.verify import FORWARD_FACTOR, Case, expect, judge

NORM = [
    {"...": (2, 5), "C": 3},  # short rows, off the 16-byte boundary,
    {"...": (70, 2), "C": 100},
    {"...": (4, 7), "C": 40},  # and on it: one piece a lane,
    {"...": (790,), "C": 128},  # two; more rows than the backward's blocks have at once
    {"...": (3, 7), "C": 512},  # or four
    {"...": (35,), "C": 1032},  # more rows than parts of dweight
    {"...": (9,), "C": 5000},  # more than a 16-byte piece a thread in float32,
    {"...": (9,), "C": 9000},  # and in half precision
    {"...": (11,), "C": 1003},  # rows off the 16-byte boundary
    {"...": (1,), "C": 1003},  # and one alone
    {"...": (5,), "C": 17000},  # rows that the backward reads twice, and the forward in float32
    {"...": (0,), "C": 16},
    {"...": (), "C": 48},
]
CASES = [
    *(Case(op, dims) for op in ("rms_norm", "add_rms_norm") for dims in NORM),
    *(Case(op, {"...": (3, 5), "C": 80}, strided=True) for op in ("rms_norm", "add_rms_norm")),
    Case("rms_norm", {"...": (9,), "C": 100}, {"eps": 1e-2}, scale=0.01),
    Case("swiglu", {"...": (2, 5), "F": 3}),
    Case("swiglu", {"...": (3, 7), "F": 515}),
    Case("swiglu", {"...": (9,), "F": 1040}, strided=True),
    Case("swiglu", {"...": (9,), "F": 100}, scale=30.0),
    Case("swiglu", {"...": (0,), "F": 16}),
    *(
        Case("rope", {"B": 2, "T": 3, "H": H, "G": G, "D": D}, {"interleaved": interleaved}, strided=strided)
        for interleaved in (False, True)
        for H, G, D, strided in ((4, 2, 64, False), (19, 1, 128, False), (3, 3, 80, True), (2, 1, 6, False))
    ),
    Case("rope", {"B": 2, "T": 3, "N": 2, "H": 2, "G": 1, "D": 16}),
    Case("rope", {"B": 1, "T": 1, "H": 1, "G": 1, "D": 1040}),
    Case("rope", {"B": 0, "T": 3, "H": 1, "G": 1, "D": 8}),
    Case("linear_cross_entropy", {"...": (1,), "C": 1, "V": 1}),
    Case("linear_cross_entropy", {"...": (2, 5), "C": 3, "V": 7}),
    Case("linear_cross_entropy", {"...": (37,), "C": 64, "V": 1003}),
    Case("linear_cross_entropy", {"...": (2,), "C": 16, "V": 20000}),
    Case("linear_cross_entropy", {"...": (0,), "C": 16, "V": 33}),
    *(
        Case("linear_cross_entropy", {"...": (9,), "C": 48, "V": 520}, options)
        for options in (
            {"reduction": "none"},
            {"label_smoothing": 0.1},
            {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none", "ignore_index": 2},
        )
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"])
def test_budget(op: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if case.op == op:
            assert_within_budget(case, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_row_that_the_forward_does_not_hold(op: str, dtype: torch.dtype) -> None:
    """Without the backward: it is that of 17000 columns, and adding up dweight's parts takes the emulator seconds."""
    case = Case(op, {"...": (1,), "C": 33000})
    expected = expect(case, dtype)
    with lf.backend("cuda"):
        found = getattr(lf, op)(*expected.inputs.values())
    outs = dict(zip(("out0", "out1"), found, strict=True)) if op == "add_rms_norm" else {"out": found}
    for name, out in outs.items():
        assert not judge(out, expected.theirs[name], expected.truth[name], FORWARD_FACTOR, dtype)[3], name


@pytest.fixture
def many_multiprocessors() -> Iterator[None]:
    """The emulator's device has as many as an H200, for many parts of dweight."""
    cuda._library.set_multiprocessors(132)
    cuda._norm_elements.cache_clear()
    yield
    cuda._library.set_multiprocessors(4)
    cuda._norm_elements.cache_clear()


@pytest.mark.usefixtures("many_multiprocessors")
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        (Case("rms_norm", {"...": (111,), "C": 512}), 111),
        (Case("add_rms_norm", {"...": (3, 37), "C": 512}, strided=True), 111),
        (Case("rms_norm", {"...": (600,), "C": 1003}), 264),
    ],
    ids=str,
)
def test_dweight_of_many_parts(case: Case, parts: int) -> None:
    assert_within_budget(case, "cuda", torch.float32)

    # A term passes the additions of its part, of its warp's parts and of 32 sums pairwise, each off by half an ulp at
    # most. In order, sums of that size or less would all be lost after the first row's 1.
    R, C = math.prod(case.dims["..."]), case.dims["C"]
    half_ulp, in_part = 2.0**-24, math.ceil(R / parts)
    additions = in_part + math.ceil(parts / 32) + 5
    ones = torch.ones(R, C + 3 * case.strided)[:, :C]
    dy = torch.full_like(ones, half_ulp / (2 * in_part if in_part > 1 else 1))
    dy[0] = 1.0
    dsum = (ones,) if case.op == "add_rms_norm" else ()
    dweight = getattr(cuda, f"{case.op}_bwd")(dy, *dsum, ones, torch.ones(C), torch.ones(R))[1]
    truth = dy.double().sum(0)
    error = (dweight.double() - truth).abs().max().item()
    assert error <= additions * half_ulp * truth.max().item(), error / half_ulp


@pytest.mark.parametrize("case", [Case("rms_norm", {"...": (20,), "C": 1032}), Case("rms_norm", {"...": (4,), "C": 9})])
def test_repeats_bitwise_under_any_schedule(case: Case) -> None:
    inputs = [x.requires_grad_() for x in case.inputs(torch.bfloat16).values()]
    found = []
    for seed in (0, 1, 2):
        cuda._library.set_options(seed=seed)
        with lf.backend("cuda"):
            y = lf.rms_norm(*inputs)
        found.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    cuda._library.set_options()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def _rows_of(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the kernel."""
    x, R = logits.clone(), logits.shape[0]
    loss, lse = torch.full((R,), torch.nan), torch.full((R,), torch.nan)
    cuda._cross_entropy_rows(x, targets, torch.ones(R), -100, smoothing, 0.0, loss, lse)
    return loss, x


def test_a_fault_names_op_thread_and_tensor() -> None:
    x, w = torch.randn(3, 64), torch.ones(64)
    report = r"rms_norm_fwd: block \(0,0,0\) thread 16 .*: st.global: 4 bytes at offset 8 of .*argument 4"
    with pytest.raises(RuntimeError, match=report):
        cuda._library.rms_norm_fwd(x, w, 1e-6, torch.empty(3, 64), torch.empty(2), (0, 0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_extreme_logits_as_cross_entropy(smoothing: float) -> None:
    V = 45
    x = torch.randn(12, V, generator=torch.Generator().manual_seed(0))
    x[0], x[1, ::2], x[1, 1::2] = 1e4, 1e4, -1e4
    x[2, 3] = 1e4
    x[3, 5:] = -torch.inf
    x[4, 7] = -torch.inf
    x[5] = -torch.inf
    x[6, 9], x[7, 44], x[8, 0] = torch.inf, torch.inf, torch.nan
    x[9] = 3e38
    x[10] = -3e38
    targets = torch.tensor([1, 2, 3, 4, 7, 0, 3, 44, 2, 8, 44, -100])
    loss, gradient = _rows_of(x, targets, smoothing)
    x64 = x.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(x64, targets, reduction="none", label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(truth.sum(), x64)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_true_class_keeps_its_digits_when_its_probability_is_near_one() -> None:
    x = torch.zeros(1, 40)
    x[0, 5] = 30.0  # 1 - p is 39 e^-30 = 3.6e-12, far below an ulp of p
    loss, gradient = _rows_of(x, torch.tensor([5]))
    exact = 39 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    torch.testing.assert_close(loss[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[0, 5].double(), -exact, rtol=1e-6, atol=0)


def test_a_target_outside_the_classes_gives_nan() -> None:
    loss, gradient = _rows_of(torch.randn(2, 9), torch.tensor([9, -1]))
    assert loss.isnan().all()
    assert gradient.isnan().all()


def test_dweight_by_blocks_of_classes(small: list[int]) -> None:  # noqa: F811
    check_budget("cuda", small)
    check_frozen_hidden("cuda", small)


def test_memory_by_blocks_of_classes(small: list[int]) -> None:  # noqa: F811
    check_memory("cuda", small)


def test_classes_of_some_rows() -> None:
    check_piece(cuda._cross_entropy_piece)


def test_infinite_gates() -> None:
    gate = torch.tensor([[torch.inf, -torch.inf, torch.nan, 200.0, -200.0]])
    with lf.backend("cuda"):
        y = lf.swiglu(gate, torch.full_like(gate, 2.0))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate) * 2.0, equal_nan=True)


def _last_row_of_dweight_forgotten(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].sub_(args["dy"][-1] * args["x"][-1] * args["rstd"][-1])


@pytest.mark.parametrize("shape", [(5, 515), (3, 4096)])
def test_swiglus_results_may_take_the_place_of_gate_and_up(shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        assert_results_may_replace_arguments("swiglu_fwd", shape, (0,), "cuda", dtype)
        assert_results_may_replace_arguments("swiglu_bwd", shape, (1, 2), "cuda", dtype)


def _last_element_forgotten(results: tuple[Tensor, ...], args: Any) -> None:
    results[0].view(-1)[-1] = 0.0


def _not_turned_back(results: tuple[Tensor, ...], args: Any) -> None:
    results[0].copy_(args["dq_out"])


def _no_true_class(results: tuple[Tensor, ...], args: Any) -> None:
    results[0].add_(1e-3)


@pytest.mark.parametrize(
    ("case", "primitive", "bug"),
    [
        (Case("rms_norm", {"...": (50,), "C": 515}), "rms_norm_bwd", _last_row_of_dweight_forgotten),
        (Case("add_rms_norm", {"...": (5,), "C": 520}), "add_rms_norm_fwd", _last_element_forgotten),
        (Case("swiglu", {"...": (5,), "F": 520}), "swiglu_bwd", _last_element_forgotten),
        (Case("rope", {"B": 1, "T": 3, "H": 2, "G": 1, "D": 32}), "rope_bwd", _not_turned_back),
        (Case("linear_cross_entropy", {"...": (3,), "C": 16, "V": 99}), "linear_cross_entropy_fwd", _no_true_class),
    ],
    ids=str,
)
def test_planted_bugs_are_caught(
    monkeypatch: pytest.MonkeyPatch, case: Case, primitive: str, bug: Callable[..., None]
) -> None:
    assert_bug_is_caught(monkeypatch, case, primitive, bug, target_name="cuda")
