"""The CUDA kernels as nvcc compiles them to PTX, in the emulator's interpreter (tests/test_cuda.py): the error budget.

So the source has the same meaning for both compilers, and the asm of the kernels that it had in the emulator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulated
import pytest
import torch
from loss_pieces import DIMS, small  # noqa: F401
from numerics import assert_within_budget

from llama_fast.ops import cuda
from llama_fast.verify import Case

# short rows, off the 16-byte boundary and on it; a row a block; rows whose columns lie over blocks
NORM = [{"...": (2, 5), "C": 3}, {"...": (20,), "C": 72}, {"...": (3,), "C": 1032}, {"...": (3,), "C": 1003}]
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
# of the files of both directions: kernels on wgmma, TMA and mbarriers, a tile and a part of one
SM90 = ("attention_sm90_fwd", "attention_sm90_bwd")
SM90_CASES = [Case("attention", {"B": 1, "T": T, "S": 200, "H": 2, "G": 1, "D": D}) for T, D in ((200, 64), (70, 128))]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(cuda._library.__file__)


def _replace(library: ctypes.CDLL, source: str, arch: str, *wrong: str) -> None:
    """Has the kernels of a source run as PTX; `wrong`: a part of it and what stands there instead."""
    text = emulated.ptx(emulated.ROOT / "csrc" / "cuda" / f"{source}.cu", arch)
    if wrong:
        assert wrong[0] in text
        text = text.replace(*wrong)
    replaced = emulated.replace_kernels(library, "llama_fast_emulator_configure", text, library)
    assert len(replaced) == text.count(".entry"), f"of {text.count('.entry')} kernels: {replaced}"


needs_nvcc = pytest.mark.skipif(emulated.no_nvcc() is not None, reason=f"the kernels' PTX: {emulated.no_nvcc()}")


@needs_nvcc
@pytest.mark.parametrize("source", CASES)
def test_budget(library: ctypes.CDLL, source: str) -> None:
    _replace(library, source, "sm_80")
    for case in CASES[source]:
        assert_within_budget(case, "cuda", torch.bfloat16)


@needs_nvcc
def test_budget_of_dweight_by_blocks_of_classes(library: ctypes.CDLL, small: list[int]) -> None:  # noqa: F811
    _replace(library, "linear_cross_entropy", "sm_80")
    assert_within_budget(Case("linear_cross_entropy", DIMS[3]), "cuda", torch.bfloat16)
    assert small


@pytest.fixture
def on_sm90() -> Iterator[None]:
    cuda._library.set_architecture(90)
    yield
    cuda._library.set_architecture(80)


@needs_nvcc
@pytest.mark.usefixtures("on_sm90")
def test_budget_of_attention_on_sm90(library: ctypes.CDLL) -> None:
    for source in SM90:
        _replace(library, source, "sm_90a")
    for case in SM90_CASES:
        assert_within_budget(case, "cuda", torch.bfloat16)


@needs_nvcc
@pytest.mark.usefixtures("on_sm90")
@pytest.mark.parametrize("source", SM90)
def test_it_is_the_ptx_that_runs_on_sm90(library: ctypes.CDLL, source: str) -> None:
    _replace(library, source, "sm_90a", "ex2.approx.ftz.f32", "lg2.approx.ftz.f32")
    with pytest.raises(AssertionError):
        assert_within_budget(SM90_CASES[0], "cuda", torch.bfloat16)
    _replace(library, source, "sm_90a")


@needs_nvcc
def test_it_is_the_ptx_that_runs(library: ctypes.CDLL) -> None:
    _replace(library, "swiglu", "sm_80", "mul.rn.f32", "add.rn.f32")
    with pytest.raises(AssertionError):
        assert_within_budget(CASES["swiglu"][1], "cuda", torch.bfloat16)
