"""The CUDA kernels as nvcc compiles them to PTX, in the emulator's interpreter (tests/test_cuda.py): the error budget.

So the source has the same meaning for both compilers, and the asm of the kernels that it had in the emulator.
"""

from __future__ import annotations

import ctypes

import emulated
import pytest
import torch
from numerics import assert_within_budget

from llama_fast.ops import cuda
from llama_fast.verify import Case

NORM = [{"...": (2, 5), "C": 3}, {"...": (3,), "C": 512}, {"...": (20,), "C": 72}]
CASES = {
    "rms_norm": [Case(op, dims) for op in ("rms_norm", "add_rms_norm") for dims in NORM],
    "swiglu": [Case("swiglu", {"...": (2, 5), "F": 3}), Case("swiglu", {"...": (3,), "F": 512})],
    "rope": [
        Case("rope", {"B": 2, "T": 3, "H": 4, "G": 2, "D": 64}, {"interleaved": interleaved})
        for interleaved in (False, True)
    ],
    "linear_cross_entropy": [
        Case("linear_cross_entropy", {"...": (9,), "C": 16, "V": 520}, {"label_smoothing": 0.1, "z_loss": 1e-2})
    ],
    "attention_64": [Case("attention", {"B": 1, "T": 70, "S": 70, "H": 2, "G": 1, "D": 64})],
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(cuda._library.__file__)


@pytest.mark.skipif(emulated.no_nvcc() is not None, reason=f"the kernels' PTX: {emulated.no_nvcc()}")
@pytest.mark.parametrize("source", CASES)
def test_budget(library: ctypes.CDLL, source: str) -> None:
    text = emulated.ptx(emulated.ROOT / "csrc" / "cuda" / f"{source}.cu", "sm_80")
    replaced = emulated.replace_kernels(library, "llama_fast_emulator_configure", text, library)
    assert len(replaced) == text.count(".entry"), f"of {text.count('.entry')} kernels: {replaced}"
    for case in CASES[source]:
        assert_within_budget(case, "cuda", torch.bfloat16)


@pytest.mark.skipif(emulated.no_nvcc() is not None, reason=f"the kernels' PTX: {emulated.no_nvcc()}")
def test_it_is_the_ptx_that_runs(library: ctypes.CDLL) -> None:
    text = emulated.ptx(emulated.ROOT / "csrc" / "cuda" / "swiglu.cu", "sm_80")
    assert "mul.rn.f32" in text
    wrong = text.replace("mul.rn.f32", "add.rn.f32")
    emulated.replace_kernels(library, "llama_fast_emulator_configure", wrong, library)
    with pytest.raises(AssertionError):
        assert_within_budget(CASES["swiglu"][1], "cuda", torch.bfloat16)
