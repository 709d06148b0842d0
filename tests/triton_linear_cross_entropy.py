"""linear_cross_entropy in Triton, under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_pieces import check_budget, check_compile, check_frozen_hidden, check_memory, check_piece, small  # noqa: F401
from numerics import DTYPES, assert_bug_is_caught, assert_within_budget
from torch import Tensor

from llama_fast.kernels import linear_cross_entropy
from llama_fast.verify import Case

OP = "linear_cross_entropy"
OPTIONS: list[dict[str, Any]] = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none", "ignore_index": 2},
]
SHAPES = [
    {"...": (1,), "C": 1, "V": 1},
    {"...": (2, 5), "C": 3, "V": 7},
    {"...": (3, 7), "C": 64, "V": 1003},
    {"...": (3,), "C": 16, "V": 5001},
    {"...": (0,), "C": 16, "V": 33},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget(dtype: torch.dtype) -> None:
    for dims in SHAPES:
        assert_within_budget(Case(OP, dims), "triton", dtype)
    dims = {"...": (12,), "C": 48, "V": 515}
    for options in OPTIONS:
        assert_within_budget(Case(OP, dims, options), "triton", dtype)
    assert_within_budget(Case(OP, dims, strided=True), "triton", dtype)
    assert_within_budget(Case(OP, dims, scale=3.0), "triton", dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows(reduction: str) -> None:
    for targets in ([-100, 0, 32, -100, 5], [-100] * 5):
        case = Case(
            OP,
            {"...": (5,), "C": 8, "V": 33},
            {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2},
            tensors={"targets": lambda _, t=targets: torch.tensor(t)},
        )
        assert_within_budget(case, "triton", torch.float32)


def rows_of(logits: Tensor, targets: Tensor, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, gradient) of the row kernel."""
    x, R = logits.clone(), logits.shape[0]
    loss, lse = torch.full((R,), torch.nan), torch.full((R,), torch.nan)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    linear_cross_entropy.cross_entropy_rows(x, targets, torch.ones(R), -100, smoothing, z_loss, loss, lse)
    return loss, lse, x


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
    t = torch.tensor([1, 2, 3, 4, 7, 0, 3, 44, 2, 8, 44, -100])
    exact = x.double().requires_grad_()
    truth = F.cross_entropy(exact, t, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(truth.sum(), exact)
    loss, _, found = rows_of(x, t, label_smoothing=smoothing)
    torch.testing.assert_close(loss, truth.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found, gradient.float(), rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("lead", [0.0, 5.0, 17.0, 40.0, 80.0])
def test_true_class_keeps_its_digits_when_its_probability_is_near_one(lead: float) -> None:
    x = torch.randn(4, 1003, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 1002, 17])
    x[range(4), t] += lead
    exact = x.double()
    others = exact.scatter(1, t.unsqueeze(1), -torch.inf).logsumexp(1)
    gap = others - exact.gather(1, t.unsqueeze(1)).squeeze(1)
    loss, _, gradient = rows_of(x, t)
    torch.testing.assert_close(loss.double(), F.softplus(gap), rtol=1e-6, atol=0)
    found = gradient.gather(1, t.unsqueeze(1)).squeeze(1).double()
    torch.testing.assert_close(found, -torch.sigmoid(gap), rtol=1e-6, atol=0)


def test_kernel_stays_inside_the_row_for_any_target() -> None:
    loss, lse, gradient = rows_of(torch.zeros(3, 5), torch.tensor([5, -1, 1 << 40]))
    assert loss.isnan().all()
    assert lse.isnan().all()
    assert gradient.isnan().all()


def test_targets_may_be_strided() -> None:
    x = torch.randn(4, 37)
    for t in (torch.arange(8)[::2], torch.tensor([5]).expand(4)):
        assert all(torch.equal(a, b) for a, b in zip(rows_of(x, t), rows_of(x, t.contiguous()), strict=True))


def test_logits_are_left_alone_without_row_scale() -> None:
    x, t, out = torch.randn(3, 37), torch.tensor([0, 36, -100]), torch.empty(3)
    kept = x.clone()
    linear_cross_entropy.cross_entropy_rows(x, t, None, -100, 0.1, 0.1, out, out.clone())
    assert torch.equal(x, kept)


def test_dweight_by_blocks_of_classes(small: list[int]) -> None:  # noqa: F811
    check_budget("triton", small)
    check_frozen_hidden("triton", small)


def test_compiled_by_blocks_of_classes(small: list[int]) -> None:  # noqa: F811
    check_compile("triton", small)


def test_memory_by_blocks_of_classes(small: list[int]) -> None:  # noqa: F811
    check_memory("triton", small)


def test_classes_of_some_rows() -> None:
    check_piece(linear_cross_entropy.cross_entropy_piece)


def _true_class_is_left_out(results: tuple[Tensor, ...], args: Any) -> None:
    results[2].add_(args["weight"][args["targets"]] / args["targets"].numel())


def test_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(OP, {"...": (9,), "C": 8, "V": 33})
    assert_bug_is_caught(monkeypatch, case, f"{OP}_fwd", _true_class_is_left_out, target_name="triton")
