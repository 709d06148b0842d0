"""`python -m benchmarks.attention_tune [--kernels dkdv,dq --dims 128 --dtypes bfloat16]`: launch parameters, on a GPU.

Compiles every candidate of the Triton attention in parallel, judges each against float64 on a small case, times those
that pass and prints them, fastest first: forward, dk/dv and dq apart, D 64 to 256, causal, 16k tokens as 4 x 4096 and
1 x 16384, at D 128 also 4 x 4096 with 32 query and 8 key/value heads; float32's ways of multiplying; a decode by shares
of the keys. A candidate that fails is a line that says why. All take 200 s, the command above 60.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_fast.kernels.attention import _attention_fwd_kernel, forward
from llama_fast.kernels.attention_bwd import (
    gradient_of_keys,
    gradient_of_queries,
    statistics_of,
)
from llama_fast.kernels.attention_dkdv import _attention_dkdv_kernel
from llama_fast.kernels.attention_dq import _attention_dq_kernel
from llama_fast.kernels.attention_launch import Tiles, tiles_of
from llama_fast.ops import eager, reference
from llama_fast.verify import judge

DEVICE = "cuda"
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TOKENS = 16384
SHARE = {"fwd": 2, "dkdv": 4, "dq": 3}  # of the products of the size of the scores, each 2 D flops an element
KERNELS = {
    "fwd": _attention_fwd_kernel,
    "dkdv": _attention_dkdv_kernel,
    "dq": _attention_dq_kernel,
}


@dataclass(frozen=True)
class Candidate:
    kernel: str
    D: int
    tiles: Tiles
    dtype: torch.dtype = BF16
    decode: bool = False

    def __str__(self) -> str:
        t = self.tiles
        flags = (" tma" if t.tma else "") + ("" if t.swapped else " unswapped")
        kind = "decode" if self.decode else self.kernel
        precision = f" {t.precision}" if self.dtype == F32 else ""
        return f"{kind:6} D{self.D:<3} {t.block_m:3}x{t.block_n:<3} w{t.num_warps} s{t.num_stages}{flags}{precision}"


def candidates() -> list[Candidate]:
    """The launch parameters in force and their neighbours."""
    found: list[Candidate] = []

    def add(kernel: str, D: int, sizes: Sequence[tuple[int, int, int, int]], **flags: Any) -> None:
        found.extend(Candidate(kernel, D, Tiles(m, n, w, s, **flags)) for m, n, w, s in sizes)

    add("fwd", 64, [(64, 128, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 4), (64, 256, 4, 2)], tma=True)
    add("fwd", 128, [(64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 4), (128, 64, 8, 3)], tma=True)
    add("fwd", 256, [(64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2)], tma=True)
    add("dkdv", 64, [(128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2), (256, 64, 4, 2), (128, 64, 8, 2)], tma=True)
    add("dkdv", 128, [(64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2)], tma=True)
    add("dkdv", 128, [(64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3)], tma=True)
    unswapped = [(64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 1), (128, 64, 8, 2), (64, 32, 4, 2)]
    add("dkdv", 128, unswapped, tma=True, swapped=False)
    add("dkdv", 256, [(32, 64, 8, 2), (16, 64, 8, 2), (32, 32, 4, 2), (32, 64, 8, 3), (64, 64, 8, 1)], tma=True)
    add("dq", 64, [(64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 4)], tma=True)
    add("dq", 128, [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)], tma=True)
    add("dq", 128, [(128, 128, 8, 2), (128, 32, 8, 4)], tma=True)
    add("dq", 256, [(64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 4, 1), (128, 32, 8, 2)], tma=True)
    for kernel, sizes in (("fwd", [(64, 64, 4, 3)]), ("dkdv", [(64, 64, 4, 2)]), ("dq", [(128, 64, 8, 3)])):
        add(kernel, 128, sizes)  # packed sequences

    def add_float32(kernel: str, D: int, sizes: Sequence[tuple[int, int, int]], precision: str = "bf16x6") -> None:
        tiles = [Tiles(m, n, w, 2, precision=precision) for m, n, w in sizes]
        found.extend(Candidate(kernel, D, t, F32) for t in tiles)

    add_float32("fwd", 64, [(64, 32, 4), (128, 32, 8), (64, 64, 4)])
    add_float32("fwd", 128, [(64, 32, 4), (32, 32, 4), (64, 16, 4)])
    add_float32("fwd", 256, [(32, 16, 8), (32, 32, 8)], "ieee")
    # fewer than 64 queries: both kernels must multiply alike (docs/ops/attention_triton.md)
    add_float32("dkdv", 64, [(32, 64, 4), (32, 64, 8), (32, 32, 4)])
    add_float32("dkdv", 128, [(32, 32, 4), (32, 32, 8), (32, 64, 8), (16, 64, 4)])
    add_float32("dkdv", 256, [(16, 32, 8), (16, 16, 8)], "ieee")
    add_float32("dq", 64, [(32, 64, 4), (32, 64, 8), (32, 32, 4)])
    add_float32("dq", 128, [(32, 32, 4), (32, 32, 8), (32, 16, 4), (32, 64, 8), (16, 64, 4)])
    add_float32("dq", 256, [(32, 16, 8), (16, 16, 4)], "ieee")
    for n, w, s in ((128, 4, 3), (128, 4, 2), (64, 4, 3), (64, 2, 3), (32, 2, 4), (32, 1, 4), (256, 8, 2), (128, 8, 3)):
        found.append(Candidate("fwd", 128, Tiles(16, n, w, s), decode=True))
    return found


def inputs(B: int, T: int, S: int, H: int, G: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """dout, q, k, v."""
    torch.manual_seed(0)
    shapes = ((B, T, H, D), (B, T, H, D), (B, S, G, D), (B, S, G, D))
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def call(c: Candidate, tensors: Sequence[torch.Tensor], splits: int = 1) -> Callable[[], Sequence[torch.Tensor]]:
    """The candidate's kernel alone, as a function without arguments."""
    dout, q, k, v = tensors
    scale, rest = c.D**-0.5, (None, c.D**-0.5, True, 0)
    if c.kernel == "fwd":
        pack = q.shape[2] // k.shape[2] if c.decode else 1
        return lambda: forward(q, k, v, None, scale, True, 0, c.tiles, pack, splits)[:1]
    out, lse = forward(q, k, v, None, scale, True, 0, Tiles(32, 16, 8, 2, precision="ieee"))
    statistics = statistics_of(dout, out, lse)
    if c.kernel == "dkdv":
        if c.dtype == F32:
            gradient_of_queries(dout, q, k, v, statistics, *rest, tiles_of("dq", c.D, F32, q.device))
        return lambda: gradient_of_keys(dout, q, k, v, statistics, *rest, c.tiles)
    return lambda: (gradient_of_queries(dout, q, k, v, statistics, *rest, c.tiles),)


def gradients(f: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    dout, *leaves = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = f(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"fwd": (out.detach(),), "dkdv": (dk, dv), "dq": (dq,)}


def check(c: Candidate) -> tuple[Candidate, str, str]:
    """(candidate, problem or "", registers, spills and shared memory): runs in a process of its own."""
    try:
        shape = (2, 1, 1000, 16, 4, c.D) if c.decode else (1, 520, 520, 2, 2, c.D)
        tensors = inputs(*shape, c.dtype)
        ours = call(c, tensors, 3 if c.decode else 1)()
        torch.cuda.synchronize()
        theirs, truth = gradients(eager.attention, tensors, c.dtype), gradients(reference.attention, tensors, F64)
        factor = 1.0 if c.kernel == "fwd" else 1.5
        judged = [judge(*x, factor, c.dtype) for x in zip(ours, theirs[c.kernel], truth[c.kernel], strict=True)]
        note = " ".join(f"{error / budget:.2f}" for error, _, budget, _ in judged)
        return c, "; ".join(problem for *_, problem in judged if problem), f"{resources(c)} error/budget {note}"
    except Exception as error:
        return (
            c,
            f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90] if str(error).strip() else ''}",
            "",
        )


def resources(c: Candidate) -> str:
    """Of the binary compiled last in this process."""
    caches = KERNELS[c.kernel].device_caches
    compiled = list(caches[torch.cuda.current_device()][0].values())[-1]
    return f"{compiled.n_regs:3}r {compiled.n_spills:3}sp {compiled.metadata.shared >> 10:3}K"


def captured(f: Callable[[], Any]) -> Callable[[], Any]:
    """`f` as a CUDA graph: what the GPU does, without the launches of a processor."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def milliseconds(f: Callable[[], Any], repeats: int = 7) -> float:
    for _ in range(2):
        f()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        f()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]


def sizes_of(c: Candidate) -> list[tuple[int, int, int, int, int, int]]:
    if c.decode:
        return [(8, 1, 8192, 32, 8, c.D)]
    H = 2048 // c.D
    if c.dtype == F32:
        return [(1, 4096, 4096, H, H, c.D)]
    grouped = [(4, 4096, 4096, 32, 8, c.D)] if c.D == 128 else []
    return [(4, 4096, 4096, H, H, c.D), (1, TOKENS, TOKENS, H, H, c.D), *grouped]


def rate(c: Candidate, shape: tuple[int, ...], ms: float) -> float:
    """TFLOP/s of the products that the kernel does; of a decode GB/s of keys and values."""
    B, T, S, H, G, D = shape
    if c.decode:
        return 2 * B * S * G * D * 2 / ms / 1e6
    return SHARE[c.kernel] * B * H * D * T * S / ms / 1e9


def time_all(passed: Sequence[Candidate], deadline: float) -> dict[Candidate, list[float]]:
    """Rates by shape, or by number of shares of the keys."""
    rates: dict[Candidate, list[float]] = {}
    made: dict[Any, tuple[torch.Tensor, ...]] = {}
    for c in passed:
        for shape in sizes_of(c):
            key = (*shape, c.dtype)
            if key not in made:
                made.clear()
                made[key] = inputs(*shape, c.dtype)
            for splits in (4, 8, 16, 32) if c.decode else (1,):
                if time.monotonic() > deadline:
                    return rates
                f = call(c, made[key], splits)
                ms = milliseconds(captured(f), 21) if c.decode else milliseconds(f)
                rates.setdefault(c, []).append(rate(c, shape, ms))
    return rates


def vendor(dims: Sequence[int]) -> None:
    """PyTorch's own attention, forward and forward + backward, on the same shapes."""
    shapes = [shape for D in dims for shape in sizes_of(Candidate("fwd", D, Tiles(0, 0, 0, 0)))]
    for B, T, S, H, G, D in shapes:
        dout, q, k, v = (x.transpose(1, 2).requires_grad_() for x in inputs(B, T, S, H, G, D, BF16))
        flops = 2 * B * T * S * H * D / 1e9

        def sdpa(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, gqa: bool = G < H) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        def both(f: Any = sdpa, leaves: Any = (q, k, v), dout: Any = dout) -> Any:
            return torch.autograd.grad(f(), leaves, dout)

        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            name = f"{backend.name:18} D{D:<3} T{T:<5} H{H} G{G}"
            try:
                with sdpa_kernel(backend):
                    rates = flops / milliseconds(sdpa), 3.5 * flops / milliseconds(both)
                print(f"{name} {rates[0]:6.0f} fwd {rates[1]:6.0f} fwd+bwd")
            except RuntimeError as error:
                print(f"{name} {str(error).splitlines()[0][:80]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200, help="stop timing after this long")
    parser.add_argument("--kernels", default="fwd,dkdv,dq,decode")
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    options = parser.parse_args(arguments)
    dims = [int(D) for D in options.dims.split(",")]
    if not torch.cuda.is_available():
        print("attention_tune: torch sees no GPU", file=sys.stderr)
        return 2
    start = time.monotonic()
    everything = [
        c
        for c in candidates()
        if ("decode" if c.decode else c.kernel) in options.kernels.split(",")
        and c.D in dims
        and str(c.dtype).removeprefix("torch.") in options.dtypes.split(",")
    ]
    checked: dict[Candidate, tuple[str, str]] = {}
    context = multiprocessing.get_context("spawn")
    processes = max(1, min(len(everything), (os.cpu_count() or 2) - 1, 15))
    pool = context.Pool(processes)
    try:
        pending = {c: pool.apply_async(check, (c,)) for c in everything}
        for c, answer in pending.items():
            try:
                _, problem, note = answer.get(timeout=max(1.0, start + options.seconds * 0.7 - time.monotonic()))
            except multiprocessing.TimeoutError:
                problem, note = "no answer in time", ""
            checked[c] = problem, note
    finally:
        pool.terminate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, checked in {time.monotonic() - start:.0f} s")
    passed = [c for c in everything if not checked[c][0]]
    passed.sort(key=lambda c: (c.decode, c.dtype == F32, c.D, c.kernel))  # inputs are made anew as seldom as can be
    rates = time_all(passed, start + options.seconds)
    groups = itertools.groupby(passed, key=lambda c: (c.decode, c.dtype, c.D, c.kernel))
    print(
        "TFLOP/s of the products done at 4 x 4096, 1 x 16384, at D 128 also 4 x 4096 with 32 and 8 heads "
        "(decode: GB/s with the keys in 4, 8, 16, 32 shares)"
    )
    for _, group in groups:
        for c in sorted(group, key=lambda c: -max(rates.get(c, [0.0]))):
            print(f"{c!s:44}" + "".join(f"{r:7.0f}" for r in rates.get(c, [])) + f"  {checked[c][1]}")
    for D in dims:
        timed = [(c.kernel, r) for c, r in rates.items() if c.D == D and c.dtype == BF16 and not c.decode]
        these = [(kernel, r[1]) for kernel, r in timed if len(r) > 1]
        of = {kernel: [rate for k, rate in these if k == kernel] for kernel in KERNELS}
        if all(of.values()):
            seconds = sum(SHARE[k] / max(of[k]) for k in KERNELS)
            print(f"D{D} T{TOKENS}: {max(of['fwd']):.0f} fwd, {7 / seconds:.0f} fwd+bwd without delta")
    if "bfloat16" in options.dtypes:
        vendor(dims)
    for c in everything:
        if checked[c][0]:
            print(f"failed: {c!s:44} {checked[c][0]} {checked[c][1]}")
    print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
