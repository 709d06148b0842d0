"""What is asked of linear_cross_entropy's dweight by blocks of classes (llama_fast/ops/pieces.py), of each GPU backend.

The files that run a backend without a GPU take these functions as their tests: the sizes are made small, so that the
plan has several chunks of rows, several blocks of classes and, for more rows than columns, rows computed twice.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import LiveBytes, assert_within_budget
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import dispatch, linear, pieces
from llama_fast.verify import Case

OP = "linear_cross_entropy"
SIZES = pieces.Sizes(rows=8, most_in_chunks=32, classes=4, waste=math.inf)
DIMS = [
    {"...": (48,), "C": 48, "V": 132},  # every row's gradients wait; copied by eight bytes, the last block narrower
    {"...": (35,), "C": 60, "V": 131},  # the same by elements
    {"...": (67,), "C": 44, "V": 203},  # 20 rows are computed again, 3 added; a chunk of rows has some of both kinds
    {"...": (60,), "C": 30, "V": 200},  # 26, nearly as many as wait
    {"...": (49,), "C": 48, "V": 131},  # none: the row that does not wait is a chunk by itself, and added
]
# sizes, options, ignored target; in Triton's interpreter a case takes seconds
CASES: list[tuple[int, dict[str, Any], int | None]] = [
    (0, {"z_loss": 1e-2}, None),
    (1, {"label_smoothing": 0.1}, -100),
    (2, {}, None),
    (2, {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none", "ignore_index": 2}, 2),
    (3, {"label_smoothing": 0.1, "reduction": "sum"}, -100),
    (4, {}, -100),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of a test for those of a GPU. The list gets a number for each sum by blocks: how many these are."""
    monkeypatch.setattr(pieces, "SIZES", SIZES)
    blocks: list[int] = []
    finish = pieces.Pieces.finish

    def counted(self: pieces.Pieces, scratch: Tensor) -> None:
        blocks.append(-(-self.dweight.shape[0] // self.plan.classes))
        finish(self, scratch)

    monkeypatch.setattr(pieces.Pieces, "finish", counted)
    return blocks


def targets(dims: dict[str, Any], ignored: int | None = None) -> Tensor:
    """Of the rows that wait and of those that do not: a target in every block, and some rows that are ignored."""
    (R,), C, V = dims["..."], dims["C"], dims["V"]
    plan = pieces.plan(R, C, V, SIZES)
    assert plan is not None
    r, K = torch.arange(R), plan.classes
    blocks = -(-V // K)
    found = (r % blocks * K + r % K).clamp(max=V - 1)
    for rows in (r[: plan.kept], r[plan.kept : plan.end], r[plan.end :]):
        if len(rows) > SIZES.rows:
            assert set((found[rows[2:-2]] // K).tolist()) == set(range(blocks))
        if ignored is not None and len(rows):
            found[rows[:2]] = found[rows[-2:]] = ignored
    return found


def check_budget(backend: str, blocks: list[int]) -> None:
    """The fixture's list is `blocks`."""
    for index, options, ignored in CASES:
        given = targets(DIMS[index], ignored)
        case = Case(OP, DIMS[index], options, tensors={"targets": lambda _, t=given: t})
        for dtype in (torch.bfloat16, torch.float16)[: 2 if ignored else 1]:
            blocks.clear()
            assert_within_budget(case, backend, dtype)
            assert blocks
            assert min(blocks) >= 4
    blocks.clear()
    assert_within_budget(Case(OP, DIMS[0], strided=True), backend, torch.bfloat16)
    assert blocks
    blocks.clear()
    assert_within_budget(Case(OP, DIMS[0]), backend, torch.float32)
    assert not blocks, "float32 is summed by chunks"


def arguments(dims: dict[str, Any], wants_dhidden: bool = True) -> tuple[Any, ...]:
    """Of the primitive."""
    hidden, weight, _ = Case(OP, dims).inputs(torch.bfloat16).values()
    scale = torch.linspace(-1.0, 2.0, hidden.shape[0])
    return hidden, weight, targets(dims), scale, -100, 0.1, 1e-2, wants_dhidden, True


def check_frozen_hidden(backend: str, blocks: list[int]) -> None:
    """dweight is the same."""
    primitive = dispatch.primitives[f"{OP}_fwd"]
    for dims in DIMS[::2]:
        both, one = (primitive.launch(arguments(dims, wants), backend) for wants in (True, False))
        assert torch.equal(both[3], one[3])
        assert one[2].numel() == 0
    assert len(blocks) == 6


def check_compile(backend: str, blocks: list[int]) -> None:
    """Bitwise as without torch.compile, which sees one op and no graph break."""
    hidden, weight, _ = Case(OP, DIMS[2]).inputs(torch.bfloat16).values()
    leaves, given = (hidden.requires_grad_(), weight.requires_grad_()), targets(DIMS[2])

    def loss(reduction: str) -> Tensor:
        return lf.linear_cross_entropy(*leaves, given, reduction=reduction).sum()

    with lf.backend(backend):
        for reduction in ("mean", "none"):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            pair = [torch.autograd.grad(f(reduction), leaves) for f in (compiled, loss)]
            for a, b in zip(*pair, strict=True):
                assert torch.equal(a, b)
    assert len(blocks) == 4


def check_memory(backend: str, blocks: list[int]) -> None:
    """Beyond the results there is the scratch, and some numbers a row."""
    for dims in DIMS:
        blocks.clear()
        (R,), scratch, given = dims["..."], SIZES.rows * dims["V"] * 2, arguments(dims)
        # "torch": products that need no memory of their own
        with linear.force("torch"), LiveBytes(*given[:4]) as memory:
            results = dispatch.primitives[f"{OP}_fwd"].launch(given, backend)
        extra = memory.peak - sum(x.nbytes for x in results)
        assert blocks
        assert scratch <= extra <= scratch + 16 * R, dims  # 16: the target's gradient, and its column


def check_piece(kernel: pieces.PieceKernel) -> None:
    """Every class of a few rows against float64, on and off 16-byte boundaries; the rows that are zeros, or NaN."""
    V, first = 4200, 40
    for k in (33, 40, 4096, 4097):
        x = torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 3
        t = torch.tensor([first, first + k - 1, 3, -100, V, first + 7]).repeat_interleave(2)[::2]
        scale = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 1.0])
        x[3, first], x[5, first + 2] = torch.inf, torch.nan
        lse = x.logsumexp(1)
        lse[3], lse[4] = 0.0, torch.nan  # what the row kernel says of an ignored row, and of a target outside
        dtarget = torch.arange(6.0)
        p = (x.double() - lse.double().unsqueeze(1)).exp()
        exact = scale.unsqueeze(1) * (p * (1.0 + 2 * 0.01 * lse.double().unsqueeze(1)) - 0.2 / V)
        exact[[0, 1, 5], t[[0, 1, 5]]] = dtarget[[0, 1, 5]].double()
        exact[3] = 0.0
        found = x[:, first : first + k].contiguous()
        kernel(found, t, dtarget, lse, scale, first, V, -100, 0.2, 0.01)
        torch.testing.assert_close(found.double(), exact[:, first : first + k], rtol=2e-6, atol=1e-7, equal_nan=True)
        assert found[4].isnan().all()
