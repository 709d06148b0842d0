"""Attention for sm_90a in the emulator: wgmma, TMA, mbarriers and the order of dq's sum, under permuted schedules."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from llama_fast.ops import eager, reference
from llama_fast.verify import BACKWARD_FACTOR, FORWARD_FACTOR, judge

pytestmark = pytest.mark.skipif(emulated.unavailable() is not None, reason=f"emulator: {emulated.unavailable()}")

BF16, F16 = torch.bfloat16, torch.float16
PACKED = (0, 0, 100, 101, 101, 330, 390)  # two empty sequences, one of a single token, one longer than a tile


@pytest.fixture(autouse=True)
def plain_schedule() -> Iterator[None]:
    """Threads in order, the race checker on, whatever a test has set."""
    _options(0)
    yield
    _options(0)


def _options(seed: int) -> None:
    assert emulated.run(emulated.load("attention_sm90"), "options", ctypes.c_uint64(seed), True) == ""


def _described(x: Tensor | None) -> ctypes.Array[ctypes.c_int64]:
    if x is None:
        return (ctypes.c_int64 * 1)(0)
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    words = [x.data_ptr(), elements * x.element_size(), x.ndim, *x.shape, *x.stride()]
    return (ctypes.c_int64 * len(words))(*words)


def _run(function: str, tensors: Sequence[Tensor | None], dtype: torch.dtype, options: Sequence[float]) -> None:
    described = [_described(x) for x in tensors]
    pointers = (ctypes.c_void_p * len(described))(*[ctypes.addressof(d) for d in described])
    library = emulated.load("attention_sm90")
    assert emulated.run(library, function, pointers, dtype == BF16, (ctypes.c_double * len(options))(*options)) == ""


def _forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, *options: float) -> list[Tensor]:
    B, T, H, _ = q.shape
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((B, H, T), torch.nan)
    scratch = torch.full((1,), -7, dtype=torch.int32)
    _run("attention_fwd", (q, k, v, cu, out, lse, scratch), q.dtype, options)
    return [out, lse]


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], cu: Tensor | None, *options: float):
    gradients = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (q, k, v)]
    size = emulated.load("attention_sm90").attention_bwd_scratch
    size.restype = ctypes.c_int64
    scratch = torch.full((size(_described(q), _described(cu)) // 4,), torch.nan)
    _run("attention_bwd", (dout, q, k, v, *saved, cu, *gradients, scratch), q.dtype, options)
    return gradients


def _inputs(dtype: torch.dtype, B: int, T: int, S: int, H: int, G: int, D: int, scale: float = 1.0) -> list[Tensor]:
    """q, k, v, dout; strided as slices of one projection are."""
    generator = torch.Generator().manual_seed(T + S + D)

    def random(rows: int, heads: int) -> Tensor:
        wide = torch.randn(B, rows, heads * D + 16, generator=generator, dtype=torch.float64) * scale
        return wide.to(dtype)[..., 8:-8].unflatten(-1, (heads, D))

    return [random(T, H), random(S, G), random(S, G), random(T, H)]


# D, B, T, S, H, G, causal, window: what they cross, in tiles of 128 or 192 rows and 128 keys
SHAPES = {
    "one row": (128, 1, 1, 3, 1, 1, True, 0),
    "tile": (64, 1, 192, 192, 1, 1, True, 0),
    "tile and one": (128, 2, 129, 129, 2, 2, True, 0),
    "groups": (128, 1, 300, 300, 4, 2, True, 0),
    "keys before": (64, 1, 70, 330, 2, 1, True, 0),
    "rows that see nothing": (128, 1, 330, 70, 2, 1, True, 0),
    "full": (128, 1, 200, 330, 2, 1, False, 0),
    "rings wrap": (128, 1, 130, 900, 1, 1, False, 0),
    "padded head": (96, 1, 200, 330, 2, 1, True, 0),
    "window": (128, 1, 400, 400, 2, 1, True, 100),
    "window, keys before": (64, 1, 150, 600, 1, 1, True, 70),
}


def _judged(results: Sequence[Tensor], eagers: Sequence[Tensor], truths: Sequence[Tensor], factor: float) -> list[str]:
    names = ("out",) if len(results) == 1 else ("dq", "dk", "dv")
    judged = zip(names, results, eagers, truths, strict=True)
    return [f"{n}: {p}" for n, x, y, z in judged if (p := judge(x, y, z, factor, x.dtype)[3])]


def _problems(inputs: list[Tensor], cu: Tensor | None, causal: bool, window: int) -> list[str]:
    """What misses the budget of llama_fast/verify.py: out, lse, dq, dk, dv."""
    q, k, v, dout = inputs
    scale = q.shape[-1] ** -0.5
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options: dict[str, Any] = {"causal": causal, "window": window or None, "cu_seqlens": cu}
    theirs = eager.attention(*(x if cu is None else x.squeeze(0) for x in leaves), **options).view(q.shape)
    eager_gradients = torch.autograd.grad(theirs, leaves, dout)
    exact = [x.double() for x in inputs]
    true_out, true_lse = reference.attention_fwd(*exact[:3], cu, scale, causal, window)
    truths = reference.attention_bwd(exact[3], *exact[:3], true_out, true_lse, cu, scale, causal, window)

    saved = _forward(q, k, v, cu, scale, causal, window)
    problems = _judged(saved[:1], [theirs.detach()], [true_out], FORWARD_FACTOR)
    torch.testing.assert_close(saved[1], true_lse.float(), rtol=2e-6, atol=2e-6)
    gradients = _backward(dout, q, k, v, saved, cu, scale, causal, window)
    return problems + _judged(gradients, eager_gradients, truths, BACKWARD_FACTOR)


@pytest.mark.parametrize(("shape", "seed"), [(name, seed) for seed, name in enumerate(SHAPES)])
def test_shapes_are_within_budget(shape: str, seed: int) -> None:
    D, B, T, S, H, G, causal, window = SHAPES[shape]
    _options(seed)
    assert _problems(_inputs(BF16 if seed % 2 else F16, B, T, S, H, G, D), None, causal, window) == []


@pytest.mark.parametrize(("D", "window"), [(64, 0), (128, 0), (128, 50)])
def test_packed_sequences_are_within_budget(D: int, window: int) -> None:
    _options(D + window)
    R = PACKED[-1]
    assert _problems(_inputs(BF16, 1, R, R, 2, 1, D), torch.tensor(PACKED, dtype=torch.int32), True, window) == []


def test_many_packed_sequences_are_found() -> None:
    bounds = 3 * torch.arange(0, 71, dtype=torch.int32)
    assert _problems(_inputs(BF16, 1, 210, 210, 1, 1, 64), bounds, True, 0) == []


def test_large_scores() -> None:
    assert _problems(_inputs(BF16, 1, 200, 200, 1, 1, 128, scale=8.0), None, True, 0) == []


def test_schedules_give_the_same_bits() -> None:
    q, k, v, dout = _inputs(BF16, 1, 390, 390, 4, 2, 128)
    options = (128**-0.5, True, 0)
    found = []
    for seed in (0, 1, 2):
        _options(seed)
        saved = _forward(q, k, v, None, *options)
        found.append([*saved, *_backward(dout, q, k, v, saved, None, *options)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
