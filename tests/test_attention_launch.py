"""The Triton attention's launch parameters, compiled: sm_90's, AMD's and, in half precision, sm_80's fit the shared
memory.

In float32 both kernels of the backward make scores and dp by the same instruction, so that these are equal bit for bit.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SHARED_BYTES = 227 << 10  # that a program may have
SMALL_SHARED_BYTES = 99 << 10  # of sm_86, sm_89 and sm_120
AMD_SHARED_BYTES = 64 << 10  # of all but gfx950
SIZES = [(D, dtype) for D in (64, 128, 256) for dtype in (torch.bfloat16, torch.float32)]


def _products(ttgir: str, D: int) -> set[str]:
    """The layouts of the products that contract over D: the instruction and the order of its operands' elements."""
    names = dict(re.findall(r"(#\w+) = (#ttg\.\S+<\{.*?\}>)", ttgir))
    operands = re.findall(rf": tensor<\d+x{D}x\w+, #ttg.dot_op<{{opIdx = 0, parent = (#\w+)(.*?)}}>> \* ", ttgir)
    kinds = set()
    for parent, rest in operands:
        layout = names[parent]
        version = re.search(r"versionMajor = \d+", layout)
        amd = " ".join(re.findall(r"amd_(?:mfma|wmma)|(?<=instrShape = )\[[\d, ]+\]", layout)) if not version else ""
        kinds.add(f"{version.group() if version else amd or 'multiply-adds'}{rest}")
    return kinds


def _compiled(D: int, dtype: torch.dtype, place: str, T: int = 4096) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Of each kernel of a training step: shared memory; its products over D."""
    from benchmarks import sass

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, lse, options = empty(2, T, 8, D), empty(2, 4096, 2, D), empty(2, 8, T, dtype=torch.float32), (None, 0.1)
    found, products = {}, {}
    for primitive, tensors in (("attention_fwd", (q, k, k)), ("attention_bwd", (q, q, k, k, q, lse))):
        specimen = sass.Specimen("attention", "", primitive, (*tensors, *options, True, 0))
        for recorded in sass.record(specimen, place):
            compiled = sass.compile_for(recorded, place)
            found[f"{recorded.kernel.__name__} D{D} {dtype}"] = compiled.metadata.shared
            products[recorded.kernel.__name__] = _products(compiled.asm["ttgir"], D)
    assert len(found) == (3 if dtype == torch.float32 else 4), found
    return found, products


def test_defaults_fit_sm_90() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(_compiled, *zip(*[(D, dtype, "sm_90") for D, dtype in SIZES], strict=True))
        for (D, dtype), (found, products) in zip(SIZES, compiled, strict=True):
            assert all(n <= SHARED_BYTES for n in found.values()), found
            if dtype == torch.float32:
                kind = "multiply-adds" if D == 256 else "versionMajor = 2, kWidth = 2"
                assert products["_attention_dq_kernel"] == products["_attention_dkdv_kernel"] == {kind}, products


def test_half_precision_fits_the_smaller_cards() -> None:
    for D in (64, 128, 256):
        found, _ = _compiled(D, torch.bfloat16, "sm_80")
        assert all(n <= SMALL_SHARED_BYTES for n in found.values()), found


def test_defaults_fit_amd() -> None:
    cases = [("gfx942", D, dtype, 4096) for D, dtype in SIZES if D > 64]
    cases += [("gfx942", 256, torch.float32, 1), ("gfx1201", 64, torch.float32, 4096)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(_compiled, *zip(*[(D, dtype, place, T) for place, D, dtype, T in cases], strict=True))
        for (place, _, dtype, _), (found, products) in zip(cases, compiled, strict=True):
            assert all(n <= AMD_SHARED_BYTES for n in found.values()), (place, found)
            if dtype == torch.float32:
                (kind,) = products["_attention_dq_kernel"] | products["_attention_dkdv_kernel"]
                assert kind.startswith("amd_mfma" if place == "gfx942" else "amd_wmma"), (place, products)
