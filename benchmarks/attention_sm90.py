"""`python -m benchmarks.attention_sm90`: attention's sm_90a kernels by themselves, on a GPU of compute capability 9.0.

First against float32 attention on a small case of each kind, then times: TFLOP/s of causal bfloat16
attention at 16k tokens and 2048 columns of heads, as FlashAttention-3 reports it (half of the T x T scores count; the
backward is 2.5 times the forward). Rounds are interleaved, so that the clock's changes hit all alike. With all lengths
10 s beside torch's start.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ops import cuda

TOKENS, WIDTH = 16384, 2048


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    scratch = q.new_empty(cuda._library.attention_fwd_scratch() // 4, dtype=torch.int32)
    cuda._library.attention_sm90_fwd(q, k, v, None, D**-0.5, True, 0, out, lse, scratch, cuda._stream(q))
    return out, lse


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scratch = q.new_empty(cuda._library.attention_sm90_bwd_scratch(q, None) // 4, dtype=torch.float32)
    scale = q.shape[-1] ** -0.5
    cuda._library.attention_sm90_bwd(
        dout, q, k, v, out, lse, None, scale, True, 0, dq, dk, dv, scratch, cuda._stream(q)
    )
    return dq, dk, dv


def _inputs(B: int, T: int, S: int, H: int, G: int, D: int) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((B, T, H, D), (B, S, G, D), (B, S, G, D), (B, T, H, D))
    return tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in shapes)


def _error(x: Tensor, exact: Tensor) -> float:
    """Largest error in units of the largest value."""
    return ((x.float() - exact).abs().max() / exact.abs().max()).item()


def check(D: int, T: int, S: int, H: int, G: int) -> None:
    """Prints the errors of forward and backward against float32; raises where they are not roundings."""
    q, k, v, dout = _inputs(2, T, S, H, G, D)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    mask = torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T)
    a, b, c = (x.transpose(1, 2) for x in leaves)
    exact = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    gradients = torch.autograd.grad(exact, leaves, dout.float())
    out, lse = _forward(q, k, v)
    errors = {"out": _error(out, exact)}
    first, second = (_backward(dout, q, k, v, out, lse) for _ in range(2))
    for name, x, again, g in zip(("dq", "dk", "dv"), first, second, gradients, strict=True):
        errors[name] = _error(x, g) if torch.equal(x, again) else float("nan")
    print(f"D {D} T {T} S {S} H {H} G {G}: " + "  ".join(f"{n} {e:.1e}" for n, e in errors.items()), flush=True)
    wrong = [n for n, e in errors.items() if not e < 0.02]
    if wrong:
        raise SystemExit(f"wrong, or not repeatable: {', '.join(wrong)}")


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; one launch of each a round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(rounds + 2):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if r >= 2:
                found[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def _vendor(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True)


def main() -> None:
    """Checks, then times the lengths asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 6144, 8192, 12288, 16384])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    arguments = parser.parse_args()
    if (reason := cuda.unavailable()) is not None or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(reason or "these kernels need compute capability 9.0")
    for shape in ((128, 1000, 1000, 2, 2), (128, 333, 1111, 4, 1), (64, 1000, 1000, 2, 1), (96, 700, 700, 2, 2)):
        check(*shape)
    D = arguments.head_dim
    H = WIDTH // D
    for T in arguments.lengths:
        B = max(TOKENS // T, 1)
        q, k, v, dout = _inputs(B, T, T, H, H, D)
        saved = _forward(q, k, v)
        flops = 2 * B * H * D * T * T  # two products, half of the scores
        runs: dict[str, Callable[[], object]] = {"forward": partial(_forward, q, k, v)}
        runs["forward, PyTorch"] = _vendor(q, k, v)
        runs["backward"] = partial(_backward, dout, q, k, v, *saved)
        for name, time in seconds(runs, arguments.rounds).items():
            rate = flops * (2.5 if name == "backward" else 1.0) / time / 1e12
            print(f"B {B:2} T {T:5} D {D:3}  {name:16} {time * 1e6:9.1f} us  {rate:6.1f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
