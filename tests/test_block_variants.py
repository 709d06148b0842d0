"""What some blocks have and others not: biases of q, k and v, and norms of each head's q and k."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import kept_bytes
from torch import Tensor

import llama_fast as lf
from llama_fast.block import POLICIES, BlockOptions, Weights, transformer_block

B, T, C, H, G, D, FFN = 2, 19, 64, 4, 2, 16, 112
SIZES = {
    **{"norm1_C": (C,), "wq_HDxC": (H * D, C), "wk_GDxC": (G * D, C), "wv_GDxC": (G * D, C), "wo_CxHD": (C, H * D)},
    **{"norm2_C": (C,), "wgate_FC": (FFN, C), "wup_FC": (FFN, C), "wdown_CF": (C, FFN)},
}
BIASES = {"bq_HD": (H * D,), "bk_GD": (G * D,), "bv_GD": (G * D,)}
NORMS = {"normq_D": (D,), "normk_D": (D,)}
VARIANTS = {"biases": BIASES, "norms": NORMS, "both": {**BIASES, **NORMS}, "one bias": {"bk_GD": (G * D,)}}


def make(variant: str, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Parameters that need gradients; biases as large as what they are added to."""
    drawn, found = torch.Generator().manual_seed(seed), {}
    for name, size in {**SIZES, **VARIANTS[variant]}.items():
        w = torch.randn(size, generator=drawn)
        w = 1 + 0.2 * w if name.startswith("norm") else w / size[1] ** 0.5 if len(size) == 2 else w
        found[name] = w.to(dtype).requires_grad_()
    return Weights(**found)


def inputs(dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, cos and sin."""
    drawn = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(B, T, C, generator=drawn).to(dtype) for _ in range(2))
    angles = torch.arange(T).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, D // 2)
    return x.requires_grad_(), dy, angles.cos(), angles.sin()


def plain(x: Tensor, w: Weights, cos: Tensor, sin: Tensor, window: int = 0) -> Tensor:
    """The same block by autograd, in plain PyTorch."""
    norm = lambda x, gain: F.rms_norm(x, gain.shape, gain, 1e-5)  # noqa: E731
    n1 = norm(x, w.norm1_C)
    parts = ((w.wq_HDxC, w.bq_HD), (w.wk_GDxC, w.bk_GD), (w.wv_GDxC, w.bv_GD))
    q, k, v = (F.linear(n1, weight, bias).view(B, T, -1, D) for weight, bias in parts)
    if w.normq_D is not None and w.normk_D is not None:
        q, k = norm(q, w.normq_D), norm(k, w.normk_D)
    with lf.backend("reference"):
        q, k = lf.rope(q, k, cos, sin)
    seen = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window) if window else None
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
    h = x + F.linear(out.transpose(1, 2).flatten(2), w.wo_CxHD)
    n2 = norm(h, w.norm2_C)
    return h + F.linear(F.silu(F.linear(n2, w.wgate_FC)) * F.linear(n2, w.wup_FC), w.wdown_CF)


def run(block: Callable[..., Tensor], variant: str, dtype: torch.dtype, rounded: torch.dtype, seed: int = 0) -> Any:
    """y, dx and the weights' gradients, from numbers that `rounded` holds."""
    w = Weights(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in make(variant, rounded, seed)))
    x, dy, cos, sin = inputs(rounded, seed + 1)
    x = x.detach().to(dtype).requires_grad_()
    y = block(x, w, cos, sin)
    names = ["y", "dx", *(f"d{n}" for n, t in zip(w._fields, w, strict=True) if t is not None)]
    found = [y.detach(), *torch.autograd.grad(y, [x, *w.given()], dy.to(dtype))]
    return dict(zip(names, found, strict=True))


def ours(policy: str = "recompute-cheap", window: int = 0) -> Callable[..., Tensor]:
    options = BlockOptions(D, 1e-5, policy, window)
    return lambda x, w, cos, sin: transformer_block(x, w, cos, sin, options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_in_float64(variant: str, policy: str) -> None:
    for window in (0, 5):
        found = run(ours(policy, window), variant, torch.float64, torch.float64)
        want = run(lambda *args, w=window: plain(*args, w), variant, torch.float64, torch.float64)
        assert found.keys() == want.keys()
        for name, exact in want.items():
            torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_over_seeds_the_errors_are_no_larger_than_autograd_s(variant: str, dtype: torch.dtype) -> None:
    """The mean logarithm of the errors' quotient is at most 0, up to three standard errors: result and gradients."""
    n, results, gradients = 12, [], []
    rms = lambda t: t.double().square().mean().sqrt().item()  # noqa: E731
    for seed in range(n):
        found, theirs = (run(block, variant, dtype, dtype, seed) for block in (ours(), plain))
        truth = run(plain, variant, torch.float64, dtype, seed)
        ratio = {k: math.log(rms(found[k] - t) / rms(theirs[k] - t)) for k, t in truth.items()}
        results.append(ratio.pop("y"))
        gradients.append(statistics.mean(ratio.values()))
    for errors in (results, gradients):
        assert statistics.mean(errors) <= 3 * statistics.stdev(errors) / n**0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_more_is_kept_than_without(variant: str) -> None:
    """Of q and k what stands before their norms, in place of what comes of it."""
    w, (x, _, cos, sin) = make(variant, torch.float32), inputs(torch.float32)
    for policy in POLICIES:
        with_, without = (
            kept_bytes(lambda p=policy, w=weights: ours(p)(x, w, cos, sin), *w.given(), cos, sin)  # type: ignore[misc]
            for weights in (w, Weights(*w[:9]))
        )
        assert with_ == without > 0, policy


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", ["biases and norms", "all else"])
def test_frozen_parameters_get_no_gradient(policy: str, frozen: str) -> None:
    w, (x, dy, cos, sin) = make("both", torch.float64), inputs(torch.float64)
    want = run(ours(policy), "both", torch.float64, torch.float64)
    for i, t in enumerate(w.given()):
        t.requires_grad_((i < 9) == (frozen == "biases and norms"))
    ours(policy)(x, w, cos, sin).backward(dy)
    for name, t in zip(w._fields, w, strict=True):
        assert t is not None
        if t.requires_grad:
            torch.testing.assert_close(t.grad, want[f"d{name}"], rtol=1e-9, atol=1e-9, msg=name)
        else:
            assert t.grad is None


@pytest.mark.parametrize("keep_residual", [False, True])
def test_autocast(keep_residual: bool) -> None:
    """As near to float64 as the block without biases and norms is, by the size of its gradients."""
    w, (x, dy, cos, sin) = make("both", torch.float32), inputs(torch.float32)
    truth = run(plain, "both", torch.float64, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = transformer_block(x, w, cos, sin, BlockOptions(D, keep_residual=keep_residual))
    y.backward(dy.to(y.dtype))
    assert y.dtype == (torch.float32 if keep_residual else torch.bfloat16)
    for name, t in (("x", x), *zip(w._fields, w, strict=True)):
        assert t.grad.dtype == torch.float32
        error = (t.grad.double() - truth[f"d{name}"]).square().mean().sqrt()
        assert error < 0.03 * truth[f"d{name}"].square().mean().sqrt(), name


@pytest.mark.parametrize("variant", ["biases", "norms"])
def test_compiles_without_graph_break(variant: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ours(), fullgraph=True, backend="aot_eager")
    found = run(compiled, variant, torch.float64, torch.float64)
    for name, exact in run(plain, variant, torch.float64, torch.float64).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_by_row_decode_is_the_whole(variant: str) -> None:
    """Few rows and a cache, without gradients, and the keys that a recorded block gives."""
    from llama_fast.block import Cache

    w, (x, _, cos, sin) = make(variant, torch.float32), inputs(torch.float32)
    whole, k, v = transformer_block(x, w, cos, sin, BlockOptions(D), return_keys=True)
    cache = Cache(torch.full((B, T, G, D), torch.nan), torch.full((B, T, G, D), torch.nan), 0)
    with torch.no_grad():
        for t in range(T):
            y = transformer_block(
                x[:, t : t + 1], w, cos[t : t + 1], sin[t : t + 1], BlockOptions(D), cache=cache._replace(used=t)
            )
            torch.testing.assert_close(y, whole[:, t : t + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.k_BSGD, k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.v_BSGD, v, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named() -> None:
    w, (x, _, cos, sin) = make("both", torch.float32), inputs(torch.float32)
    for change, message in (
        ({"bq_HD": torch.zeros(D)}, rf"bq_HD has shape \({D},\), expected \({H * D},\)"),
        ({"normk_D": torch.ones(H * D)}, rf"normk_D has shape \({H * D},\), expected \({D},\)"),
        ({"normk_D": None}, "one of normq_D and normk_D is None, expected both or neither"),
        ({"bv_GD": torch.zeros(G * D).double()}, "bv_GD has dtype torch.float64, expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_block(x, w._replace(**change), cos, sin, BlockOptions(D))
