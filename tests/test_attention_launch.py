"""The Triton attention's launch parameters, compiled: sm_90's and, in half precision, sm_80's fit the shared memory."""

from __future__ import annotations

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SHARED_BYTES = 227 << 10  # that a program may have
SMALL_SHARED_BYTES = 99 << 10  # of sm_86, sm_89 and sm_120
SIZES = [(D, dtype) for D in (64, 128, 256) for dtype in (torch.bfloat16, torch.float32)]


def _shared(D: int, dtype: torch.dtype, place: int) -> dict[str, int]:
    """Shared memory of each kernel of a training step."""
    from benchmarks import sass

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, lse, options = empty(2, 4096, 8, D), empty(2, 4096, 2, D), empty(2, 8, 4096, dtype=torch.float32), (None, 0.1)
    found = {}
    for primitive, tensors in (("attention_fwd", (q, k, k)), ("attention_bwd", (q, q, k, k, q, lse))):
        specimen = sass.Specimen("attention", "", primitive, (*tensors, *options, True, 0))
        for recorded in sass.record(specimen, place):
            compiled = sass.compile_for(recorded, place)
            found[f"{recorded.kernel.__name__} D{D} {dtype}"] = compiled.metadata.shared
    assert len(found) == 4, found
    return found


def test_defaults_fit_sm_90() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(_shared, *zip(*[(D, dtype, 90) for D, dtype in SIZES], strict=True)):
            assert all(n <= SHARED_BYTES for n in found.values()), found


def test_half_precision_fits_the_smaller_cards() -> None:
    for D in (64, 128, 256):
        found = _shared(D, torch.bfloat16, 80)
        assert all(n <= SMALL_SHARED_BYTES for n in found.values()), found
