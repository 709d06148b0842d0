"""Speed of the GPU kernels: `bench`, `tune` and `prove` of benchmarks.gpu."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import llama_fast as lf
from benchmarks import gpu_results, harness, results, suite
from benchmarks import providers as known
from benchmarks.gpu_cases import DTYPES, tiny_case
from benchmarks.gpu_run import (
    OURS,
    ROOT,
    Row,
    header,
    in_processes,
    output,
    worker_command,
    write,
)
from benchmarks.gpu_time import Clock, Time, forward_and_backward, leaves_of
from benchmarks.harness import Benchmark, first_line
from benchmarks.providers import Provider
from llama_fast.ops import proven
from llama_fast.ops.table import OPS

SLACK = 1.02  # a kernel of ours may take this much of the vendor's time and still count as not slower


torch._functorch.config.donated_buffer = False  # a backward is timed many times over one forward


# ---- speed ----------------------------------------------------------------------------------------------------------
def cases_of(op: str, tiny: bool) -> list[Benchmark]:
    """What is timed of an op; `tiny`: one small case, for a dry run."""
    return [Benchmark(tiny_case(op), torch.bfloat16, "tiny")] if tiny else suite.collect([op], device="cuda")


def providers(op: str, args: argparse.Namespace) -> list[Provider]:
    """Everybody who computes an op, of ours the backends that are asked for."""
    found = known.of(op, args.device, "aot_eager" if args.tiny else "inductor")
    return [p for p in found if not p.ours or p.name.partition(":")[2] in args.backends]


def command_bench(args: argparse.Namespace) -> int:
    """Times every case in a process of its own, which is started again without the provider that ended it."""
    begin = time.perf_counter()
    if args.workers > 1:
        in_processes(warm_units(args), args, args.limit / 3)
    cases = [(op, i) for op in args.ops for i in range(len(cases_of(op, args.tiny)[: args.cases]))]
    todo: list[Row] = [{"op": op, "case": i, "skip": []} for op, i in cases]
    todo += [{"op": op, "case": None, "skip": []} for op in args.ops]
    rows: list[Row] = []
    rates: Row = {}
    launches: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows0"
        while todo and time.perf_counter() - begin < args.limit:
            out.unlink(missing_ok=True)
            args.limit_left = begin + args.limit - time.perf_counter()
            (Path(folder) / "todo0").write_text(json.dumps(todo))
            command = worker_command(args, Path(folder), 0, "timer")
            process = subprocess.Popen(command, cwd=ROOT, stdout=2)
            try:
                status = process.wait(args.limit_left + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            events = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            todo = _take(events, todo, rows, rates, launches, f"ended the process (exit status {status})")
            if not events and status:
                break
            result = header(args) | {"rates": rates, "rows": rows, "launch_seconds": launches}
            _rate(rows, args, rates)
            write(args, result | {"seconds": time.perf_counter() - begin}, quiet=True)
    for item in todo:
        if item["case"] is not None:
            label = cases_of(item["op"], args.tiny)[item["case"]].label
            rows.append({"op": item["op"], "case": label, "problem": "no time left"})
    result = header(args) | {"rates": rates, "rows": rows, "launch_seconds": launches}
    write(args, result | {"seconds": time.perf_counter() - begin})
    if rates:
        path = output(args, result).with_suffix(".results.json")
        timed = [cases_of(op, args.tiny)[i] for op, i in cases]
        results.write(gpu_results.of(rows, timed, rates, args.device, result["device_class"], args.commit), path)
        print(f"for llama-fast report: {path}")
    return _print_bench(rows, rates, launches, time.perf_counter() - begin)


def _take(events: list[Row], todo: list[Row], rows: list[Row], rates: Row, launches: Row, fate: str) -> list[Row]:
    """Adds what a process reported; gives what is left to do, without the provider at which it ended."""
    started: Row | None = None
    for event in events:
        rows += [event["row"]] if "row" in event else []
        rates.update(event.get("rates", {}))
        launches.update(event.get("launches", {}))
        started = event.get("started", None if "done" in event else started)
        if "done" in event:
            todo = [item for item in todo if (item["op"], item["case"]) != tuple(event["done"])]
    if not todo or started is None:
        return todo
    op, case, provider = started["op"], started["case"], started["provider"]
    label = cases_of(op, started["tiny"])[case].label if case is not None else "launch cost"
    told = any(r["op"] == op and r["case"] == label and r.get("provider") == provider and "problem" in r for r in rows)
    if not told:
        rows.append({"op": op, "case": label, "provider": provider, "problem": fate})
    if provider == "all":  # while they were timed together: nobody in particular
        return [item for item in todo if (item["op"], item["case"]) != (op, case)]
    for item in todo:
        if (item["op"], item["case"]) == (op, case):
            item["skip"].append(provider)
    return todo


def command_timer(args: argparse.Namespace) -> int:
    """Process of `bench`: writes what it starts, rows and what is done, each a line; ends where the device fails."""
    begin, todo = time.perf_counter(), json.loads(Path(args.todo).read_text())
    clock = Clock(torch.device(args.device))
    with Path(args.out).open("a", buffering=1) as file, clock.current():

        def tell(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")

        matrix = {f"matmul {harness.dtype_name(d)}": clock.matrix_rate(d) for d in (torch.bfloat16, torch.float32)}
        tell(rates={"copy": clock.copy_rate(), **matrix})
        for n, item in enumerate(todo):
            left = begin + args.limit - time.perf_counter()
            if left < 0:
                return 0
            if item["case"] is None:
                launch_costs(clock, item, args, tell)
            else:
                bench_one(clock, item, args, min(left / (len(todo) - n), 8.0), tell)
            tell(done=[item["op"], item["case"]])
            if clock.gpu:
                torch.cuda.empty_cache()
    return 0


def warm_units(args: argparse.Namespace) -> list[Row]:
    """Each provider that compiles, on each case: several processes fill the caches of Triton and torch.compile."""
    compiling = (f"{results.OURS}:triton", "torch.compile", "liger")
    return [
        {"kind": "warm", "op": op, "case": index, "provider": name}
        for op in args.ops
        for index in range(len(cases_of(op, args.tiny)[: args.cases]))
        for name in compiling
        if any(p.name == name for p in providers(op, args))
    ]


def check_warm(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Runs a provider once. No rows: what fails will fail again where it is timed."""
    benchmark = cases_of(unit["op"], args.tiny)[unit["case"]]
    (provider,) = (p for p in providers(unit["op"], args) if p.name == unit["provider"])
    if provider.objection(benchmark.case, benchmark.dtype, args.device) is None:
        forward_and_backward(provider.call, _inputs(benchmark, args), benchmark.case.options)[2]()
    yield from ()


def _kept(call: Callable[..., Any], inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> int:
    """Bytes that a forward keeps for its backward, of inputs of its own: some libraries' kernels overwrite theirs."""
    leaves = leaves_of(inputs)
    outside = [x for name, x in leaves.items() if name in harness.PARAMETERS]
    return harness.kept_bytes(lambda: call(**leaves, **options), outside)


def bench_one(clock: Clock, item: Row, args: argparse.Namespace, seconds: float, tell: Callable[..., None]) -> None:
    """Tells the rows of one case: each provider's times, or why it has none."""
    benchmark = cases_of(item["op"], args.tiny)[item["case"]]
    case, inputs = benchmark.case, _inputs(benchmark, args)
    base = {"op": case.op, "case": benchmark.label, "dtype": harness.dtype_name(benchmark.dtype)}
    place = {"op": item["op"], "case": item["case"], "tiny": args.tiny}
    calls: dict[str, dict[str, Any]] = {"fwd": {}, "bwd": {}, "both": {}}
    memory: dict[tuple[str, str], Row] = {}
    expected: tuple[Tensor, ...] | None = None
    # what the others are compared with comes first: eager PyTorch, or the vendor's kernel
    order = sorted(providers(case.op, args), key=lambda p: {"eager": 0, "torch": 1}.get(p.name, 2))
    for p in (p for p in order if p.name not in item["skip"]):
        row = base | {"provider": p.name}
        objection = p.objection(case, benchmark.dtype, args.device)
        if objection is not None:
            tell(row=row | {"problem": objection[:300]})
            continue
        tell(started=place | {"provider": p.name})
        try:
            fwd, bwd, both = forward_and_backward(p.call, inputs, case.options)
            found = tuple(x.detach().clone() for x in both())
            clock.wait()
            if expected is None:
                expected = found
            wrong = disagreement(found, expected)
            if wrong:
                tell(row=row | {"problem": wrong})
                continue
            together = case.op in gpu_results.TOGETHER
            kept = _kept(p.call, inputs, case.options)
            timed = {"both": both} if together else {"fwd": fwd, "bwd": bwd}
            for direction, call in timed.items():
                memory[p.name, direction] = {"peak": clock.peak_bytes(call)}
                memory[p.name, direction] |= {"kept": None if direction == "fwd" else kept}
                calls[direction][p.name] = clock.prepare(call, graph=not together)
        except lf.NotSupported as error:
            tell(row=row | {"problem": str(error).splitlines()[-1].strip()[:200]})
        except Exception as error:
            tell(row=row | {"problem": first_line(error)})
            clock.wait()  # raises where the device is lost, and ends this process
    tell(started=place | {"provider": "all"})
    for direction, prepared in calls.items():
        if prepared:
            for name, t in clock.compare(prepared, seconds / 6).items():
                tell(row=base | {"provider": name, "direction": direction} | memory[name, direction] | _times(t))


def _times(t: Time) -> Row:
    return {"seconds": t.median, "low": t.low, "high": t.high, "runs": t.runs, "no_graph": t.no_graph}


def _inputs(benchmark: Benchmark, args: argparse.Namespace) -> dict[str, Tensor]:
    """As Case.inputs, made on the device: a billion random numbers take seconds on a processor."""
    case, dtype, device = benchmark.case, benchmark.dtype, args.device
    if device == "cpu":
        return case.inputs(dtype)
    made: dict[str, Tensor] = {}
    torch.manual_seed(0)
    for name, pattern in OPS[case.op].public.items():
        shape = case._shape(pattern)
        if shape is None:
            continue
        if name == "targets":
            made[name] = torch.randint(case.dims["V"], shape, device=device)
        elif name in ("cos", "sin"):
            angle = torch.arange(shape[-2], device=device).unsqueeze(1) * 1e4 ** (
                -torch.arange(shape[-1], device=device) / shape[-1]
            )
            made[name] = getattr(angle, name)().float().expand(shape).contiguous()
        else:
            scale = case.dims["C"] ** -0.5 if case.op == "linear_cross_entropy" and name == "weight" else 1.0
            made[name] = (torch.randn(shape, device=device, dtype=dtype) * scale).to(dtype)
    return made


def disagreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """Why two providers' gradients are not the same up to rounding, or nothing."""
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        gap, size = (a.float() - b.float()).norm().item(), b.float().norm().item()
        if not gap <= 0.02 * size + 1e-6:
            return f"gradient {i} is {gap / max(size, 1e-30):.3g} of its size away from the first provider's"
    return ""


def launch_costs(clock: Clock, item: Row, args: argparse.Namespace, tell: Callable[..., None]) -> None:
    """Tells the processor's time of one eager forward call on small tensors, of each provider of an op."""
    op, case = item["op"], tiny_case(item["op"])
    inputs = case.inputs(torch.bfloat16, args.device)
    for p in providers(op, args):
        if p.objection(case, torch.bfloat16, args.device) or p.name.startswith("sdpa") or p.name in item["skip"]:
            continue
        tell(started={"op": op, "case": None, "provider": p.name, "tiny": args.tiny})
        try:
            fwd, _, _ = forward_and_backward(p.call, inputs, {})
            tell(launches={f"{op} {p.name}": clock.launch_cost(fwd, 100 if clock.gpu else 1)})
        except Exception:  # its reason stands in the rows already
            clock.wait()


def _rate(rows: list[Row], args: argparse.Namespace, rates: Row) -> None:
    """Adds what a row's time means: bytes or operations a second, and the share of the device's."""
    cases = {(op, b.label): b for op in args.ops for b in cases_of(op, args.tiny)}
    for row in (r for r in rows if "seconds" in r):
        work = harness.facts(cases[row["op"], row["case"]], gpu_results.DIRECTIONS[row["direction"]])
        if work["flops"]:
            row["tflops"] = work["flops"] / row["seconds"] / 1e12
            row["share"] = work["flops"] / row["seconds"] / rates[f"matmul {row['dtype']}"]
        else:
            row["gbytes"] = work["bytes"] / row["seconds"] / 1e9
            row["share"] = work["bytes"] / row["seconds"] / rates["copy"]


def _print_bench(rows: list[Row], rates: Row, launches: Row, seconds: float) -> int:
    if rates:
        products = (f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items() if name != "copy")
        print(f"copy {rates['copy'] / 1e9:.0f} GB/s, {', '.join(products)}")
    print(
        "median ms, share of the copy rate (attention and linear_cross_entropy: TFLOP/s; its peak memory); *: no graph"
    )
    lines: dict[str, list[str]] = {}
    for r in (r for r in rows if "seconds" in r):
        dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[r["dtype"]]
        rate = f"{r['tflops']:.0f}" if "tflops" in r else f"{r['share']:.0%}"
        peak = f" {r['peak'] / 2**30:.2f}GiB" if r["op"] in gpu_results.TOGETHER and r["peak"] else ""
        name = r["provider"].removeprefix(results.OURS + ":") + "*" * bool(r["no_graph"])
        text = f"{name} {r['seconds'] * 1e3:.4f} {rate}{peak}"
        lines.setdefault(f"{r['op']} {r['case']} {dtype} {r['direction']}", []).append(text)
    for name, texts in lines.items():
        print(f"{name}: " + " | ".join(texts))
    for reason in dict.fromkeys(r["no_graph"] for r in rows if r.get("no_graph")):
        names = dict.fromkeys(f"{r['op']} {r['provider']}" for r in rows if r.get("no_graph") == reason)
        print(f"*: {reason}: {', '.join(names)}"[:400])
    absent: dict[str, dict[str, set[str]]] = {}  # who and why -> op -> cases
    for r in (r for r in rows if "seconds" not in r):
        why = f"{r.get('provider', '')}: {r['problem']}"[:180]
        absent.setdefault(why, {}).setdefault(r["op"], set()).add(r["case"])
    for why, ops in list(absent.items())[:40]:
        every = {op: {r["case"] for r in rows if r["op"] == op} for op in ops}
        where = [op if cases == every[op] else f"{op} {', '.join(sorted(cases))}" for op, cases in ops.items()]
        print(f"none: {why} ({'; '.join(where)})"[:260])
    costs = (f"{name.replace(results.OURS + ':', '')} {s * 1e6:.0f}" for name, s in launches.items())
    print("launch, us: " + ", ".join(costs))
    print(f"{len(rows)} rows, {seconds:.0f} s")
    return 0 if any("seconds" in r for r in rows) else 1


# ---- launch parameters ----------------------------------------------------------------------------------------------
def command_tune(args: argparse.Namespace) -> int:
    """Times each candidate of each Triton kernel that a case launches, on the cases of `bench`."""
    launch: Any = importlib.import_module("llama_fast.kernels.launch")
    clock, begin = Clock(torch.device(args.device)), time.perf_counter()
    rows: list[Row] = []
    if args.workers > 1:
        in_processes(tune_units(args), args, args.limit / 2)
    for op, index in _tuned(args):
        benchmark = cases_of(op, args.tiny)[index]
        with clock.current():
            both = _triton_run(benchmark, args)
            with launch.record() as choices:
                both()
            for kernel, (heuristic, candidates) in choices.items():
                rows += _tune_kernel(clock, benchmark, kernel, [heuristic, *candidates], both, args, begin)
    write(args, header(args) | {"rows": rows})
    for r in rows:
        print(f"{r['op'][:13]:13} {r['case']:17} {r['kernel']:18} {r['seconds'] * 1e3:9.4f} ms  {r['parameters']}")
    print(f"{len(rows)} rows, {time.perf_counter() - begin:.0f} s; times are of forward and backward together")
    return 0 if rows else 1


def _tuned(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(op, case) of what has a Triton kernel."""
    ops = [op for op in args.ops if any(b.name == "triton" for b in OPS[op].backends)]
    return [(op, i) for op in ops for i in range(len(cases_of(op, args.tiny)[: args.cases]))]


def _triton_run(benchmark: Benchmark, args: argparse.Namespace) -> Any:
    case = benchmark.case
    (ours,) = (p for p in known.of(case.op, args.device) if p.name == f"{results.OURS}:triton")
    return forward_and_backward(ours.call, _inputs(benchmark, args), case.options)[2]


def tune_units(args: argparse.Namespace) -> list[Row]:
    """The candidates of each case in four parts: several processes fill Triton's cache."""
    return [{"kind": "candidates", "op": op, "case": i, "part": n} for op, i in _tuned(args) for n in range(4)]


def check_candidates(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Runs every fourth candidate of each kernel once. No rows, as `check_warm`."""
    launch: Any = importlib.import_module("llama_fast.kernels.launch")
    both = _triton_run(cases_of(unit["op"], args.tiny)[unit["case"]], args)
    with launch.record() as choices:
        both()
    for kernel, (_, candidates) in choices.items():
        for parameters in candidates[unit["part"] :: 4]:
            with launch.force(kernel, parameters), contextlib.suppress(Exception):
                both()
    yield from ()


def _tune_kernel(
    clock: Clock,
    benchmark: Benchmark,
    kernel: str,
    candidates: list[Any],
    both: Any,
    args: argparse.Namespace,
    begin: float,
) -> list[Row]:
    """The best six of the candidates, the first of which is the heuristic, and the heuristic itself."""
    launch: Any = importlib.import_module("llama_fast.kernels.launch")
    prepared: dict[str, Any] = {}
    for parameters in dict.fromkeys(candidates):
        if time.perf_counter() - begin > args.limit:
            break
        try:
            with launch.force(kernel, parameters):
                prepared[str(parameters)] = clock.prepare(both)
        except Exception as error:  # too many registers or too much shared memory
            print(f"{kernel} {parameters}: {first_line(error)}"[:200])
    times = clock.compare(prepared, 1.0) if prepared else {}
    heuristic, rows = str(candidates[0]), []
    for n, (name, t) in enumerate(sorted(times.items(), key=lambda item: item[1].median)):
        if n < 6 or name == heuristic:
            mark = " (heuristic)" if name == heuristic else ""
            row = {"op": benchmark.case.op, "case": benchmark.label, "kernel": kernel, "parameters": name + mark}
            rows.append(row | _times(t))
    return rows


# ---- proof ----------------------------------------------------------------------------------------------------------
def proof(test: Row, bench: Row) -> dict[str, dict[str, list[str]]]:
    """{backend: {primitive: [dtype class]}} of one device: all checks run and green, never slower than the vendor's.

    The vendor is the backend `torch` where the op has one, else eager PyTorch.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for op in OPS:
        for kind in ("half", "float32"):
            named = [name for name, dtype in DTYPES.items() if proven.dtype_class(dtype) == kind]
            unseen = any(u["op"] == op and u.get("dtype", named[0]) in named for u in test["not_run"])
            right = [] if unseen else [b for b in OURS if _all_green(test["rows"], op, b, named)]
            for direction in ("fwd", "bwd"):
                for backend in _not_slower(bench["rows"], op, direction, named, right):
                    found.setdefault(backend, {}).setdefault(f"{op}_{direction}", []).append(kind)
    return found


def _all_green(rows: list[Row], op: str, backend: str, dtypes: list[str]) -> bool:
    # a check that ended its process has no dtype, and speaks for all
    mine = [r for r in rows if r["op"] == op and r["backend"] in (backend, "all")]
    mine = [r for r in mine if r.get("dtype", dtypes[0]) in dtypes]
    mine = [r for r in mine if "objection" not in r]
    return len(mine) > 0 and not any(r.get("problem") for r in mine)


def _not_slower(rows: list[Row], op: str, direction: str, dtypes: list[str], right: list[str]) -> list[str]:
    vendor = "torch" if any(b.name == "torch" for b in OPS[op].backends) else "eager"
    ratios: dict[str, list[float]] = {b: [] for b in right}
    for label in dict.fromkeys(r["case"] for r in rows if r["op"] == op and r.get("dtype") in dtypes):
        times = {
            r["provider"]: r["seconds"]
            for r in rows
            if r["op"] == op and r["case"] == label and r.get("direction") in (direction, "both")
        }
        for b in right:
            theirs = times.get(vendor, times.get("eager"))
            mine = times.get(f"{results.OURS}:{b}")
            ratios[b].append(mine / theirs if mine and theirs else float("inf"))
    return [b for b, r in ratios.items() if r and max(r) <= SLACK]


def command_prove(args: argparse.Namespace) -> int:
    files = [json.loads(Path(f).read_text()) for f in args.files]
    tests, benches = ([r for r in files if r["command"] == command] for command in ("test", "bench"))
    classes = {r["device_class"] for r in files}
    if not tests or not benches or len(tests) + len(benches) != len(files) or len(classes) > 1:
        raise SystemExit(f"expected results of test and of bench, of one device; found those of {classes}")
    test = {"not_run": _of_last(tests, "not_run"), "device_class": files[0]["device_class"]}
    test["rows"] = _of_last(tests, "rows")
    file = Path(args.out or proven.FILE)
    listed = json.loads(file.read_text()) if file.exists() else {}
    listed[test["device_class"]] = proof(test, {"rows": _of_last(benches, "rows")})
    file.write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n")
    print(json.dumps(listed[test["device_class"]], indent=2))
    return 0


def _of_last(files: list[Row], what: str) -> list[Row]:
    """Rows of each op from the last file that ran it."""
    last = {op: i for i, file in enumerate(files) for op in file["ops"]}
    return [r for i, file in enumerate(files) for r in file[what] if last[r["op"]] == i]
