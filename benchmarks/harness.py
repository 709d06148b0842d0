"""Measures the cases of the benchmark files: every provider that can run them, interleaved run by run.

The results of each provider are judged first, forward and backward, against float64: a provider whose results are wrong
shows no speed. Each figure stands beside the machine's limit, measured in the same process. Lines go to result files
(results.py). The GPU's clock, caches and events are the business of gpu.py; here everything runs on the CPU.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama_fast
from llama_fast.ops import eager, native, reference
from llama_fast.ops.table import OPS
from llama_fast.verify import BACKWARD_FACTOR, FORWARD_FACTOR, Case, judge

from . import results
from .providers import Provider, of, sizes
from .results import COPY, Error, Limit, Line, Seconds

PEER_SLACK = 4.0  # others did not promise our error budget; beyond this many times it they compute something else
CHECKED_BYTES = 1 << 30  # of float64 attention weights; beyond, some of the heads are checked


@dataclass(frozen=True)
class Benchmark:
    """A case of an op at a size that people use.

    Args:
        case: sizes and options.
        dtype: of the inputs.
        label: the preset whose shape it is, and what it is of it.
        quick: part of `llama-fast bench --quick`.
        device: where it is measured: "cpu", or "cuda" by `python -m benchmarks.gpu bench`.
    """

    case: Case
    dtype: torch.dtype
    label: str
    quick: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.case.op} {dtype_name(self.dtype)} {self.case}"


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, up to 300 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# ---- time -----------------------------------------------------------------------------------------------------------
def pin_threads() -> None:
    """Starts this program again with its OpenMP threads bound to cores, unless OMP_PROC_BIND says already what to do.

    OpenMP reads it when it is loaded, with torch, so it cannot be set later.
    """
    if "OMP_PROC_BIND" not in os.environ:
        settings = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "KINETO_LOG_LEVEL": "99"}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})


def waiter(device: str) -> Callable[[], None]:
    """A function that waits until the device has done what it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def interleave(
    runs: Mapping[str, Callable[[], Any]], seconds: float = 1.0, least: int = 5, wait: Callable[[], None] = lambda: None
) -> dict[str, Seconds]:
    """Times functions in turn, run by run, for about `seconds` each, after two runs to warm up.

    `wait` is called after each run, see `waiter`.
    """
    first = {}
    for name, run in runs.items():
        run()
        wait()
        start = time.perf_counter()
        run()
        wait()
        first[name] = time.perf_counter() - start
    count = max(least, min(200, math.ceil(seconds * len(first) / max(sum(first.values()), 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait()
            samples[name].append(time.perf_counter() - start)
    return {name: results.summary(s) for name, s in samples.items()}


def copy_bandwidth(device: str = "cpu") -> Limit:
    """Bytes a second that a copy reads and writes, by torch's own copy of a tensor too large for the caches."""
    megabytes = 256 if device == "cpu" else 2048
    source = torch.rand(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, seconds=0.3, wait=waiter(device))["copy"]
    return Limit(COPY, "byte/s", 2 * source.nbytes / timing.median, f"Tensor.copy_ of {megabytes} MB")


def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> Limit:
    """FLOP/s of the fastest matrix product that torch offers in `dtype`, of random numbers: zeros draw less power."""
    from llama_fast.ops.linear import linear

    n = 2048 if device == "cpu" else 8192
    x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timing = interleave({"matmul": lambda: linear(x, w)}, seconds=0.5, wait=waiter(device))["matmul"]
    how = f"{n} x {n} x {n}, the faster library" if device == "cpu" else f"{n} x {n} x {n}"
    return Limit(f"matmul {dtype_name(dtype)}", "flop/s", 2 * n**3 / timing.median, how)


def measure_limits(dtypes: Iterable[torch.dtype], device: str = "cpu") -> tuple[Limit, ...]:
    """What the machine does at best, now: a copy, and the matrix product of each dtype."""
    return (copy_bandwidth(device), *(matrix_rate(d, device) for d in dtypes))


# ---- memory ---------------------------------------------------------------------------------------------------------
def allocations(run: Callable[[], Any], device: str = "cpu") -> tuple[int, int, Any]:
    """(bytes at the peak, bytes held at the end, what `run` gave) of torch's allocator, counted from zero.

    Scratch that a kernel takes past torch's allocator is not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    now = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now, result


def kept_bytes(forward: Callable[[], Any], outside: Sequence[Tensor]) -> int:
    """Bytes held between forward and backward, each storage once; `outside`: parameters and tables, not counted."""
    aside = {p.untyped_storage().data_ptr() for p in outside}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in aside)


# ---- is it right? ---------------------------------------------------------------------------------------------------
PARAMETERS = ("weight", "cos", "sin", "targets", "cu_seqlens")  # inputs that are no activations
Call = Callable[[], tuple[Tensor, ...]]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass
class Work:
    """The inputs of a benchmark, the gradients that come in, and the functions to time."""

    benchmark: Benchmark
    leaves: dict[str, Tensor]
    douts: list[Tensor]

    @classmethod
    def of(cls, benchmark: Benchmark) -> Work:
        case = benchmark.case
        leaves = {
            n: x.requires_grad_() if x.is_floating_point() and n not in ("cos", "sin") else x
            for n, x in case.inputs(benchmark.dtype).items()
        }
        with torch.device("meta"):
            shapes = _outputs(getattr(eager, case.op)(**{n: x.to("meta") for n, x in leaves.items()}, **case.options))
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x.dtype) for x in shapes]
        return cls(benchmark, leaves, douts)

    @property
    def wanted(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.leaves.items() if x.requires_grad}

    def forward(self, f: Callable[..., Any]) -> Call:
        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return _outputs(f(**self.leaves, **self.benchmark.case.options))

        return call

    def recorded(self, f: Callable[..., Any]) -> Call:
        return lambda: _outputs(f(**self.leaves, **self.benchmark.case.options))

    def both(self, f: Callable[..., Any]) -> Call:
        wanted = list(self.wanted.values())
        return lambda: torch.autograd.grad(self.recorded(f)(), wanted, self.douts)

    def everything(self, f: Callable[..., Any]) -> dict[str, Tensor]:
        """Results and gradients by name."""
        outs = self.recorded(f)()
        gradients = torch.autograd.grad(outs, list(self.wanted.values()), self.douts)
        found = {f"out{i}" if len(outs) > 1 else "out": out.detach() for i, out in enumerate(outs)}
        return found | {f"d{n}": g for n, g in zip(self.wanted, gradients, strict=True)}


class Judge:
    """Holds the float64 results of a benchmark and eager PyTorch's, and judges providers by them.

    Heads do not depend on each other: where all of them in float64 would be too large, the first ones are checked.
    """

    def __init__(self, work: Work) -> None:
        case, dims = work.benchmark.case, work.benchmark.case.dims
        self.heads: dict[str, int] = {}
        leaves, douts = dict(work.leaves), work.douts
        if case.op == "attention" and "B" in dims:
            group = dims["H"] // dims["G"]
            each = 8 * dims["B"] * dims["T"] * dims["S"] * group
            kept = max(1, min(dims["G"], CHECKED_BYTES // each))
            self.heads = {"q": kept * group, "out": kept * group, "k": kept, "v": kept}
            leaves = {n: x[:, :, : self.heads[n]].detach().requires_grad_() for n, x in leaves.items()}
            douts = [d[:, :, : kept * group] for d in douts]
        part = Work(work.benchmark, leaves, douts)
        wide = Work(
            work.benchmark,
            {n: x.detach().double().requires_grad_() if x.requires_grad else x for n, x in leaves.items()},
            [d.double() for d in douts],
        )
        self.truth = wide.everything(getattr(reference, case.op))
        self.eager = part.everything(getattr(eager, case.op))

    def __call__(self, found: Mapping[str, Tensor], ours: bool) -> tuple[Error, str]:
        """(the tensor furthest along its budget, what is wrong or "")."""
        worst, problem = Error("", 0.0, 0.0), ""
        slack = 1.0 if ours else PEER_SLACK
        for name, exact in self.truth.items():
            value = found[name]
            if self.heads:
                value = value[:, :, : self.heads[name.removeprefix("d")]]
            factor = slack * (BACKWARD_FACTOR if name.startswith("d") else FORWARD_FACTOR)
            error, _, budget, text = judge(value, self.eager[name], exact, factor, value.dtype)
            if worst.tensor == "" or error * worst.budget > worst.value * budget:
                worst = Error(name, error, budget)
            problem = problem or (f"{name}: {text}" if text else "")
        return worst, problem


# ---- lines ----------------------------------------------------------------------------------------------------------
def case_of(case: Case) -> dict[str, results.Value]:
    """A case as result files hold it."""
    extras: dict[str, results.Value] = {"scale": case.scale} if case.scale != 1.0 else {}
    return {**sizes(case), **case.options, **extras}


def measure(
    benchmark: Benchmark, seconds: float = 1.0, choose: Callable[[Provider], bool] = lambda provider: True
) -> list[Line]:
    """The lines of a benchmark, forward, and forward with backward, of every provider chosen; see `results.against`."""
    case = benchmark.case
    torch.compiler.reset()  # past a number of shapes torch.compile would run eager PyTorch and not say so
    work = Work.of(benchmark)
    refused: dict[str, tuple[str, str]] = {}  # provider -> status, reason
    errors: dict[str, Error] = {}
    runs: dict[str, Provider] = {}
    providers = [p for p in of(case.op, "cpu") if choose(p)]
    judged = None
    for p in providers:
        reason = p.objection(case, benchmark.dtype, "cpu")
        if reason is not None:
            refused[p.name] = ("not run", reason)
            continue
        judged = judged or Judge(work)
        try:
            errors[p.name], problem = judged(work.everything(p.call), p.ours)
        except Exception as error:  # another library's failure, whatever it is, must not end the run
            refused[p.name] = ("not run", first_line(error))
            continue
        if problem:
            refused[p.name] = ("wrong", problem)
        else:
            runs[p.name] = p
    del judged
    lines = []
    for direction, make in (("forward", work.forward), ("forward+backward", work.both)):
        timings = interleave({n: make(p.call) for n, p in runs.items()}, seconds) if runs else {}
        for p in providers:
            line = {**facts(benchmark, direction), "provider": p.name, "error": errors.get(p.name)}
            line |= {
                "limit": None,
                "share": None,
                "seconds": timings.get(p.name),
                "peak_bytes": None,
                "kept_bytes": None,
            }
            line["status"], line["reason"] = refused.get(p.name, ("measured", ""))
            if p.name in timings:
                line["peak_bytes"] = allocations(make(p.call))[0]
                line["kept_bytes"] = _kept(work, p) if direction != "forward" else None
            lines.append(Line(**line))
    return lines


def facts(benchmark: Benchmark, direction: str) -> dict[str, Any]:
    """The fields of a result line that are the same for all providers."""
    case, op = benchmark.case, OPS[benchmark.case.op]
    moved = op.traffic(sizes(case), benchmark.dtype.itemsize)
    flops = op.flops(sizes(case), case.options) if op.flops else (0, 0)
    parts = {"forward": (0,), "backward": (1,)}.get(direction, (0, 1))
    by_name = f"llama-fast bench --op {case.op} --case '{benchmark.name}'"
    return {
        "op": case.op,
        "label": benchmark.label,
        "case": case_of(case),
        "dtype": dtype_name(benchmark.dtype),
        "direction": direction,
        "bytes": sum(moved[i] for i in parts),
        "flops": sum(flops[i] for i in parts),
        "tokens": None,
        "command": by_name if benchmark.device == "cpu" else f"python -m benchmarks.gpu bench --ops {case.op}",
    }


def _kept(work: Work, p: Provider) -> int:
    return kept_bytes(work.recorded(p.call), [x for n, x in work.leaves.items() if n in PARAMETERS])


def ours_of(lines: Iterable[Line]) -> Line | None:
    """The measured line of ours that stands first, of one case and direction."""
    return next((x for x in lines if results.is_ours(x.provider) and x.seconds is not None), None)


def clocks(device: str = "cpu") -> dict[str, float]:
    """The device's clocks in MHz now, as far as the machine states them."""
    return results.gpu_state()[0] if device == "cuda" else results.cpu_clocks()


def environment(allocator: str, device: str = "cpu", **changes: Any) -> results.Environment:
    """The environment of results in this process, see `results.environment`."""
    arguments: dict[str, Any] = {
        "root": Path(llama_fast.__file__).parents[1],
        "kind": device,
        "device": results.cpu_name(),
        "memory": results.cpu_memory(),
        "clocks": clocks(device),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "isa": native.isa() if native.unavailable() is None else "",
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        arguments |= {"device": found.name, "memory": found.total_memory, "driver": results.gpu_state()[1]}
        arguments["notes"] = {"host": results.cpu_name(), "CUDA": str(torch.version.cuda)}
    notes = {**arguments.pop("notes", {}), **changes.pop("notes", {})}
    return results.environment(**arguments | changes, notes=notes)
