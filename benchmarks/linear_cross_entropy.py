"""linear_cross_entropy at the head of a 2048-wide model, beside all logits in float32 as transformers computes them.

`python -m benchmarks.linear_cross_entropy` also measures the peak memory of both: resident bytes above those before the
call, the two gradients not counted, each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from llama_fast.config import LlamaConfig
from llama_fast.verify import Case

from .harness import Benchmark

_DIMS = {"...": (2048,), "C": 2048, "V": 32000}
_LLAMA_3_2 = LlamaConfig.preset("llama-3.2-1b")

BENCHMARKS = (
    Benchmark(
        Case("linear_cross_entropy", {"...": (512,), "C": 768, "V": 32000}),
        torch.bfloat16,
        "92 M parameters",
        quick=True,
    ),
    Benchmark(Case("linear_cross_entropy", _DIMS, scale=0.1), torch.bfloat16, "2048 wide, LLaMA's vocabulary"),
    Benchmark(Case("linear_cross_entropy", _DIMS, scale=0.1), torch.float32, "2048 wide, LLaMA's vocabulary"),
    Benchmark(
        Case("linear_cross_entropy", {"...": (512,), "C": _LLAMA_3_2.dim, "V": _LLAMA_3_2.vocab_size}, scale=0.1),
        torch.bfloat16,
        "llama-3.2-1b",
    ),
    Benchmark(
        Case("linear_cross_entropy", {"...": (8192,), "C": 4096, "V": 128256}),
        torch.bfloat16,
        "8192x4096->128256",
        device="cuda",
    ),
    Benchmark(
        Case("linear_cross_entropy", {"...": (2048,), "C": 2048, "V": 32000}),
        torch.float32,
        "2048x2048->32000 fp32",
        device="cuda",
    ),
)


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _peak(provider: str, index: int) -> int:
    """Bytes above inputs and gradients at the peak of one forward and backward in this process."""
    import llama_fast
    from llama_fast.ops import eager

    benchmark = BENCHMARKS[index]
    function = {"llama_fast": llama_fast, "eager": eager}[provider].linear_cross_entropy
    inputs = benchmark.case.inputs(benchmark.dtype)
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    hidden, weight, targets = (x[:8] for x in inputs.values())
    function(hidden, weight, targets % 8).backward()  # first call: libraries, threads
    for x in leaves:
        x.grad = None
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    function(**inputs).backward()
    return _resident("VmHWM") - before - sum(x.nbytes for x in leaves)


def peak_bytes(provider: str, index: int) -> int:
    """`_peak` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.linear_cross_entropy", "--peak", provider, str(index)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    for index, benchmark in enumerate(BENCHMARKS):
        ours, theirs = peak_bytes("llama_fast", index), peak_bytes("eager", index)
        mb = 1 / 1048576
        print(f"{benchmark.name}: {ours * mb:.0f} MB, eager {theirs * mb:.0f} MB, 1/{theirs / max(ours, 1):.1f}")


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print(json.dumps(_peak(sys.argv[-2], int(sys.argv[-1]))))
    else:
        main()
