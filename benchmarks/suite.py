"""`python -m benchmarks` and `llama-fast bench`: chooses cases and providers, measures, prints, writes results."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

import llama_fast
from llama_fast.ops.table import OPS

from . import compare, harness, model, report, results
from .harness import Benchmark
from .providers import Provider, of
from .results import Environment, Limit, Line, Results, is_ours


def collect(ops: Sequence[str], quick: bool = False, device: str = "cpu") -> list[Benchmark]:
    """A device's cases of these ops, from every file beside this one that has BENCHMARKS, in the order of `ops`."""
    found: list[Benchmark] = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name in OPS:
            module = importlib.import_module(f"{__package__}.{info.name}")
            found += getattr(module, "BENCHMARKS", ())
    chosen = [b for b in found if b.device == device and b.case.op in ops and (b.quick or not quick)]
    return sorted(chosen, key=lambda b: list(ops).index(b.case.op))


def names(device: str = "cpu") -> list[str]:
    """What can be measured: the ops on a CPU, and the block, the training step and the decode on either."""
    return [*(OPS if device == "cpu" else ()), *dict.fromkeys(s.op for s in model.scenarios(device))]


def chosen(ops: Sequence[str], device: str) -> list[str]:
    """These ops, each once and in the order of `names`; without any all ops, on a GPU the model level.

    Raises:
        ValueError: no such device or op.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r}: expected cpu or cuda")
    known = names(device)
    for name in ops:
        if name not in known:
            raise ValueError(f"op {name}: expected one of {', '.join(known)}")
    return [name for name in known if name in ops or (not ops and (name in OPS or device == "cuda"))]


def case_names(ops: Sequence[str], device: str) -> list[str]:
    """The names of the cases of these ops, as `--case` looks into them."""
    kernels = collect([op for op in ops if op in OPS])
    return [*(b.name for b in kernels), *(s.name for s in model.scenarios(device) if s.op in ops)]


WIDEST = 170  # columns of the widest table


def table_of(lines: Iterable[Line]) -> Table:
    """One row a line that was measured or is wrong."""
    table = Table(Column("op", no_wrap=True), Column("case", min_width=14))  # alone folded where there is no room
    for header in ("dtype", "direction", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("ms", "20..80 %", "of limit", "peak MB", "kept MB", "ours is"):
        table.add_column(header, justify="right", no_wrap=True)
    for _, group in groupby(lines, key=lambda x: x.key):
        rows = [x for x in group if x.status != "not run"]
        ours = harness.ours_of(rows)
        for x in rows:
            head = (x.op, x.sizes, x.dtype, x.direction) if x is rows[0] else ("", "", "", "")
            if x.seconds is None:
                table.add_row(*head, x.provider, "WRONG", "", "", "", "", "")
                continue
            s = x.seconds
            memory = ("" if b is None else _digits(b / 1e6) for b in (x.peak_bytes, x.kept_bytes))
            ratio = (
                "" if ours is None or ours.seconds is None or ours is x else f"{s.median / ours.seconds.median:.2f}x"
            )
            spread = f"{_digits(s.p20 * 1e3)}..{_digits(s.p80 * 1e3)}"
            limit = f"{x.share:.0%} {(x.limit or '').split()[0]}"
            table.add_row(*head, x.provider, _digits(s.median * 1e3), spread, limit, *memory, ratio)
    return table


def _digits(number: float) -> str:
    """Three digits, or all that stand before the point: a token takes microseconds, a training step seconds."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


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


def print_models(found: Results, console: Console) -> None:
    """Tokens a second, MFU and memory of the model level, how MFU is counted, and the paper's."""
    lines = [x for x in found.lines if x.tokens and x.seconds is not None]
    for x in lines:
        head = f"{x.op} {x.dtype} {' '.join(filter(None, (x.label, x.sizes)))} {x.provider}"
        console.print(
            f"{head}: {', '.join(report.model_figures(x, found.environment))}", highlight=False, soft_wrap=True
        )
    if any(x.op != "decode" for x in lines):
        console.print(report.MFU, highlight=False)
    for text in report.paper(found):
        console.print(text, highlight=False)


def print_environment(facts: Environment, console: Console) -> None:
    """What the figures below belong to, in two lines."""
    clocks = ", ".join(f"{name} {mhz:,.0f} MHz" for name, mhz in facts.clocks.items()) or "not stated by the system"
    packages = ", ".join(f"{name} {version}" for name, version in facts.packages.items() if version)
    tree = "no version control" if facts.commit is None else f"commit {facts.commit[:12]}"
    console.print(
        f"{facts.device}, clock {clocks}; {facts.threads} threads (pinned: {facts.pinned}), "
        f"{facts.isa or 'no native library'}; {facts.allocator}",
        highlight=False,
        soft_wrap=True,
    )
    changes = ", with changes" if facts.dirty else ""
    console.print(f"{tree}{changes}; Python {facts.python}, {packages}", highlight=False, soft_wrap=True)


def run(
    ops: Sequence[str],
    *,
    device: str = "cpu",
    quick: bool = False,
    cases: Sequence[str] = (),
    providers: Sequence[str] = (),
    seconds: float | None = None,
    limit: float | None = None,
    versus: str | None = None,
    json_path: Path | None = None,
    commit: str | None = None,
    console: Console | None = None,
) -> Results:
    """Measures cases and prints them; `json_path` gets the results too, at the model level after every provider.

    Host memory is kept for all providers alike (`llama_fast.keep_host_memory`), so that a ratio is the kernels' alone.

    Args:
        ops: among `names`.
        device: "cpu" or "cuda".
        quick: one or two cases an op, without the providers that take long to start.
        cases: only those whose name contains one of these.
        providers: only these, and ours.
        seconds: for each provider and direction, about.
        limit: seconds after which the model level begins no other provider; its cases share them equally.
        versus: an older revision that takes turns with this tree, in place of the other providers.
        json_path: a result file to write.
        commit: of the tree, where it is under no version control.
        console: where to print.

    Raises:
        ValueError: there is no such case, provider, revision or device, or no time is given.
        OSError: `json_path` cannot be written; found out before anything is measured.
        KeyboardInterrupt: what was measured before it has been printed and stands in `json_path`.
    """
    console = console or Console()
    for name, value in (("seconds", seconds), ("limit", limit)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} = {value:g}: expected a number above 0")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no CUDA device; expected 'cpu' here")
    benchmarks = [b for b in collect([op for op in ops if op in OPS], quick) if _wanted(b.name, cases)]
    scenarios = [s for s in model.scenarios(device) if s.op in ops and _wanted(s.name, cases)]
    if not benchmarks and not scenarios:
        wanted = f" whose name contains {' or '.join(map(repr, cases))}" if cases else ""
        raise ValueError(f"{', '.join(ops)}: no benchmark has a case of them{wanted}; --list shows their names")
    others = _others(benchmarks, scenarios)
    for name in providers:
        if name not in others and not is_ours(name):
            raise ValueError(f"provider = {name!r}: expected one of {', '.join(others)}")
    if json_path is not None:
        json_path.touch()
    allocator = str(llama_fast.keep_host_memory())
    dtypes = dict.fromkeys(b.dtype for b in benchmarks if OPS[b.case.op].flops is not None)
    dtypes |= dict.fromkeys(s.dtype for s in scenarios)
    facts = harness.environment(allocator, device, commit=commit)
    print_environment(facts, console)
    interrupted = False
    if versus is not None:
        facts, limits, lines, interrupted = _compare(benchmarks, scenarios, versus, list(dtypes), facts, console)
        found = Results(results.FORMAT, facts, limits, tuple(lines))
    else:
        begin = time.perf_counter()
        limits = harness.measure_limits(dtypes, device)
        facts = dataclasses.replace(facts, clocks=harness.clocks(device))  # of a device that has just worked
        lines = []

        def keep(more: Sequence[Line]) -> Results:
            found = Results(results.FORMAT, facts, limits, tuple(results.against(x, limits) for x in [*lines, *more]))
            if json_path is not None:
                results.write(found, json_path)
            return found

        def picked(name: str) -> bool:
            return not providers or is_ours(name) or name in providers

        try:
            with console.status("") as status:
                for b in benchmarks:
                    status.update(b.name)
                    lines += harness.measure(b, seconds or (0.3 if quick else 1.0), _chooser(providers, quick))
                    keep(())
                for i, s in enumerate(scenarios):
                    status.update(s.name)
                    until = math.inf if limit is None else begin + limit * (i + 1) / len(scenarios)
                    lines += model.measure(s, seconds or 4.0, picked, until, keep)
            limits = results.better(
                limits, harness.measure_limits(dtypes, device)
            )  # others on the machine slow it down
        except KeyboardInterrupt:
            interrupted = True
        found = keep(())
        print_lines(found.lines, console)
        if quick and not providers and (slow := _slow(benchmarks)):
            console.print(f"left out of a quick run: {', '.join(slow)}", highlight=False)
        print_models(found, console)
    print_limits(limits, console)
    if json_path is not None:
        results.write(found, json_path)
    if interrupted:
        kept = f", and stand in {json_path}" if json_path is not None else ""
        console.print(f"interrupted: the {len(found.lines)} lines above were measured before{kept}", highlight=False)
        raise KeyboardInterrupt
    return found


def _others(benchmarks: Iterable[Benchmark], scenarios: Iterable[model.Scenario]) -> list[str]:
    """Every provider of these cases that is not ours."""
    names = [p.name for op in dict.fromkeys(b.case.op for b in benchmarks) for p in of(op, "cpu")]
    names += [name for op in dict.fromkeys(s.op for s in scenarios) for name in model.providers(op)]
    return [name for name in dict.fromkeys(names) if not is_ours(name)]


def _slow(benchmarks: Iterable[Benchmark]) -> list[str]:
    """The providers that a quick run leaves out; of one that it runs for another op, with the ops that go without."""
    found = [(op, p) for op in dict.fromkeys(b.case.op for b in benchmarks) for p in of(op, "cpu")]
    timed = {p.name for _, p in found if not p.slow}
    without = {p.name: [op for op, other in found if other.slow and other.name == p.name] for _, p in found if p.slow}
    return [f"{name} ({', '.join(ops)})" if name in timed else name for name, ops in without.items()]


def _wanted(name: str, cases: Sequence[str]) -> bool:
    return not cases or any(part in name for part in cases)


def _chooser(providers: Sequence[str], quick: bool) -> Callable[[Provider], bool]:
    if providers:
        return lambda p: p.ours or p.name in providers
    return lambda p: not (quick and p.slow)


def _compare(
    benchmarks: Sequence[Benchmark],
    scenarios: Sequence[model.Scenario],
    revision: str,
    dtypes: Sequence[torch.dtype],
    facts: Environment,
    console: Console,
) -> tuple[Environment, tuple[Limit, ...], list[Line], bool]:
    known = {b.name: b for b in benchmarks}
    others = {s.name: s for s in scenarios}

    def describe(name: str, direction: str) -> dict[str, Any]:
        return harness.facts(known[name], direction) if name in known else others[name].facts()

    pairs = [(n, d) for n in known for d in ("forward", "forward+backward")]
    pairs += [(n, s.facts()["direction"]) for n, s in others.items()]
    wanted = [harness.dtype_name(d) for d in dtypes]
    lines, limits, commit, interrupted = compare.compare(pairs, revision, describe, wanted, console)
    return dataclasses.replace(facts, against=commit), limits, lines, interrupted


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m benchmarks`; 1 where a result is wrong, 2 after bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"among {', '.join(names())}; default: all ops")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: block, training_step, lora_step, decode"
    )
    parser.add_argument("--quick", action="store_true", help="one or two cases an op, about a minute")
    parser.add_argument("--case", action="append", default=[], help="only cases whose name contains this; repeatable")
    parser.add_argument("--provider", action="append", default=[], help="only this one and ours; repeatable")
    parser.add_argument("--seconds", type=float, help="for each provider and direction, about")
    parser.add_argument("--limit", type=float, help="model level: seconds after which no other provider is begun")
    parser.add_argument("--vs", metavar="REVISION", help="take turns with this older revision, built for it")
    parser.add_argument("--json", type=Path, help="write a result file")
    parser.add_argument("--commit", help="of the tree, where it is under no version control")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    a = parser.parse_args(arguments)
    try:
        ops = chosen(a.ops, a.device)
    except ValueError as error:
        parser.error(str(error))
    if a.list:
        print("\n".join(case_names(ops, a.device)))
        return 0
    console = Console(width=max(WIDEST, Console().width))
    try:
        found = run(
            ops,
            device=a.device,
            quick=a.quick,
            cases=a.case,
            providers=a.provider,
            seconds=a.seconds,
            limit=a.limit,
            versus=a.vs,
            json_path=a.json,
            commit=a.commit,
            console=console,
        )
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 1 if any(x.status == "wrong" for x in found.lines) else 0
