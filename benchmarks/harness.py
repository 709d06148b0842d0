"""Measures the cases of the benchmark files: ours and its peers, interleaved run by run, medians and ratios.

Every figure stands beside the machine's limit, measured in the same process: copy bandwidth for a memory-bound op, the
vendor's matrix product for the others. A case whose results are wrong shows no speed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llama_fast
from llama_fast.ops import eager
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

Provider = Callable[..., Any]


@dataclass(frozen=True)
class Benchmark:
    """A case of an op at a size that people use.

    Args:
        case: sizes and options.
        dtype: of the inputs.
        quick: part of `llama-fast bench --quick`.
        peers: name -> function with the public function's arguments, besides eager PyTorch.
    """

    case: Case
    dtype: torch.dtype
    quick: bool = False
    peers: Mapping[str, Provider] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.case.op} {str(self.dtype).removeprefix('torch.')} {self.case}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one provider: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Measurement:
    """One pass of one benchmark: each provider's time, and the work that the pass must do.

    `traffic` in bytes and `flops` are the least that the op needs; flops is 0 for a memory-bound op.
    """

    benchmark: Benchmark
    direction: str  # "forward" or "forward+backward"
    timings: Mapping[str, Timing]
    traffic: int
    flops: int

    def rate(self, provider: str) -> float:
        """FLOP/s, or bytes/s where the op is memory-bound."""
        return (self.flops or self.traffic) / self.timings[provider].median

    def ratio(self, peer: str = "eager", ours: str = "llama_fast") -> float:
        """How many times faster ours is than the peer."""
        return self.timings[peer].median / self.timings[ours].median


def interleave(providers: Mapping[str, Callable[[], Any]], seconds: float = 1.0, least: int = 5) -> dict[str, Timing]:
    """Times the providers in turn, run by run, for about `seconds` each, after two runs to warm up."""
    first = {}
    for name, run in providers.items():
        run()
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
    runs = max(least, min(200, math.ceil(seconds * len(first) / max(sum(first.values()), 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(runs):
        for name, run in providers.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: _timing(s) for name, s in samples.items()}


def _timing(samples: Sequence[float]) -> Timing:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3])


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second that a copy reads and writes, by torch's own copy of a tensor too large for the caches."""
    source = torch.ones(megabytes << 18, dtype=torch.float32)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"]
    return 2 * source.nbytes / timing.median


def matrix_rate(dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of the fastest matrix product that torch offers in `dtype`."""
    from llama_fast.ops.linear import linear

    x, w = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / interleave({"matmul": lambda: linear(x, w)}, seconds=0.5)["matmul"].median


def _sizes(case: Case) -> dict[str, int]:
    dims = dict(case.dims)
    if "..." in dims:
        dims["R"] = math.prod(dims.pop("..."))
    return dims


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _disagreement(ours: Any, theirs: Any, dtype: torch.dtype) -> float:
    """Largest difference in units of the dtype's precision and of the largest value."""
    worst = 0.0
    for a, b in zip(_outputs(ours), _outputs(theirs), strict=True):
        scale = b.abs().max().item() * torch.finfo(dtype).eps
        worst = max(worst, (a.double() - b.double()).abs().max().item() / max(scale, 1e-30))
    return worst


def run(benchmark: Benchmark, seconds: float = 1.0) -> list[Measurement]:
    """Measures a benchmark forward, and forward with backward.

    Raises:
        RuntimeError: ours and eager PyTorch disagree by more than rounding explains; no speed is given then.
    """
    case, op = benchmark.case, OPS[benchmark.case.op]
    inputs = case.inputs(benchmark.dtype)
    providers: dict[str, Provider] = {
        "llama_fast": getattr(llama_fast, case.op),
        "eager": getattr(eager, case.op),
        **benchmark.peers,
    }
    with torch.no_grad():
        results = {name: f(**inputs, **case.options) for name, f in providers.items()}
        gap = _disagreement(results["llama_fast"], results["eager"], benchmark.dtype)
    if not gap <= 32:
        raise RuntimeError(f"{benchmark.name}: results differ from eager PyTorch's by {gap:.3g} units of precision")
    douts = [torch.randn(out.shape).to(out.dtype) for out in _outputs(results["eager"])]
    del results

    leaves = {
        n: x.requires_grad_() if x.is_floating_point() and n not in ("cos", "sin") else x for n, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if x.requires_grad]

    def forward(f: Provider) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                f(**leaves, **case.options)

        return call

    def both(f: Provider) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.grad(_outputs(f(**leaves, **case.options)), wanted, douts)

        return call

    sizes = _sizes(case)
    traffic = op.traffic(sizes, benchmark.dtype.itemsize)
    flops = op.flops(sizes, case.options) if op.flops else (0, 0)
    passes = (("forward", forward, traffic[0], flops[0]), ("forward+backward", both, sum(traffic), sum(flops)))
    measurements = []
    for direction, body, bytes_moved, operations in passes:
        timings = interleave({name: body(f) for name, f in providers.items()}, seconds)
        measurements.append(Measurement(benchmark, direction, timings, bytes_moved, operations))
    return measurements
