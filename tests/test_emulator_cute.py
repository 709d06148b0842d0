"""The emulator's tables of fragments and of shared memory against those of CuTe, from PyPI's nvidia-cutlass."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

TABLES = (
    *("mma.A", "mma.B", "mma.D", "wgmma.A", "wgmma.D64", "wgmma.D256", "ldmatrix", "ldmatrix.trans"),
    *("K.sw128", "K.sw64", "K.sw32", "K.none", "MN.sw128", "MN.sw64", "MN.sw32", "MN.none"),
)


def _cutlass() -> Path | None:
    found = importlib.util.find_spec("cutlass_library")
    return Path(found.origin).parent / "source" / "include" if found is not None and found.origin else None


@pytest.mark.skipif(_cutlass() is None, reason="CuTe's layouts: nvidia-cutlass is not installed")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="CuTe's layouts: no nvcc, whose headers CuTe includes")
def test_the_tables_are_cutes(tmp_path: Path) -> None:
    csrc = emulated.ROOT / "csrc"
    sources = [emulated.KERNELS / "cute_layouts.cpp", csrc / "emulator" / "semantics.cpp"]
    includes = [f"-I{p}" for p in (csrc, _cutlass())]
    program = tmp_path / "cute_layouts"
    subprocess.run(["nvcc", "-std=c++17", "-w", *includes, *map(str, sources), "-o", str(program)], check=True)
    out = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert out.split() == [word for table in TABLES for word in (table, "0")]
