"""`python -m benchmarks.attention_sm90`: attention's sm_90a kernels by themselves, on a GPU of compute capability 9.0.

First against float32 attention on a small case of each kind, then times: TFLOP/s of causal bfloat16
attention at 16k tokens and 2048 columns of heads, as FlashAttention-3 reports it (half of the T x T scores count; the
backward is 2.5 times the forward), beside PyTorch's scaled_dot_product_attention. Rounds are interleaved, so that the
clock's changes hit all alike. `--heads 32 --heads-a-group 4`: grouped. `--clock`: what nvidia-smi reads meanwhile.
With all lengths 15 s beside torch's start.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
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


def clock(run: Callable[[], object], time: float) -> str:
    """Clock and power while `run`, of `time` seconds, is called for a second."""
    for _ in range(max(int(1.0 / time), 1)):
        run()
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    read = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    torch.cuda.synchronize()
    return read[0] if read else "?"


def _vendor(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Callable[[], object]]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])

    out = forward(*leaves)
    gradient = dout.transpose(1, 2)
    return {
        "forward, PyTorch": partial(forward, q, k, v),
        "backward, PyTorch": partial(torch.autograd.grad, out, leaves, gradient, retain_graph=True),
    }


def main() -> None:
    """Checks, then times the lengths asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 6144, 8192, 12288, 16384])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128))
    parser.add_argument("--heads", type=int, help="of queries; 2048 / D")
    parser.add_argument("--heads-a-group", type=int, default=1)
    parser.add_argument("--clock", action="store_true")
    arguments = parser.parse_args()
    if (reason := cuda.unavailable()) is not None or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(reason or "these kernels need compute capability 9.0")
    for shape in (
        (128, 1000, 1000, 2, 2),
        (128, 333, 1111, 4, 1),
        (64, 1000, 1000, 2, 1),
        (64, 333, 1111, 4, 1),
        (96, 700, 700, 2, 2),
    ):
        check(*shape)
    D = arguments.head_dim
    H = arguments.heads or WIDTH // D
    for T in arguments.lengths:
        B = max(TOKENS // T, 1)
        q, k, v, dout = _inputs(B, T, T, H, H // arguments.heads_a_group, D)
        saved = _forward(q, k, v)
        flops = 2 * B * H * D * T * T  # two products, half of the scores
        runs: dict[str, Callable[[], object]] = {"forward": partial(_forward, q, k, v)}
        runs["backward"] = partial(_backward, dout, q, k, v, *saved)
        runs |= _vendor(q, k, v, dout)
        for name, time in seconds(runs, arguments.rounds).items():
            rate = flops * (2.5 if name.startswith("backward") else 1.0) / time / 1e12
            read = clock(runs[name], time) if arguments.clock else ""
            line = f"B {B:2} T {T:5} D {D:3} H {H:2} {name:19} {time * 1e6:9.1f} us  {rate:6.1f} TFLOP/s  {read}"
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
