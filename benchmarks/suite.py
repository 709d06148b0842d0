"""All benchmarks of the ops: collects the cases, measures them, prints a table and writes JSON."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import llama_fast
from llama_fast.ops import native

from . import harness
from .harness import Benchmark, Measurement


def collect(ops: Sequence[str], quick: bool = False) -> list[Benchmark]:
    """The cases of these ops, from every file beside this one that has BENCHMARKS, in the order of `ops`."""
    found: list[Benchmark] = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name not in ("__main__", "harness", "suite"):
            module = importlib.import_module(f"{__package__}.{info.name}")
            found += getattr(module, "BENCHMARKS", ())
    chosen = [b for b in found if b.case.op in ops and (b.quick or not quick)]
    return sorted(chosen, key=lambda b: list(ops).index(b.case.op))


def measure_limits(benchmarks: Iterable[Benchmark]) -> dict[str, float]:
    """What the machine does at best, now: "copy" in bytes/s, and the matrix product of each dtype used in FLOP/s."""
    from llama_fast.ops.table import OPS

    limits = {"copy": harness.copy_bandwidth()}
    for b in benchmarks:
        if OPS[b.case.op].flops is not None:
            limits.setdefault(str(b.dtype), 0.0)
    return {name: rate or harness.matrix_rate(getattr(torch, name[6:])) for name, rate in limits.items()}


def share_of_limit(m: Measurement, limits: dict[str, float]) -> float:
    """Our rate as a share of the machine's limit for this kind of op."""
    limit = limits[str(m.benchmark.dtype)] if m.flops else limits["copy"]
    return m.rate("llama_fast") / limit


def environment() -> dict[str, Any]:
    """Where the figures come from: processor, versions, threads, instruction set, time."""
    from llama_fast.info import machine

    facts = dict(machine())
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": facts["machine"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llama_fast": llama_fast.__version__,
        "threads": torch.get_num_threads(),
        "isa": native.isa() if native.unavailable() is None else None,
    }


def table_of(measurements: Iterable[Measurement], limits: dict[str, float]) -> Table:
    """One row a case and direction."""
    table = Table("op", "case", "dtype", "direction")
    for header in ("ms", "eager ms", "rate", "of limit", "vs eager"):
        table.add_column(header, justify="right")
    for m in measurements:
        unit = "GFLOP/s" if m.flops else "GB/s"
        table.add_row(
            m.benchmark.case.op,
            str(m.benchmark.case),
            str(m.benchmark.dtype).removeprefix("torch."),
            m.direction,
            f"{m.timings['llama_fast'].median * 1e3:.2f}",
            f"{m.timings['eager'].median * 1e3:.2f}",
            f"{m.rate('llama_fast') / 1e9:.1f} {unit}",
            f"{share_of_limit(m, limits):.0%}",
            f"{m.ratio():.2f}x",
        )
    return table


def as_json(measurements: Iterable[Measurement], limits: dict[str, float]) -> dict[str, Any]:
    """The same figures for programs; seconds, bytes/s and FLOP/s."""
    rows = [
        {
            "name": m.benchmark.name,
            "op": m.benchmark.case.op,
            "dtype": str(m.benchmark.dtype).removeprefix("torch."),
            "direction": m.direction,
            "seconds": {p: {"median": t.median, "p20": t.p20, "p80": t.p80} for p, t in m.timings.items()},
            "traffic": m.traffic,
            "flops": m.flops,
            "share_of_limit": share_of_limit(m, limits),
            "ratio": {p: m.ratio(p) for p in m.timings if p != "llama_fast"},
        }
        for m in measurements
    ]
    return {"environment": environment(), "limits": limits, "measurements": rows}


def main(
    ops: Sequence[str], *, quick: bool = False, json_path: Path | None = None, console: Console | None = None
) -> list[Measurement]:
    """Measures the cases of `ops` and prints them; `json_path` gets the figures too.

    Host memory is kept for both sides alike (`llama_fast.keep_host_memory`), so that the ratio is the kernels' alone.

    Raises:
        RuntimeError: a case's results are wrong; no speed is given then.
        ValueError: there is no case.
        OSError: `json_path` cannot be written; found out before anything is measured.
    """
    console = console or Console()
    benchmarks = collect(ops, quick)
    if not benchmarks:
        raise ValueError(f"ops {', '.join(ops)}: no benchmark has a case of them")
    if json_path is not None:
        json_path.touch()
    llama_fast.keep_host_memory()
    limits = measure_limits(benchmarks)
    facts = environment()
    isa = facts["isa"] or "no native library"
    console.print(f"{facts['machine']}, {facts['threads']} threads, {isa}, torch {facts['torch']}", highlight=False)
    for name, rate in limits.items():
        what = "copy bandwidth" if name == "copy" else f"matrix product {name.removeprefix('torch.')}"
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        console.print(f"limit: {what} {rate / 1e9:.1f} {unit}", highlight=False)
    measurements = []
    with console.status("") as status:
        for b in benchmarks:
            status.update(b.name)
            measurements += harness.run(b, seconds=0.3 if quick else 1.0)
    console.print(table_of(measurements, limits))
    mean = statistics.geometric_mean([m.ratio() for m in measurements])
    console.print(f"geometric mean of the ratios to eager PyTorch: {mean:.2f}x", highlight=False)
    if json_path is not None:
        json_path.write_text(json.dumps(as_json(measurements, limits), indent=1) + "\n")
    return measurements
