"""rope in Triton, under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_bug_is_caught, assert_within_budget

import llama_fast as lf
from llama_fast.kernels import launch, rope
from llama_fast.verify import Case

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget(dtype: torch.dtype, interleaved: bool) -> None:
    options = {"interleaved": interleaved}
    for D in (2, 6, 64, 80, 90, 256):
        assert_within_budget(Case("rope", {"B": 2, "T": 3, "H": 3, "G": 2, "D": D}, options), "triton", dtype)
    sizes = {"B": 2, "T": 5, "H": 2, "G": 4, "D": 48}
    assert_within_budget(Case("rope", sizes, options, strided=True), "triton", dtype)
    assert_within_budget(Case("rope", {**sizes, "N": 2}, options), "triton", dtype)
    assert_within_budget(Case("rope", {**sizes, "H": 40, "D": 128}, options), "triton", dtype)
    for empty in ("B", "T", "H", "G"):
        assert_within_budget(Case("rope", {**sizes, empty: 0}, options), "triton", dtype)


@LAYOUTS
def test_every_candidate_gives_the_same_bits(interleaved: bool) -> None:
    q, k, cos, sin = Case("rope", {"B": 1, "T": 3, "H": 9, "G": 2, "D": 64}).inputs(torch.bfloat16).values()
    with lf.backend("triton"):
        expected = lf.rope(q, k, cos, sin, interleaved=interleaved)
        for parameters in rope.candidates(9, 64):
            with launch.force("rope_fwd", parameters):
                found = lf.rope(q, k, cos, sin, interleaved=interleaved)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_positions_that_differ_between_sequences_and_heads_first_inputs() -> None:
    q, k = torch.randn(2, 4, 7, 16).transpose(1, 2), torch.randn(2, 7, 16, 3).transpose(2, 3)
    angle = torch.randn(2, 7, 8)
    with lf.backend("triton"):
        found = lf.rope(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close(found, lf.ops.reference.rope(q, k, angle.cos(), angle.sin()))


@LAYOUTS
def test_heads_that_lie_beyond_32_bits(interleaved: bool, tmp_path: Path) -> None:
    """Three heads 2^30 elements apart, in a file that is nearly all hole; what 32 bits would reach is in it too."""
    stride, D = (1 << 30) + 8, 16
    wide = torch.from_file(str(tmp_path / "wide"), shared=True, size=4 * stride + D, dtype=torch.bfloat16)
    q, angle = torch.randn(1, 1, 3, D).bfloat16(), torch.randn(1, D // 2)
    far = wide.as_strided((1, 1, 3, D), (D, D, stride, 1), 2 * stride).copy_(q)
    with lf.backend("triton"):
        near, _ = lf.rope(q, q, angle.cos(), angle.sin(), interleaved=interleaved)
        found = lf.rope(far, far, angle.cos(), angle.sin(), interleaved=interleaved)
    assert all(torch.equal(x, near) for x in found)


def _backward_turns_forward(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0].copy_(rope.rope_fwd(args["dq_out"], args["dk_out"], args["cos"], args["sin"], False)[0])


def test_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rope", {"B": 2, "T": 9, "H": 4, "G": 2, "D": 8})
    assert_bug_is_caught(monkeypatch, case, "rope_bwd", _backward_turns_forward, target_name="triton")
