"""The GPU kernels on a GPU: `python -m benchmarks.gpu test | bench | sanitize | tune | prove`.

Runs from the source tree, nothing installed. `test` holds every op and backend to its error budget against float64 and
checks that results repeat, are captured by CUDA graphs and compile, and what is put together of them: the block, this
package's model, patched models of transformers. `bench` times the ops beside PyTorch's and other libraries' kernels;
`sanitize` runs small cases under compute-sanitizer; `tune` times the launch parameters that a kernel's file lists;
`prove` writes llama_fast/ops/proven.json from the results of the first two. A case that raises is
recorded with its error and the run goes on. `--device cpu --tiny` is a dry run, with Triton's if TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama_fast as lf
from benchmarks import gpu_model
from benchmarks.gpu_bench import (
    check_candidates,
    check_warm,
    command_bench,
    command_prove,
    command_timer,
    command_tune,
    disagreement,
)
from benchmarks.gpu_cases import DTYPES, test_cases
from benchmarks.gpu_run import (
    BACKENDS,
    OURS,
    ROOT,
    Check,
    Row,
    backends_of,
    header,
    in_process,
    in_processes,
    run_units,
    worker_command,
    write,
)
from benchmarks.gpu_time import Clock, forward_and_backward
from benchmarks.harness import first_line
from llama_fast.ops import pieces
from llama_fast.ops.dispatch import primitives
from llama_fast.ops.table import OPS
from llama_fast.verify import VENDORS, Case, expect, measure

LIMITS = {"test": 260.0, "bench": 140.0, "sanitize": 90.0, "tune": 120.0}

_NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # each tensor is an allocation of its own: memcheck sees past its end


# ---- correctness ----------------------------------------------------------------------------------------------------
def units(names: list[str], tiny: bool) -> list[Row]:
    """The checks of `test`: the slow ones first, then a case of every op in turn, so that a short run has seen all."""
    ops = [name for name in names if name in OPS]
    found: list[Row] = [{"kind": "compile", "op": op} for op in ops] + repeats(ops) + gpu_model.units(names, tiny)
    longest = max((len(test_cases(op, tiny)) for op in ops), default=0)
    for index in range(longest):
        for op in (op for op in ops if index < len(test_cases(op, tiny))):
            found += [{"kind": "budget", "op": op, "case": index, "dtype": name} for name in DTYPES]
    return found


def repeats(ops: list[str]) -> list[Row]:
    """Of every op a small case, and where an op has kernels for other sizes one of these."""
    more: list[Row] = [
        {"kind": "repeat", "op": "attention", "dims": {"D": 128}},
        {"kind": "repeat", "op": "linear_cross_entropy", "dims": {"C": 24}, "by_classes": True},
    ]
    return [{"kind": "repeat", "op": op} for op in ops] + [unit for unit in more if unit["op"] in ops]


def check_budget(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each backend: the worst error as a share of its budget."""
    op, dtype = unit["op"], DTYPES[unit["dtype"]]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives with NaN
    case = test_cases(op, args.tiny)[unit["case"]]
    expected = expect(case, dtype, args.device)
    for backend in backends_of(op, args.backends):
        row = unit | {"backend": backend, "label": str(case)}
        begin = time.perf_counter()
        try:
            results = measure(case, backend, dtype, args.device, expected=expected)
        except lf.NotSupported as error:
            yield row | {"objection": str(error).splitlines()[-1].partition(": ")[2]}
            continue
        except Exception as error:
            yield row | {"problem": first_line(error)}
            continue
        share = max((r.error / r.budget for r in results if r.budget), default=0.0)
        problem = "; ".join(f"{r.tensor}: {r.problem}" for r in results if r.problem)
        yield row | {"share": share, "problem": problem, "seconds": time.perf_counter() - begin}


def _small(op: str, tiny: bool, **dims: int) -> Case:
    sizes = {"B": 2, "T": 130, "S": 130, "H": 4, "G": 2, "D": 64, "C": 256, "F": 256, "V": 515, "...": (37,), **dims}
    patterns = " ".join(OPS[op].public.values()).replace("/2", "").split()
    return test_cases(op, True)[0] if tiny else Case(op, {k: v for k, v in sizes.items() if k in patterns})


def check_repeat(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Of each backend of ours: gradients repeat bitwise, and a captured graph gives the same bits; so do results that
    take the place of arguments."""
    op, sizes = unit["op"], pieces.SIZES
    inputs = _small(op, args.tiny, **unit.get("dims", {})).inputs(torch.bfloat16, args.device)
    try:
        if unit.get("by_classes"):
            pieces.SIZES = pieces.Sizes(rows=8, most_in_chunks=32, classes=4, waste=math.inf)
        for backend in [b for b in backends_of(op, args.backends) if b in OURS]:
            row = unit | {"backend": backend, "dtype": "bfloat16", "label": "repeats bitwise, in a graph too"}
            try:
                problem = _repeat_problem(Clock(torch.device(args.device)), op, inputs, backend)
                row["problem"] = problem or _replacing_problem(op, backend, args.device)
            except lf.NotSupported as error:
                row["objection"] = str(error).splitlines()[-1].partition(": ")[2]
            except Exception as error:
                row["problem"] = first_line(error)
            yield row
    finally:
        pieces.SIZES = sizes


def _repeat_problem(clock: Clock, op: str, inputs: Mapping[str, Tensor], backend: str) -> str:
    def function(**arguments: Tensor) -> Any:
        with lf.backend(backend):
            return getattr(lf, op)(**arguments)

    with clock.current():
        _, _, both = forward_and_backward(function, inputs, {})
        first, second = both(), both()
        if not _same(first, second):
            return "two runs differ"
        if not clock.gpu or _NO_CACHE in os.environ:  # a capture may not ask the driver for memory
            return ""
        prepared = clock.prepare(both)
        if prepared.no_graph:
            return f"not captured in a CUDA graph: {prepared.no_graph}"
        prepared.run()
        clock.wait()
        return "" if _same(first, prepared.kept) else "the graph's results differ"


def _replacing_problem(op: str, backend: str, device: str) -> str:
    """Of the backend's primitives that write in place: what comes of it in place of their last arguments."""
    (module,) = (importlib.import_module(b.module) for b in OPS[op].backends if b.name == backend)
    for name in sorted(n for n in getattr(module, "INPLACE", ()) if n.startswith(f"{op}_")):
        for shape in ((37, 515), (300, 4096)):
            args = [torch.randn(shape, device=device).bfloat16() for _ in primitives[name].op.schema(name[-3:]).args]
            expected = primitives[name](*args, backend=backend)
            into = tuple(args[-len(expected) :])
            found = primitives[name](*args, backend=backend, into=into)
            if any(a is not b for a, b in zip(found, into, strict=True)):
                return f"{name}: results in place of arguments are elsewhere"
            if not _same(expected, found):
                return f"{name}: results in place of arguments differ"
    return ""


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def check_compile(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Of each backend of ours: torch.compile with no graph break and one graph for every batch."""
    op = unit["op"]
    for backend in [b for b in backends_of(op, args.backends) if b in OURS]:
        row = unit | {"backend": backend, "dtype": "bfloat16", "label": "torch.compile(fullgraph=True), any batch"}
        try:
            problem = _compile_problem(op, backend, args.device, args.tiny)
        except lf.NotSupported as error:
            yield row | {"objection": str(error).splitlines()[-1].partition(": ")[2]}
            continue
        except Exception as error:
            problem = first_line(error)
        yield row | {"problem": problem}


def _compile_problem(op: str, backend: str, device: str, tiny: bool) -> str:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(getattr(lf, op), fullgraph=True, backend="aot_eager")
    torch._dynamo.config.automatic_dynamic_shapes = True
    for batch in (4, 6, 11):
        case = _small(op, tiny)
        sizes = {"...": (batch,)} if "..." in case.dims else {"B": batch}
        inputs = dataclasses.replace(case, dims={**case.dims, **sizes}).inputs(torch.bfloat16, device)
        with lf.backend(backend):
            (forward, _, both), (plain, _, plain_both) = (
                forward_and_backward(f, inputs, {}) for f in (compiled, getattr(lf, op))
            )
            pair = [x if isinstance(x, tuple) else (x,) for x in (forward(), plain())]
            if not _same(*pair):
                return f"batch {batch}: compiled and eager results differ"
            # not bitwise: the compiled backward runs outside the block, on the backend that is chosen by default
            wrong = disagreement(both(), plain_both())
        if wrong:
            return f"batch {batch}: {wrong}"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return "" if graphs <= 2 else f"{graphs} graphs for three batches, expected one and a dynamic one"


CHECKS: dict[str, Check] = {
    "budget": check_budget,
    "repeat": check_repeat,
    "compile": check_compile,
    "warm": check_warm,
    "candidates": check_candidates,
    **gpu_model.CHECKS,
}


def command_test(args: argparse.Namespace) -> int:
    todo = units(args.ops, args.tiny)
    begin = time.perf_counter()
    rows = in_processes(todo, args, args.limit) if args.workers > 1 else in_process(todo, args, args.limit, CHECKS)
    seen = {json.dumps(r["unit"]) for r in rows}
    missing = [u for u in todo if json.dumps(u) not in seen]
    rows = [{k: v for k, v in r.items() if k != "unit"} for r in rows if "backend" in r]
    result = header(args) | {"rows": rows, "not_run": missing, "seconds": time.perf_counter() - begin}
    write(args, result)
    return _print_test(rows, missing, result["seconds"])


def command_worker(args: argparse.Namespace) -> int:
    return 0 if run_units(json.loads(Path(args.todo).read_text()), args, Path(args.out), CHECKS) else 3


def _print_test(rows: list[Row], missing: list[Row], seconds: float) -> int:
    groups: defaultdict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for r in rows:
        groups[r["op"], r["backend"], r["kind"]].append(r)
    print(f"{'op':21} {'backend':9} {'check':8} {'passed':>9} {'refused':>8} {'worst/budget':>13}")
    for (op, backend, kind), found in sorted(groups.items()):
        refused, bad = [r for r in found if "objection" in r], [r for r in found if r.get("problem")]
        ran = len(found) - len(refused)
        worst = max((f"{r['share']:13.2f}" for r in found if "share" in r), key=float, default="")
        mark = f"  {len(bad)} {'over budget' if backend in VENDORS else 'RED'}" if bad else ""
        print(f"{op:21} {backend:9} {kind:8} {ran - len(bad):4}/{ran:<4} {len(refused):8} {worst:>13}{mark}")
    objections = sorted({(r["backend"], r["op"], r["objection"]) for r in rows if "objection" in r})
    for backend, op, text in objections[:12]:
        print(f"refused: {backend} {op}: {text}"[:160])
    bad = [r for r in rows if r.get("problem")]
    red, vendors = [r for r in bad if r["backend"] not in VENDORS], [r for r in bad if r["backend"] in VENDORS]
    for name, found in (("RED", red), ("vendor over budget:", vendors)):
        for r in found[:25]:
            print(f"{name} {r['op']} {r['backend']} {r.get('dtype', '')} {r['label']}: {r['problem']}"[:260])
        if len(found) > 25:
            print(f"... and {len(found) - 25} more in the file")
    checks = sum("objection" not in r for r in rows)
    print(
        f"{checks} checks, {len(red)} red, {len(vendors)} of a vendor over budget, "
        f"{len(missing)} units not run in time, {seconds:.0f} s"
    )
    return int(bool(red or missing or not checks))


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------
def command_sanitize(args: argparse.Namespace) -> int:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    result = header(args) | {"rows": []}
    if program is None:
        result["problem"] = "compute-sanitizer is not installed"
        print(result["problem"])
        write(args, result)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "todo0").write_text(json.dumps(repeats(args.ops)))
        environment = os.environ | {_NO_CACHE: "1"}
        running = {}
        for tool in ("memcheck", "racecheck", "synccheck"):
            log = Path(folder) / f"{tool}.log"
            command = [program, "--tool", tool, "--log-file", str(log), "--error-exitcode", "9"]
            worker = worker_command(args, Path(folder), 0)
            worker[worker.index("--out") + 1] = str(Path(folder) / f"{tool}.rows")
            running[tool] = (subprocess.Popen([*command, *worker], cwd=ROOT, env=environment, stdout=2), log)
        end = time.perf_counter() + args.limit
        for tool, (process, log) in running.items():
            try:
                status = str(process.wait(max(end - time.perf_counter(), 1)))
            except subprocess.TimeoutExpired:
                process.kill()
                status = "no time left"
            text = log.read_text() if log.exists() else ""
            rows = Path(folder) / f"{tool}.rows"
            ran = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
            names = sorted({f"{r['op']} {r['backend']}" for r in ran if "backend" in r and "objection" not in r})
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
            found = list(dict.fromkeys(re.findall(r"^=+ *((?:Error:|Invalid|and (?:Read|Write)).*)", text, re.M)))
            row = {"tool": tool, "status": status, "ran": names, "summary": summary}
            result["rows"].append(row | {"found": found[:60], "log": text[:8000]})
            print(f"{tool}: exit {status}; {'; '.join(summary) or 'no summary'}; ran {', '.join(names) or 'nothing'}")
            if status != "0":
                print(text[:2500])
    write(args, result)
    return 0 if all(r["status"] == "0" and r["ran"] for r in result["rows"]) else 1


# ---- command line ---------------------------------------------------------------------------------------------------
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def names(text: str) -> list[str]:
        return [n for n in text.split(",") if n]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=(*LIMITS, "prove", "worker", "timer"))
    parser.add_argument("files", nargs="*", help="prove: results of test and of bench; of several an op's last counts")
    parts = f"; of test also {', '.join(gpu_model.PARTS)}"
    parser.add_argument("--ops", type=names, help=f"names with commas between{parts}; all without")
    parser.add_argument("--backends", type=names, default=list(BACKENDS))
    parser.add_argument("--out", help="the JSON; results/<command>-<device>.json without")
    parser.add_argument("--limit", type=float, help=f"seconds; without: {LIMITS}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one small case an op: a dry run")
    parser.add_argument("--cases", type=int, help="bench, tune: only the first so many of an op")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="processes of test")
    parser.add_argument("--commit", help="of the tree, where it is under no version control")
    parser.add_argument("--todo", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = [*OPS, *(gpu_model.PARTS if args.command == "test" else ())]
    args.ops = known if args.ops is None else args.ops
    unknown = [op for op in args.ops if op not in known]
    if unknown:
        parser.error(f"--ops: {', '.join(unknown)} not among {', '.join(known)}")
    if args.device == "cuda" and args.command != "prove" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny is a dry run")
    args.limit = args.limit or LIMITS.get(args.command, 60.0)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs a command and gives its exit status."""
    args = parse(argv)
    # of torch's, about what is known here (determinism, complex numbers); SDPA's become the reasons of rows
    warnings.simplefilter("ignore")
    return COMMANDS[args.command](args)


COMMANDS = {
    "test": command_test,
    "bench": command_bench,
    "sanitize": command_sanitize,
    "tune": command_tune,
    "prove": command_prove,
    "worker": command_worker,
    "timer": command_timer,
}


if __name__ == "__main__":
    raise SystemExit(main())
