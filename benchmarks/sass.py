"""`python -m benchmarks.sass [--op OP] [--write]`: what the compiler made of the Triton kernels, without a GPU.

Each kernel is compiled ahead of time, as its launcher would launch it on tensors of given sizes, for NVIDIA's sm_80,
sm_90 and sm_100 and AMD's gfx942, gfx950, gfx1100 and gfx1201. From the machine code are read (machine_code.py):
registers, spills, shared memory, occupancy, the width of global accesses and the tensor-core instructions.
benchmarks/gpu_budget.toml holds what they were; tests/test_sass.py fails where one gets worse. The budget is of one
Triton version: with another only wide accesses and tensor-core instructions are compared.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import Report, read
from llama_fast.ops.table import OPS

BUDGET = Path(__file__).with_name("gpu_budget.toml")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950", "gfx1100", "gfx1201")
BF16, F32 = torch.bfloat16, torch.float32
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", F32: "fp32", torch.int64: "i64", torch.int32: "i32"}


# ---- what is compiled -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Specimen:
    """A launcher's call on tensors without data.

    Args:
        op: name of the op.
        label: sizes and dtype, for the reader.
        primitive: `<op>_fwd` or `<op>_bwd`.
        args: the primitive's arguments.
        everywhere: for every architecture, not for sm_90 alone.
    """

    op: str
    label: str
    primitive: str
    args: tuple[Any, ...]
    everywhere: bool = False

    @property
    def name(self) -> str:
        return f"{self.primitive} {self.label}"


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms() -> Iterable[Specimen]:
    for C, dtype in ((4096, BF16), (4096, F32), (128, BF16), (16384, BF16), (65536, BF16)):
        main = (C, dtype) == (4096, BF16)
        x, w, rstd = _meta(4096, C, dtype=dtype), _meta(C, dtype=dtype), _meta(4096, dtype=F32)
        for op, inputs in (("rms_norm", (x,)), ("add_rms_norm", (x, x)))[: 1 + main]:
            label = f"C{C} {_TYPES[dtype]}"
            yield Specimen(op, label, f"{op}_fwd", (*inputs, w, 1e-6), main)
            yield Specimen(op, label, f"{op}_bwd", (x, *inputs, w, rstd), main)


def _elementwise() -> Iterable[Specimen]:
    for dtype in (BF16, F32):
        x, label = _meta(4096, 11008, dtype=dtype), f"F11008 {_TYPES[dtype]}"
        yield Specimen("swiglu", label, "swiglu_fwd", (x, x), dtype == BF16)
        yield Specimen("swiglu", label, "swiglu_bwd", (x, x, x), dtype == BF16)
    q, k, angle = _meta(2, 512, 32, 128), _meta(2, 512, 8, 128), _meta(1, 512, 64, dtype=F32)
    yield Specimen("rope", "H32 G8 D128 bf16", "rope_fwd", (q, k, angle, angle, False), True)
    yield Specimen("rope", "H32 G8 D128 bf16 interleaved", "rope_fwd", (q, k, angle, angle, True))


def _losses() -> Iterable[Specimen]:
    op = "linear_cross_entropy"
    tensors = (_meta(64, 256), _meta(128256, 256), _meta(64, dtype=torch.int64), _meta(64, dtype=F32))
    yield Specimen(op, "V128256 bf16", f"{op}_fwd", (*tensors, -100, 0.0, 0.0, True, True), True)
    yield Specimen(op, "V128256 bf16 smoothing", f"{op}_fwd", (*tensors, -100, 0.1, 0.0, True, True))
    R, C = 8192, 4096  # dweight summed by classes, with rows whose logits are computed again
    tensors = (_meta(R, C), _meta(128256, C), _meta(R, dtype=torch.int64), _meta(R, dtype=F32))
    yield Specimen(op, f"R{R} V128256 bf16", f"{op}_fwd", (*tensors, -100, 0.0, 0.0, True, True), True)


def _attentions() -> Iterable[Specimen]:
    for D, T, everywhere in ((128, 4096, True), (64, 4096, False), (128, 1, False)):
        q, k, lse = _meta(2, T, 32, D), _meta(2, 4096, 8, D), _meta(2, 32, T, dtype=F32)
        options, label = (None, D**-0.5, True, 0), f"T{T} D{D} bf16"
        yield Specimen("attention", label, "attention_fwd", (q, k, k, *options), everywhere)
        if T > 1:
            yield Specimen("attention", label, "attention_bwd", (q, q, k, k, q, lse, *options), everywhere)


def specimens(op: str | None = None) -> list[Specimen]:
    """What is compiled of an op, or of all."""
    every = [*_norms(), *_elementwise(), *_losses(), *_attentions()]
    return [s for s in every if op in (None, s.op)]


@dataclass
class Recorded:
    """A launch that was not made: kernel, arguments, compile options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def record(specimen: Specimen, arch: str) -> list[Recorded]:
    """The launches of a specimen's launcher on a device of that architecture."""
    found: list[Recorded] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Recorded(self, args, options))

    module = next(b.module for b in OPS[specimen.op].backends if b.name == "triton")
    launched = JITFunction.run
    JITFunction.run = run
    try:
        with importlib.import_module("llama_fast.kernels.launch").pretend(arch):
            getattr(importlib.import_module(module), specimen.primitive)(*specimen.args)
    finally:
        JITFunction.run = launched
    return found


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compile_for(recorded: Recorded, arch: str) -> Any:
    """The compiled kernel, specialised as Triton specialises the launch: multiples of 16, ones, 16-byte pointers."""
    target = _target(arch)
    options = {k: v for k, v in recorded.options.items() if k in ("num_warps", "num_stages", "num_ctas", "maxnreg")}
    options["enable_fp_fusion"] = True
    names = [p.name for p in recorded.kernel.params]
    values = dict(zip(names, recorded.args, strict=False)) | {k: v for k, v in recorded.options.items() if k in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, p in enumerate(recorded.kernel.params):
        value, aligned = values.get(p.name, p.default), not p.do_not_specialize
        if p.is_constexpr or value is None or (type(value) is int and value == 1 and aligned):
            signature[p.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = f"*{_TYPES[value.dtype]}"
            attributes[i,] = [["tt.divisibility", 16]]
            if target.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
                attributes[i,].append(["tt.pointer_range", 32])
        elif hasattr(value, "block_shape"):
            signature[p.name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


# ---- what is read ---------------------------------------------------------------------------------------------------
def reports(name: str, arch: str) -> dict[str, Report]:
    """Of each kernel of a specimen, by its name in the budget."""
    (specimen,) = (s for s in specimens() if s.name == name)
    found = {}
    for recorded in record(specimen, arch):
        found[f"{arch} {name} {recorded.kernel.__name__}"] = read(compile_for(recorded, arch), arch)
    return found


def all_reports(op: str | None = None, jobs: int = 2) -> dict[str, Report]:
    """Of every specimen and its architectures, compiled in processes of their own."""
    todo = [(s.name, arch) for s in specimens(op) for arch in ARCHITECTURES if s.everywhere or arch == "sm_90"]
    found: dict[str, Report] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(reports, *zip(*todo, strict=True)):
            found.update(result)
    return found


# ---- the budget -----------------------------------------------------------------------------------------------------
def budget() -> dict[str, Any]:
    """The committed file: "triton" and the reports by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(BUDGET.read_text())


def problems(name: str, found: Report, held: dict[str, Any] | None, same_version: bool = True) -> list[str]:
    """What is worse than the budget."""
    if held is None:
        return [f"{name}: not in {BUDGET.name}: python -m benchmarks.sass --write"]
    worse = []
    kinds = [" ".join(t.split()[::2]) for t in (found.tensor, held["tensor"])]
    if kinds[0] != kinds[1]:
        worse.append(f"tensor-core instructions {kinds[0] or 'none'}, expected {kinds[1] or 'none'}")
    if held["wide"] and not found.wide:
        worse.append("no global access of 16 bytes is left")
    if same_version:
        for quantity in ("registers", "spills", "shared", "narrow"):
            if getattr(found, quantity) > held[quantity]:
                worse.append(f"{quantity} {getattr(found, quantity)}, expected at most {held[quantity]}")
        if found.occupancy < held["occupancy"]:
            worse.append(f"occupancy {found.occupancy} %, expected at least {held['occupancy']} %")
    return [f"{name}: {text}" for text in worse]


def write(found: dict[str, Report]) -> None:
    """Replaces the committed file."""
    lines = [
        "# Written by `python -m benchmarks.sass --write`; what the numbers are stands there in Report.",
        f'triton = "{triton.__version__}"',
    ]
    for name, report in found.items():
        fields = ", ".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in asdict(report).items())
        lines.append(f'"{name}" = {{ {fields} }}')
    BUDGET.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument("--op", choices=list(OPS))
    parser.add_argument("--write", action="store_true", help="replace benchmarks/gpu_budget.toml")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.write and args.op:
        parser.error("--write writes all ops: leave --op out")
    found = all_reports(args.op, args.jobs)
    if args.write:
        write(found)
    held = budget() if BUDGET.exists() else {}
    same, bad = held.get("triton") == triton.__version__, []
    print(f"{'':78} reg spill shared  occ narrow wide tensor-core instructions")
    for name, r in found.items():
        print(
            f"{name:78} {r.registers:3} {r.spills:5} {r.shared:6} {r.occupancy:3}% {r.narrow:6} {r.wide:4} {r.tensor}"
        )
        bad += problems(name, r, held.get(name), same)
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
