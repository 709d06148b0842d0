"""What stands in a compiled Triton kernel: NVIDIA's by cuobjdump, AMD's by the assembly that Triton keeps.

benchmarks/sass.py compiles the kernels and holds what is read here to a budget.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Report:
    """Of one kernel.

    Args:
        registers: a thread; AMD's: vector registers, those of the matrix units among them.
        spills: loads and stores of local memory; AMD's: vector registers spilled, and bytes of scratch memory.
        shared: bytes a program.
        occupancy: warps that a multiprocessor holds, in percent of the most.
        narrow: global accesses of less than 16 bytes.
        wide: global accesses of 16 bytes and more, and bulk copies.
        tensor: tensor-core instructions, by kind and number ("HGMMA 16", "MFMA 64").
    """

    registers: int
    spills: int
    shared: int
    occupancy: int
    narrow: int
    wide: int
    tensor: str


def read(compiled: Any, arch: str) -> Report:
    """Reads a compiled kernel's machine code; `arch` as "sm_90" or "gfx942"."""
    return _read_amd(compiled, arch) if arch.startswith("gfx") else _read_nvidia(compiled, arch)


def _counted(widths: Iterable[int], bulk: int, products: Iterable[str]) -> dict[str, Any]:
    widths, kinds = list(widths), Counter(products)
    return {
        "narrow": sum(w < 16 for w in widths),
        "wide": sum(w >= 16 for w in widths) + bulk,
        "tensor": " ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())),
    }


# ---- NVIDIA ---------------------------------------------------------------------------------------------------------
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # of a multiprocessor
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # of a multiprocessor, all three architectures
_ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS|LD|ST)\.E(?:\.\w+)*")
_BULK = re.compile(r"\b(?:UTMALDG|UTMASTG|UBLKCP)\b")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_TENSOR = re.compile(r"\b(HMMA|IMMA|HGMMA|UTC\w*MMA)\b")


def _tool(name: str) -> str:
    found = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob(name))
    if not found:
        raise FileNotFoundError(f"Triton {triton.__version__} ships no {name}")
    return str(found[0])


def disassemble(cubin: bytes) -> str:
    """Resource usage and machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _width(access: str) -> int:
    parts = access.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts if p in widths), 4)


def _read_nvidia(compiled: Any, arch: str) -> Report:
    text = disassemble(compiled.asm["cubin"])
    (registers,) = set(re.findall(r"\bREG:(\d+)", text))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    total = max(warps, getattr(compiled.metadata, "total_num_warps", None) or warps)
    allocated = -(-int(registers) * 32 // 256) * 256 * total
    fits = (_REGISTERS // allocated, _SHARED_BYTES[arch] // (shared + 1024), _WARPS // total, _BLOCKS)
    return Report(
        registers=int(registers),
        spills=len(_SPILL.findall(text)),
        shared=shared,
        occupancy=100 * min(fits) * total // _WARPS,
        **_counted(map(_width, _ACCESS.findall(text)), len(_BULK.findall(text)), _TENSOR.findall(text)),
    )


# ---- AMD ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Unit:
    """Of a compute unit (of RDNA's pair of them, which share): vector registers of a lane and how they are dealt."""

    registers: int
    step: int
    waves: int  # of a SIMD, at most; four SIMDs each
    shared: int


_CDNA3, _CDNA4 = _Unit(512, 8, 8, 64 << 10), _Unit(512, 8, 8, 160 << 10)
_RDNA = _Unit(1536, 24, 16, 128 << 10)
_UNITS = {"gfx942": _CDNA3, "gfx950": _CDNA4, "gfx1100": _RDNA, "gfx1201": _RDNA}
_SIMDS = 4
_AMD_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(?:load|store)_(?:lds_)?(\w+)", re.MULTILINE)
_AMD_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}
_AMD_TENSOR = re.compile(r"^\s*v_(mfma|wmma|smfmac|swmmac)_", re.MULTILINE)


def _read_amd(compiled: Any, arch: str) -> Report:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        (value,) = set(re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE))
        return int(value)

    unit, warps, shared = _UNITS[arch], compiled.metadata.num_warps, compiled.metadata.shared
    registers = field("vgpr_count")
    by_registers = _SIMDS * min(unit.registers // (-(-max(registers, 1) // unit.step) * unit.step), unit.waves) // warps
    programs = min(by_registers, unit.shared // max(shared, 1))
    return Report(
        registers=registers,
        spills=field("vgpr_spill_count") + field("private_segment_fixed_size"),
        shared=shared,
        occupancy=100 * programs * warps // (_SIMDS * unit.waves),
        **_counted(
            (_AMD_WIDTHS.get(kind, 2) for kind in _AMD_ACCESS.findall(text)),
            0,
            map(str.upper, _AMD_TENSOR.findall(text)),
        ),
    )
