"""What the compiler makes of the Triton kernels is held to benchmarks/gpu_budget.toml; planted regressions fail it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from benchmarks import sass
from llama_fast.kernels import launch, swiglu
from llama_fast.ops.table import OPS

HELD = sass.budget()
SAME = HELD["triton"] == triton.__version__
FORWARD = "sm_90 swiglu_fwd F11008 bf16 _swiglu_fwd_kernel"


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled anew: what is read is what the compiler makes now."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)


@pytest.fixture(scope="module")
def reports() -> dict[str, sass.Report]:
    return sass.all_reports()


def test_kernels_are_within_budget(reports: dict[str, sass.Report]) -> None:
    bad = [text for name, report in reports.items() for text in sass.problems(name, report, HELD.get(name), SAME)]
    assert not bad, "\n".join(bad)


def test_registers_and_spills_are_compared(reports: dict[str, sass.Report]) -> None:
    if not SAME:
        pytest.skip(
            f"the budget is of Triton {HELD['triton']}: with {triton.__version__} only widths and products count"
        )
    assert set(reports) == set(HELD) - {"triton"}


def test_every_op_is_there_and_accesses_are_wide(reports: dict[str, sass.Report]) -> None:
    triton_ops = [op for op in OPS if any(b.name == "triton" for b in OPS[op].backends)]
    for op in triton_ops:
        for arch in sass.ARCHITECTURES:
            assert any(name.startswith(f"sm_{arch} {op}_") for name in reports), f"{op} on sm_{arch}"
    assert all(report.wide for name, report in reports.items()), "a kernel without 16-byte accesses"
    products = {n: r.tensor.split()[0] for n, r in reports.items() if "attention_fwd T4096 D128" in n}
    assert [products[n] for n in sorted(products)] == ["UTCHMMA", "HMMA", "HGMMA"]  # sm_100, sm_80, sm_90


def _forward(parameters: swiglu.Launch) -> sass.Recorded:
    (specimen,) = (s for s in sass.specimens("swiglu") if s.name == "swiglu_fwd F11008 bf16")
    with launch.force("swiglu_fwd", parameters):
        (recorded,) = sass.record(specimen, 90)
    return recorded


def test_a_planted_narrow_access_is_seen() -> None:
    recorded = _forward(swiglu.HEURISTIC)
    odd = replace(recorded, args=(*recorded.args[:-2], 11009, *recorded.args[-1:]))  # F, no multiple of 16
    found = sass.read(sass.compile_for(odd, 90), 90)
    assert found.narrow > 0
    told = sass.problems(FORWARD, found, HELD[FORWARD], same_version=True)
    assert any("narrow" in text for text in told), told
    assert sass.problems(FORWARD, replace(found, wide=0), HELD[FORWARD], same_version=False)


def test_a_planted_spill_is_seen() -> None:
    found = sass.read(sass.compile_for(_forward(swiglu.Launch(BLOCK_F=8192, num_warps=1)), 90), 90)
    assert found.spills > 0
    told = sass.problems(FORWARD, found, HELD[FORWARD], same_version=True)
    assert any("spills" in text for text in told), told
    assert any("registers" in text for text in told), told


def test_other_products_and_unknown_kernels_are_seen() -> None:
    held: dict[str, Any] = {"wide": 1, "tensor": "HGMMA 16"}
    found = sass.Report(registers=1, spills=0, shared=0, occupancy=100, narrow=0, wide=1, tensor="HMMA 16")
    assert "tensor-core instructions HMMA, expected HGMMA" in sass.problems("x", found, held, False)[0]
    assert "not in gpu_budget.toml" in sass.problems("x", found, None)[0]


def test_widths_are_read() -> None:
    code = "LDG.E.128 R1; LDG.E.U16 R2; STG.E R3; LDGSTS.E.BYPASS.128 [R1]; STG.E.64 R1; LD.E.U8 R1; UTMALDG.2D; LDS.64"
    assert [sass._width(a) for a in sass._ACCESS.findall(code)] == [16, 2, 4, 16, 8, 1]
    assert sass._BULK.findall(code) == ["UTMALDG"]


def test_the_budget_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = sass.Report(registers=1, spills=2, shared=3, occupancy=4, narrow=5, wide=6, tensor="HMMA 7")
    monkeypatch.setattr(sass, "BUDGET", tmp_path / "budget.toml")
    sass.write({"sm_90 a": report})
    assert sass.budget() == {"triton": triton.__version__, "sm_90 a": vars(report)}
