"""`python -m benchmarks` and `llama-fast bench`: chooses cases and providers, measures, prints, writes results."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

import llama_fast
from llama_fast.ops.table import OPS

from . import harness, results
from .harness import Benchmark
from .providers import Provider
from .results import Limit, Line, Results


def collect(ops: Sequence[str], quick: bool = False) -> list[Benchmark]:
    """The cases of these ops, from every file beside this one that has BENCHMARKS, in the order of `ops`."""
    found: list[Benchmark] = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name in OPS:
            module = importlib.import_module(f"{__package__}.{info.name}")
            found += getattr(module, "BENCHMARKS", ())
    chosen = [b for b in found if b.case.op in ops and (b.quick or not quick)]
    return sorted(chosen, key=lambda b: list(ops).index(b.case.op))


def table_of(lines: Iterable[Line]) -> Table:
    """One row a line that was measured or is wrong."""
    table = Table("op", "case", "dtype", "direction", "provider")
    for header in ("ms", "20..80 %", "of limit", "kept MB", "ours is"):
        table.add_column(header, justify="right")
    for _, group in groupby(lines, key=lambda x: x.key):
        rows = [x for x in group if x.status != "not run"]
        ours = harness.ours_of(rows)
        for x in rows:
            head = (x.op, x.sizes, x.dtype, x.direction) if x is rows[0] else ("", "", "", "")
            if x.seconds is None:
                table.add_row(*head, x.provider, "WRONG", "", "", "", "")
                continue
            s = x.seconds
            kept = "" if x.kept_bytes is None else f"{x.kept_bytes / 1e6:.1f}"
            ratio = (
                "" if ours is None or ours.seconds is None or ours is x else f"{s.median / ours.seconds.median:.2f}x"
            )
            spread = f"{s.p20 * 1e3:.2f}..{s.p80 * 1e3:.2f}"
            table.add_row(*head, x.provider, f"{s.median * 1e3:.2f}", spread, f"{x.share:.0%}", kept, ratio)
    return table


def print_limits(limits: Iterable[Limit], console: Console) -> None:
    """What the machine does at best."""
    for limit in limits:
        unit = "GB/s" if limit.unit == "byte/s" else "GFLOP/s"
        console.print(f"limit: {limit.name} {limit.rate / 1e9:.1f} {unit} ({limit.how})", highlight=False)


def print_lines(lines: Sequence[Line], console: Console) -> None:
    """The table, then what is wrong or was not run and why, then our ratio to eager PyTorch."""
    console.print(table_of(lines))
    for x in lines:
        if x.status == "wrong":
            where = f"{x.op} {x.sizes} {x.dtype} {x.direction} {x.provider}"
            console.print(f"WRONG: {where}: {x.reason}", style="red", highlight=False)
    absent = dict.fromkeys((x.op, x.provider, x.reason) for x in lines if x.status == "not run")
    for op, provider, reason in absent:
        console.print(f"not run: {op}: {provider}: {reason}", highlight=False)
    ratios = []
    for _, group in groupby(lines, key=lambda x: x.key):
        rows = list(group)
        ours, theirs = harness.ours_of(rows), next((x for x in rows if x.provider == "eager"), None)
        if ours is not None and ours.seconds is not None and theirs is not None and theirs.seconds is not None:
            ratios.append(theirs.seconds.median / ours.seconds.median)
    if ratios:
        console.print(
            f"geometric mean of the ratios to eager PyTorch: {statistics.geometric_mean(ratios):.2f}x", highlight=False
        )


def run(
    ops: Sequence[str],
    *,
    quick: bool = False,
    cases: Sequence[str] = (),
    providers: Sequence[str] = (),
    seconds: float | None = None,
    json_path: Path | None = None,
    commit: str | None = None,
    console: Console | None = None,
) -> Results:
    """Measures the cases of `ops` and prints them; `json_path` gets the results too.

    Host memory is kept for all providers alike (`llama_fast.keep_host_memory`), so that a ratio is the kernels' alone.

    Args:
        ops: rows of the op table.
        quick: one or two cases an op, without the providers that take long to start.
        cases: only those whose name contains one of these.
        providers: only these, and ours.
        seconds: for each provider and direction, about.
        json_path: a result file to write.
        commit: of the tree, where it is under no version control.
        console: where to print.

    Raises:
        ValueError: there is no such case.
        OSError: `json_path` cannot be written; found out before anything is measured.
    """
    console = console or Console()
    benchmarks = [b for b in collect(ops, quick) if not cases or any(part in b.name for part in cases)]
    if not benchmarks:
        wanted = f" whose name contains {' or '.join(map(repr, cases))}" if cases else ""
        raise ValueError(f"ops {', '.join(ops)}: no benchmark has a case of them{wanted}")
    if json_path is not None:
        json_path.touch()

    def choose(p: Provider) -> bool:
        if providers:
            return p.ours or p.name in providers
        return not (quick and p.slow)

    allocator = str(llama_fast.keep_host_memory())
    facts = harness.environment(allocator, commit=commit)
    console.print(
        f"{facts.device}, {facts.threads} threads (pinned: {facts.pinned}), {facts.isa or 'no native library'}, "
        f"torch {facts.packages['torch']}; {allocator}",
        highlight=False,
    )
    dtypes = dict.fromkeys(b.dtype for b in benchmarks if OPS[b.case.op].flops is not None)
    limits = harness.measure_limits(dtypes)
    lines: list[Line] = []
    with console.status("") as status:
        for b in benchmarks:
            status.update(b.name)
            lines += harness.measure(b, seconds or (0.3 if quick else 1.0), choose)
    limits = results.better(limits, harness.measure_limits(dtypes))  # a machine that others use gets slower and faster
    lines = [results.against(x, limits) for x in lines]
    print_limits(limits, console)
    print_lines(lines, console)
    found = Results(results.FORMAT, facts, limits, tuple(lines))
    if json_path is not None:
        results.write(found, json_path)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m benchmarks`; 1 where a result is wrong, 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"among {', '.join(OPS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="one or two cases an op, about a minute")
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    parser.add_argument("--provider", action="append", default=[], help="only this one and ours; repeatable")
    parser.add_argument("--seconds", type=float, help="for each provider and direction, about")
    parser.add_argument("--json", type=Path, help="write a result file")
    parser.add_argument("--commit", help="of the tree, where it is under no version control")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    a = parser.parse_args(arguments)
    for name in a.ops:
        if name not in OPS:
            parser.error(f"OP {name}: expected one of {', '.join(OPS)}")
    ops = [name for name in OPS if not a.ops or name in a.ops]
    if a.list:
        print("\n".join(b.name for b in collect(ops)))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        found = run(
            ops,
            quick=a.quick,
            cases=a.case,
            providers=a.provider,
            seconds=a.seconds,
            json_path=a.json,
            commit=a.commit,
            console=console,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 1 if any(x.status == "wrong" for x in found.lines) else 0
