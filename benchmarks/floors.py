"""Holds the ratios of floors.toml: `python -m benchmarks.floors`, or `make perf-check`.

Every case is measured in a process of its own, so that the state of the allocator is its own. A case whose results are
wrong fails. The exit status is 1 when a figure is under its floor, and the lines that fell come last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import harness, model, results, suite

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("floors.toml")
AMX = "amx"  # Intel's processors with matrix registers
PROCESSORS = {26: "zen5", 25: "zen4"}  # by AMD family, where the kernels run on AVX-512
CLASSES = {*PROCESSORS.values(), AMX}
MEMORY = ("", "default memory", "ours kept")  # what a figure ends in; "": kept on both sides
ROUNDS = 3  # of processes, where each side has its own


@dataclass(frozen=True)
class Floor:
    """One line of floors.toml; `least` by class of processor."""

    case: str
    figure: str
    memory: str
    least: dict[str, float]


def read(path: Path = PATH) -> list[Floor]:
    """The floors of the file.

    Raises:
        ValueError: an unknown case, state of memory or class of processor.
    """
    known, found = names(), []
    for case, lines in tomllib.loads(path.read_text()).items():
        if case not in known:
            raise ValueError(f"{path.name}: [{case!r}], expected one of {', '.join(known)}")
        for key, least in lines.items():
            figure, _, memory = key.partition("; ")
            if memory not in MEMORY:
                raise ValueError(f"{path.name}: {case}: {key!r} ends in none of {', '.join(MEMORY)}")
            if not least or set(least) - CLASSES:
                raise ValueError(f"{path.name}: {case}: {key!r} is for {set(least)}, expected {CLASSES}")
            found.append(Floor(case, figure, memory, least))
    return found


def names() -> list[str]:
    """Every case that can have a floor."""
    from llama_fast.ops.table import OPS

    return [*(b.name for b in suite.collect(list(OPS))), *(s.name for s in model.scenarios())]


def processor() -> str | None:
    """The class of this processor in floors.toml, or None where it has no floors."""
    from llama_fast.ops import native

    if native.unavailable() is not None or native.isa() not in ("amx", "avx512bf16", "avx512"):
        return None
    return AMX if native.isa() == "amx" else PROCESSORS.get(native.amd_family())


def figures(case: str, memory: str, only: str | None = None) -> dict[str, float]:
    """Measures a case in this process: figure -> value. With `only`, one provider's seconds as "seconds"."""
    import llama_fast
    from llama_fast.ops.table import OPS

    if memory == "" or (memory == "ours kept" and only == "llama_fast"):
        llama_fast.keep_host_memory()
    scenario = next((s for s in model.scenarios() if s.name == case), None)
    found: dict[str, float] = {}
    if scenario is not None:
        ours = model.PATCHED if scenario.op == "lora_step" else f"{results.OURS}:{model.DEFAULT}"
        sides = ("llama_fast", ours, "transformers", *(["torch.compile"] if scenario.op == "training_step" else []))
        chosen = [n for n in sides if only is None or n == only or (n == ours and only == results.OURS)]
        times: dict[str, float] = {}
        kept: dict[str, int] = {}
        for x in model.measure(scenario, seconds=4, choose=lambda n: n in chosen):
            if x.seconds is None:
                raise RuntimeError(f"{case}: {x.provider}: {x.status}: {x.reason}")
            name = results.OURS if results.is_ours(x.provider) else x.provider
            times[name], kept[name] = x.seconds.median, x.kept_bytes or 0
        if only is not None:
            return {"seconds": times[only]}
        for peer in times.keys() - {results.OURS}:
            found[f"time vs {peer}"] = times[peer] / times[results.OURS]
            if kept[peer]:
                found[f"memory vs {peer}"] = kept[peer] / kept[results.OURS]
        return found
    benchmark = next(b for b in suite.collect(list(OPS)) if b.name == case)
    peers = ("eager", "transformers", "sdpa_repeated")
    dtypes = [benchmark.dtype]
    limits = harness.measure_limits(dtypes)
    lines = harness.measure(benchmark, seconds=1.5, choose=lambda p: p.ours or p.name in peers)
    limits = results.better(limits, harness.measure_limits(dtypes))
    lines = [results.against(x, limits) for x in lines]
    for x in lines:
        if x.status == "wrong":
            raise RuntimeError(f"{case}: {x.direction}: {x.provider}: {x.reason}")
        first = harness.ours_of(y for y in lines if y.key == x.key)
        if first is not None and first.seconds is not None and x.seconds is not None:
            if x is first:
                found[f"{x.direction} of limit"] = first.share or 0.0
            else:
                found[f"{x.direction} vs {x.provider}"] = x.seconds.median / first.seconds.median
    if benchmark.case.op == "linear_cross_entropy":
        from . import linear_cross_entropy

        index = linear_cross_entropy.BENCHMARKS.index(benchmark)
        peaks = [linear_cross_entropy.peak_bytes(name, index) for name in ("eager", "llama_fast")]
        found["memory vs eager"] = peaks[0] / max(peaks[1], 1)
    return found


def _in_process(case: str, memory: str, only: str | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.floors", "--measure", case, "--memory", memory]
    done = subprocess.run([*command, *(["--only", only] if only else [])], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _one_sided(case: str) -> dict[str, float]:
    """Our seconds with host memory kept against the peer's with the default allocator, processes in turn."""
    seconds: dict[str, list[float]] = {"llama_fast": [], "transformers": []}
    for _ in range(ROUNDS):
        for name, samples in seconds.items():
            samples.append(_in_process(case, "ours kept", name)["seconds"])
    ours, theirs = (statistics.median(samples) for samples in seconds.values())
    return {"time vs transformers": theirs / ours}


def check(floors: list[Floor], console: Console) -> list[dict[str, Any]]:
    """Measures every case of `floors` and prints a table; gives its rows, with "ok" False for what fell."""
    kind = processor()
    groups = list(dict.fromkeys((f.case, f.memory) for f in floors))
    rows: list[dict[str, Any]] = []
    with console.status("") as status:
        for case, memory in groups:
            status.update(f"{case} {memory}")
            try:
                found = _one_sided(case) if memory == "ours kept" else _in_process(case, memory)
            except RuntimeError as error:
                found = {}
                console.print(str(error), style="red", highlight=False)
            for f in floors:
                if (f.case, f.memory) == (case, memory):
                    value, least = found.get(f.figure), f.least.get(kind or "")
                    ok = least is None or (value is not None and value >= least)
                    rows.append({"case": case, "figure": f.figure, "memory": memory, "value": value, "floor": least})
                    rows[-1] |= {"aim": f.least.get("zen5"), "ok": ok}
    table = Table("case", "figure", "host memory")
    columns = {"measured": "value", f"floor ({kind})": "floor", "floor (zen5)": "aim"}  # of a Zen 5 the two are one
    if kind is None:
        columns.pop("floor (None)")
    for header in (*columns, ""):
        table.add_column(header, justify="right")

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.2f}"

    for r in rows:
        verdict = "" if r["floor"] is None else "ok" if r["ok"] else "FELL"
        table.add_row(r["case"], r["figure"], r["memory"] or "kept", *(number(r[k]) for k in columns.values()), verdict)
    console.print(table)
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--case", action="append", help="only the cases whose name contains this; can be given again")
    parser.add_argument("--json", type=Path, help="write the figures and the environment here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=MEMORY, default="", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(names()))
        return 0
    if arguments.measure:
        print(json.dumps(figures(arguments.measure, arguments.memory, arguments.only)))
        return 0
    console = Console(width=max(150, Console().width))
    facts = harness.environment("by case")
    console.print(
        f"{facts.device} ({processor() or 'no floors for this processor'}), {facts.threads} threads, "
        f"{facts.isa}, torch {torch.__version__}",
        highlight=False,
    )
    wanted = [f for f in read() if not arguments.case or any(part in f.case for part in arguments.case)]
    if not wanted:
        parser.error(
            f"--case {' '.join(arguments.case)}: expected part of the name of a case with a floor in {PATH.name}"
        )
    rows = check(wanted, console)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": asdict(facts), "floors": rows}, indent=1) + "\n")
    fallen = [r for r in rows if not r["ok"]]
    for r in fallen:
        console.print(f"fell: {r['case']}: {r['figure']} {r['value']} under {r['floor']}", style="red", highlight=False)
    console.print(f"{len(rows)} figures, {len(fallen)} under their floor", highlight=False)
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
