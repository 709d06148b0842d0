"""Timing on a GPU: CUDA events around replayed graphs, a cold L2, everything that is compared interleaved.

On a CPU the same functions time with the processor's clock and no graphs, so that a dry run takes the same way.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import first_line

Call = Callable[[], Any]
_FLUSH_BYTES = 256 << 20  # written before each run: several times the L2 of any GPU


@dataclass(frozen=True)
class Time:
    """Of one function, in seconds: median, 20th and 80th percentile of `runs`.

    `no_graph` says why launches are counted; "": a graph was replayed, so they are not.
    """

    median: float
    low: float
    high: float
    runs: int
    no_graph: str


@dataclass
class Prepared:
    """A function ready to be timed: `run` is its call, for the reason `no_graph`, or the replay of its graph.

    A graph reads the memory that its capture read: `call` holds the tensors that the function uses, `kept` its results.
    """

    run: Call
    no_graph: str
    call: Call
    kept: Any = None


class Clock:
    """Times functions on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        # autograd runs a backward on its forward's stream: what is captured must have its forward on this one too
        self.stream = torch.cuda.Stream(device) if self.gpu else None
        self._flush = torch.empty(_FLUSH_BYTES if self.gpu else 1024, dtype=torch.int8, device=device)

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """The stream on which everything must be made, captured and timed."""
        self.wait()
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def prepare(self, call: Call, graph: bool = True) -> Prepared:
        """Warms a function up and, on a GPU, captures it; where it cannot be captured it is called.

        `graph=False` is for calls of milliseconds, whose launches are hidden: a graph would hold their memory.
        """
        for _ in range(3 if self.gpu else 1):
            call()
        self.wait()
        if not (self.gpu and graph):
            return Prepared(call, "too long to need one" if self.gpu else "no GPU", call)
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=self.stream):
                kept = call()
            captured.replay()
            self.wait()  # what fails is this function and not the next
        except Exception as error:  # a host synchronisation inside: the call is timed as it is
            self.wait()
            # the allocator goes on asking a graph whose capture was broken off: it is kept
            return Prepared(call, history(error), call, captured)
        return Prepared(captured.replay, "", call, kept)

    def once(self, run: Call) -> float:
        """Seconds of one run from a cold L2."""
        self._flush.zero_()
        if not self.gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1000

    def compare(self, prepared: Mapping[str, Prepared], seconds: float) -> dict[str, Time]:
        """Runs all in turn, 5 to 60 rounds within about `seconds`."""
        found: dict[str, list[float]] = {name: [] for name in prepared}
        begin, rounds = time.perf_counter(), 0
        while rounds < 5 or (rounds < 60 and time.perf_counter() - begin < seconds):
            for name, p in prepared.items():
                found[name].append(self.once(p.run))
            rounds += 1
        return {name: _summary(times, prepared[name].no_graph) for name, times in found.items()}

    def launch_cost(self, call: Call, calls: int = 100) -> float:
        """Seconds of the processor for one call, whose kernels must be shorter than that."""
        for _ in range(5):
            call()
        best = float("inf")
        for _ in range(3):
            self.wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            best = min(best, (time.perf_counter() - begin) / calls)
        self.wait()
        return best

    def peak_bytes(self, call: Call) -> int:
        """The most memory that a call holds beyond what is held before it; 0 on a CPU."""
        if not self.gpu:
            call()
            return 0
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_rate(self) -> float:
        """Bytes read and written a second by torch's copy of a tensor past every cache."""
        x = torch.empty((1 << 30) if self.gpu else (1 << 20), dtype=torch.int8, device=self.device)
        y = torch.empty_like(x)
        # no graph: its copy node moved 2.8 TB/s on an H200, the call 4.2
        times = self.compare({"copy": self.prepare(lambda: y.copy_(x), graph=False)}, 0.3)
        return 2 * x.nbytes / times["copy"].median

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of torch's product, of float32 as it is set: without TF32."""
        n = (8192 if dtype != torch.float32 else 4096) if self.gpu else 64
        a, b = (torch.randn(n, n, dtype=dtype, device=self.device) for _ in range(2))
        times = self.compare({"mm": self.prepare(lambda: a @ b)}, 0.3)
        return 2 * n**3 / times["mm"].median


def _summary(times: list[float], no_graph: str) -> Time:
    ordered = sorted(times)
    fifth = len(ordered) // 5
    return Time(statistics.median(ordered), ordered[fifth], ordered[-1 - fifth], len(ordered), no_graph)


def history(error: BaseException) -> str:
    """First lines of an exception and of those before it: the end of a capture raises over what broke it."""
    found: list[str] = []
    link: BaseException | None = error
    while link is not None and len(found) < 3:
        found.append(first_line(link))
        link = link.__context__
    return " after ".join(found)


def leaves_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of inputs that ask for a gradient where an activation or weight does."""
    return {
        name: x.clone().requires_grad_(x.is_floating_point() and name not in ("cos", "sin"))
        for name, x in inputs.items()
    }


def forward_and_backward(
    function: Callable[..., Any], inputs: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[Call, Call, Call]:
    """Of a differentiable function three calls: forward, backward of a forward made now, and the two together.

    Each can be captured in a CUDA graph: inputs and incoming gradients are made here. They belong to these calls alone,
    because some libraries' kernels overwrite them (docs/gpu.md): only the first of `backward` and `both` is then right.
    """
    leaves = leaves_of(inputs)
    wanted = [x for x in leaves.values() if x.requires_grad]

    def forward() -> Any:
        return function(**leaves, **options)

    kept = forward()
    outputs = kept if isinstance(kept, tuple) else (kept,)
    generator = torch.Generator(outputs[0].device).manual_seed(0)  # the same for all that are compared
    gradients = [
        torch.randn(o.shape, generator=generator, device=o.device, dtype=o.dtype) if o.ndim else torch.ones_like(o)
        for o in outputs
    ]

    def backward() -> Any:
        return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(forward(), wanted, gradients)

    return forward, backward, both
