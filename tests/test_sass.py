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

from benchmarks import machine_code, sass
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
def reports() -> dict[str, machine_code.Report]:
    return sass.all_reports()


def test_kernels_are_within_budget(reports: dict[str, machine_code.Report]) -> None:
    bad = [text for name, report in reports.items() for text in sass.problems(name, report, HELD.get(name), SAME)]
    assert not bad, "\n".join(bad)


def test_registers_and_spills_are_compared(reports: dict[str, machine_code.Report]) -> None:
    if not SAME:
        pytest.skip(
            f"the budget is of Triton {HELD['triton']}: with {triton.__version__} only widths and products count"
        )
    assert set(reports) == set(HELD) - {"triton"}


def test_every_op_is_there_and_accesses_are_wide(reports: dict[str, machine_code.Report]) -> None:
    triton_ops = [op for op in OPS if any(b.name == "triton" for b in OPS[op].backends)]
    for op in triton_ops:
        for arch in sass.ARCHITECTURES:
            assert any(name.startswith(f"{arch} {op}_") for name in reports), f"{op} on {arch}"
    assert all(report.wide for name, report in reports.items()), "a kernel without 16-byte accesses"
    products = {n.split()[0]: r.tensor.split()[0] for n, r in reports.items() if "attention_fwd T4096 D128" in n}
    nvidia = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    assert products == nvidia | {"gfx942": "MFMA", "gfx950": "MFMA", "gfx1100": "WMMA", "gfx1201": "WMMA"}


def _forward(parameters: swiglu.Launch, arch: str = "sm_90") -> sass.Recorded:
    (specimen,) = (s for s in sass.specimens("swiglu") if s.name == "swiglu_fwd F11008 bf16")
    with launch.force("swiglu_fwd", parameters):
        (recorded,) = sass.record(specimen, arch)
    return recorded


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_planted_narrow_access_is_seen(arch: str) -> None:
    recorded, name = _forward(swiglu.HEURISTIC, arch), FORWARD.replace("sm_90", arch)
    odd = replace(recorded, args=(*recorded.args[:-2], 11009, *recorded.args[-1:]))  # F, no multiple of 16
    found = machine_code.read(sass.compile_for(odd, arch), arch)
    assert found.narrow > 0
    told = sass.problems(name, found, HELD[name], same_version=True)
    assert any("narrow" in text for text in told), told
    assert sass.problems(name, replace(found, wide=0), HELD[name], same_version=False)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_planted_spill_is_seen(arch: str) -> None:
    name = FORWARD.replace("sm_90", arch)
    recorded = _forward(swiglu.Launch(BLOCK_F=32768 if arch == "gfx942" else 8192, num_warps=1), arch)
    found = machine_code.read(sass.compile_for(recorded, arch), arch)
    assert found.spills > 0
    told = sass.problems(name, found, HELD[name], same_version=True)
    assert any("spills" in text for text in told), told
    assert any("registers" in text for text in told), told


def test_other_products_and_unknown_kernels_are_seen() -> None:
    held: dict[str, Any] = {"wide": 1, "tensor": "HGMMA 16"}
    found = machine_code.Report(registers=1, spills=0, shared=0, occupancy=100, narrow=0, wide=1, tensor="HMMA 16")
    assert "tensor-core instructions HMMA, expected HGMMA" in sass.problems("x", found, held, False)[0]
    assert "not in gpu_budget.toml" in sass.problems("x", found, None)[0]


def test_widths_are_read() -> None:
    code = "LDG.E.128 R1; LDG.E.U16 R2; STG.E R3; LDGSTS.E.BYPASS.128 [R1]; STG.E.64 R1; LD.E.U8 R1; UTMALDG.2D; LDS.64"
    assert [machine_code._width(a) for a in machine_code._ACCESS.findall(code)] == [16, 2, 4, 16, 8, 1]
    assert machine_code._BULK.findall(code) == ["UTMALDG"]


def test_amd_accesses_are_read() -> None:
    lines = (
        "global_load_dwordx4 v[0:3], v4, s[0:1]",
        "buffer_load_b128 v[0:3], v4, s[0:3], 0 offen",
        "buffer_load_dwordx4 v1, s[0:3], 0 offen lds",
        "global_store_short v0, v1, s[0:1]",
        "buffer_load_d16_hi_b16 v0, v1, s[0:3], 0",
        "global_load_lds_dwordx4 v0, s[0:1]",
        "scratch_load_dwordx4 v[0:3], off",
        "ds_read_b128 v[0:3], v4",
        "s_load_dwordx4 s[0:3], s[4:5]",
        "v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]",
    )
    code = "".join(f"\t{line}\n" for line in lines)
    found = [machine_code._AMD_WIDTHS.get(kind, 2) for kind in machine_code._AMD_ACCESS.findall(code)]
    assert found == [16, 16, 16, 2, 2, 16]
    assert machine_code._AMD_TENSOR.findall(code) == ["mfma"]


def test_the_budget_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = machine_code.Report(registers=1, spills=2, shared=3, occupancy=4, narrow=5, wide=6, tensor="HMMA 7")
    monkeypatch.setattr(sass, "BUDGET", tmp_path / "budget.toml")
    sass.write({"sm_90 a": report})
    assert sass.budget() == {"triton": triton.__version__, "sm_90 a": vars(report)}
