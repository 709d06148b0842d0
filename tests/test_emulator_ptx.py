"""The asm of the ptx headers against what their emulated functions do: kernels as nvcc compiles them to PTX, run by the
emulator's interpreter, give bit for bit what the same kernels give as g++ compiles them for the emulator.
"""

from __future__ import annotations

import re
from pathlib import Path

import emulated
import pytest
import torch

ROOT = Path(__file__).parents[1]
PTX_HEADERS = sorted((ROOT / "csrc" / "cuda").glob("ptx*.cuh"))
SOURCE = emulated.KERNELS / "instructions.cu"
missing = emulated.unavailable() or emulated.no_nvcc()
needs_nvcc = pytest.mark.skipif(missing is not None, reason=f"the PTX of the CUDA kernels in the emulator: {missing}")

UNTOUCHED = 0x5A5A5A5A  # what the output holds where no kernel writes


def test_every_function_of_the_ptx_headers_is_tried() -> None:
    source = SOURCE.read_text()
    for header in PTX_HEADERS:
        functions = re.findall(r"^LLAMA_FAST_DEVICE (?!constexpr)[\w ]+?\b(\w+)\(", header.read_text(), re.MULTILINE)
        assert functions
        for name in functions:
            assert re.search(rf"\bptx::{name}\b", source), f"{header.name}: {SOURCE.name} does not try {name}"


def _sm80(library: object, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, copied = (
        torch.full((100, 128), UNTOUCHED, dtype=torch.int32),
        torch.full((1024,), UNTOUCHED, dtype=torch.int32),
    )
    sizes = [emulated.size(t) for t in (out, copied)]
    assert emulated.run(library, "sm80", x, out, sizes[0], copied, sizes[1], dtype == torch.bfloat16) == ""
    return [out, copied]


def _sm90(library: object, dtype: torch.dtype) -> list[torch.Tensor]:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full((1200, 128), UNTOUCHED, dtype=torch.int32)
    copied, sums, moved = torch.zeros(256, 64, dtype=dtype), torch.ones(256), torch.zeros(256)
    count = torch.zeros(1, dtype=torch.int32)
    arguments = (x, out, emulated.size(out), copied, sums, moved, count, dtype == torch.bfloat16)
    assert emulated.run(library, "sm90", *arguments) == ""
    return [out, *(t.view(torch.int16) for t in (copied, sums, moved))]


@needs_nvcc
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
def test_asm_and_emulated_functions_agree(kernel: str, dtype: torch.dtype) -> None:
    emulated.configure()
    written = emulated.load("instructions")
    compiled = emulated.load("instructions", copy="_from_ptx")
    replaced = emulated.replace_kernels(compiled, f"run_{kernel}", emulated.ptx(SOURCE, "sm_90a"))
    assert len(replaced) == 4
    run = _sm80 if kernel == "sm80" else _sm90
    for ours, theirs in zip(run(written, dtype), run(compiled, dtype), strict=True):
        assert torch.equal(ours, theirs), f"rows that differ: {(ours != theirs).any(-1).nonzero().flatten().tolist()}"
        assert (ours != UNTOUCHED).any()
    out = run(written, dtype)[0]
    assert (out[-1] == UNTOUCHED).all(), "the output is too small"


@needs_nvcc
@pytest.mark.parametrize(
    "wrong", [("x4.trans.shared.b16 {%", "x4.shared.b16 {%"), ("shfl.sync.up.b32", "shfl.sync.down.b32")]
)
def test_a_wrong_instruction_shows(wrong: tuple[str, str]) -> None:
    emulated.configure()
    compiled = emulated.load("instructions", copy=f"_{abs(hash(wrong))}")
    text = emulated.ptx(SOURCE, "sm_90a")
    assert wrong[0] in text
    emulated.replace_kernels(compiled, "run_sm80", text.replace(*wrong))
    ours, theirs = (_sm80(library, torch.bfloat16)[0] for library in (emulated.load("instructions"), compiled))
    assert not torch.equal(ours, theirs)
