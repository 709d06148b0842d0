"""PyTorch's own fused ops as the backend `torch`, on a CPU: the error budget, rows without keys, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_within_budget

import llama_fast as lf
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
