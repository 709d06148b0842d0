"""What the tests of linear's paths share: operands, the exact products, and when a result is too far from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama_fast.ops import linear, native

ISAS = [f"cpu/{isa}" for isa in native.isas()]
TRUTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt": lambda a, b: a @ b.T,
    "nn": lambda a, b: a @ b,
    "tn": lambda a, b: a.T @ b,
}


def operands(form: str, M: int, N: int, K: int, dtype: torch.dtype, strided: bool = False) -> tuple[Tensor, Tensor]:
    shapes = {"nt": ((M, K), (N, K)), "nn": ((M, K), (K, N)), "tn": ((K, M), (K, N))}[form]
    generator = torch.Generator().manual_seed(M + 3 * N + 5 * K)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if strided:
        a, b = a.T.contiguous().T, torch.cat((b, b), dim=1)[:, : b.shape[1]]
    return a, b


def problem(found: Tensor, truth: Tensor, plain: Tensor, K: int) -> str:
    """1.5 times the error of plain torch, one ulp, and what the order of a sum of K terms may change."""
    if truth.numel() == 0:
        return "" if found.shape == truth.shape else "shape"
    accumulator = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    ulps = torch.finfo(found.dtype).eps + accumulator * K**0.5 / 4
    error, budget = (found - truth).abs().max(), 1.5 * (plain - truth).abs().max() + ulps * truth.abs().max()
    return "" if found.shape == truth.shape and error <= budget else f"error {error:.3g} exceeds {budget:.3g}"


def tiled(dtype: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.skipif(dtype not in linear._has_brgemm, reason=f"torch has no brgemm of {dtype} here")


TILED = [pytest.param(dtype, marks=tiled(dtype)) for dtype in (torch.float32, torch.bfloat16)]
