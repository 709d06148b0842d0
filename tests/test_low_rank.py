"""Additions of low rank (LoRA) to the products of a block: against autograd, and what they keep and compute."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import kept_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import llama_fast as lf
from llama_fast.block import POLICIES, BlockOptions, Cache, Weights, transformer_block
from llama_fast.low_rank import LINEAR, LowRank, kept
from llama_fast.ops import linear

B, T, C, H, G, D, FFN = 2, 19, 64, 4, 2, 16, 112
SIZES = {
    **{"norm1_C": (C,), "wq_HDxC": (H * D, C), "wk_GDxC": (G * D, C), "wv_GDxC": (G * D, C), "wo_CxHD": (C, H * D)},
    **{"norm2_C": (C,), "wgate_FC": (FFN, C), "wup_FC": (FFN, C), "wdown_CF": (C, FFN)},
    **{"bq_HD": (H * D,), "bk_GD": (G * D,), "bv_GD": (G * D,), "normq_D": (D,), "normk_D": (D,)},
}
CHOSEN = {"all": LINEAR, "q and v": ("wq_HDxC", "wv_GDxC"), "down": ("wdown_CF",), "up and o": ("wup_FC", "wo_CxHD")}
RANKS = dict(zip(LINEAR, (1, 2, 3, 8, 5, 6, 7), strict=True))
SCALES = dict(zip(LINEAR, (0.3, -1.0, 2.0, 1.0, 0.5, 1.7, 0.9), strict=True))
DROPOUTS = dict(zip(LINEAR, (0.1, 0.5, 0.0, 0.3, 1.0, 0.7, 0.2), strict=True))


def make(chosen: str, rounded: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Parameters by name, "a NAME" and "b NAME" for what is added: as large as the product, so that a fault shows."""
    drawn, found = torch.Generator().manual_seed(seed), {}
    for name, size in SIZES.items():
        w = torch.randn(size, generator=drawn)
        found[name] = 1 + 0.2 * w if name.startswith("norm") else w / size[-1] ** 0.5 if len(size) == 2 else 0.3 * w
    for name in CHOSEN[chosen]:
        (outputs, inputs), r = SIZES[name], RANKS[name]
        found[f"a {name}"] = torch.randn(r, inputs, generator=drawn) / inputs**0.5
        found[f"b {name}"] = torch.randn(outputs, r, generator=drawn) / r**0.5
    return {name: t.to(rounded) for name, t in found.items()}


def inputs(rounded: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, cos and sin."""
    drawn = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(B, T, C, generator=drawn).to(rounded) for _ in range(2))
    angles = torch.arange(T).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, D // 2)
    return x, dy, angles.cos(), angles.sin()


def added(p: dict[str, Tensor], dropout: bool = False) -> dict[str, LowRank]:
    return {
        name: LowRank(p[f"a {name}"], p[f"b {name}"], SCALES[name], DROPOUTS[name] if dropout else 0.0)
        for name in LINEAR
        if f"a {name}" in p
    }


def weights(p: dict[str, Tensor]) -> Weights:
    return Weights(*(p[name] for name in Weights._fields))


def ours(policy: str = "recompute-cheap", dropout: bool = False, **options: Any) -> Callable[..., Tensor]:
    made = BlockOptions(D, 1e-5, policy, **options)
    return lambda x, p, cos, sin: transformer_block(x, weights(p), cos, sin, made, low_rank=added(p, dropout))


def _dropout(x: Tensor, p: float) -> Tensor:
    """As F.dropout, of the numbers that the block drops."""
    mask = kept(x, p, int(torch.empty((), dtype=torch.int64).random_())) if p else None
    return x if mask is None else x * mask / (1 - round(p * 65536) / 65536 if p < 1 else 1)


def plain(x: Tensor, p: dict[str, Tensor], cos: Tensor, sin: Tensor, dropout: bool = False) -> Tensor:
    """The same block by autograd, in plain PyTorch."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, p[name].shape, p[name], 1e-5)

    def product(x: Tensor, name: str, bias: str | None = None) -> Tensor:
        y = F.linear(x, p[name], None if bias is None else p[bias])
        if f"a {name}" not in p:
            return y
        seen = _dropout(x, DROPOUTS[name]) if dropout else x
        return y + F.linear(F.linear(seen, p[f"a {name}"]), p[f"b {name}"]) * SCALES[name]

    n1 = norm(x, "norm1_C")
    names = (("wq_HDxC", "bq_HD"), ("wk_GDxC", "bk_GD"), ("wv_GDxC", "bv_GD"))
    q, k, v = (product(n1, weight, bias).view(B, T, -1, D) for weight, bias in names)
    with lf.backend("reference"):
        q, k = lf.rope(norm(q, "normq_D"), norm(k, "normk_D"), cos, sin)
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    h = x + product(out, "wo_CxHD")
    n2 = norm(h, "norm2_C")
    return h + product(F.silu(product(n2, "wgate_FC")) * product(n2, "wup_FC"), "wdown_CF")


def run(
    block: Callable[..., Tensor], chosen: str, dtype: torch.dtype, rounded: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """y, dx and the gradients of all parameters, from numbers that `rounded` holds."""
    p = {name: t.to(dtype).requires_grad_() for name, t in make(chosen, rounded, seed).items()}
    x, dy, cos, sin = inputs(rounded, seed + 1)
    x = x.to(dtype).requires_grad_()
    torch.manual_seed(seed)
    y = block(x, p, cos, sin)
    torch.rand(7)  # the backward draws what the forward drew, whatever came between
    found = [y.detach(), *torch.autograd.grad(y, [x, *p.values()], dy.to(dtype))]
    return dict(zip(["y", "x", *p], found, strict=True))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chosen", CHOSEN)
def test_equal_in_float64(chosen: str, policy: str, dropout: bool) -> None:
    blocks = ours(policy, dropout), functools.partial(plain, dropout=dropout)
    found, want = (run(block, chosen, torch.float64, torch.float64) for block in blocks)
    assert found.keys() == want.keys()
    for name, exact in want.items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_seeds_the_errors_are_no_larger_than_autograd_s(dtype: torch.dtype, dropout: bool) -> None:
    """The mean logarithm of the errors' quotient is at most 0, up to three standard errors: of the result, of the
    block's gradients, and of those of what is added."""
    n, groups = 12, {"y": [], "block": [], "added": []}  # type: ignore[var-annotated]
    rms = lambda t: t.double().square().mean().sqrt().item()  # noqa: E731
    for seed in range(n):
        eager = functools.partial(plain, dropout=dropout)
        found, theirs = (run(block, "all", dtype, dtype, seed) for block in (ours(dropout=dropout), eager))
        truth = run(eager, "all", torch.float64, dtype, seed)
        ratio = {k: math.log(rms(found[k] - t) / rms(theirs[k] - t)) for k, t in truth.items() if t.any()}
        groups["y"].append(ratio.pop("y"))
        groups["added"].append(statistics.mean(ratio[k] for k in ratio if " " in k))
        groups["block"].append(statistics.mean(ratio[k] for k in ratio if " " not in k))
    for name, errors in groups.items():
        assert statistics.mean(errors) <= 3 * statistics.stdev(errors) / n**0.5, name


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_more_is_kept_than_without(policy: str, dropout: bool) -> None:
    p, (x, _, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    x.requires_grad_()
    block = ours(policy, dropout)
    with_, without = (
        kept_bytes(lambda given=given: block(x, given, cos, sin), *p.values(), cos, sin)  # type: ignore[misc]
        for given in (p, {name: p[name] for name in SIZES})
    )
    assert with_ == without > 0


@pytest.mark.parametrize("part", ["a", "b", "a and b"])
@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_parameters_get_no_gradient(policy: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is computed: of the products with the weights' shapes, the backward does the nn alone."""
    want = run(plain, "all", torch.float64, torch.float64)
    p, (x, dy, cos, sin) = make("all", torch.float64), inputs(torch.float64)
    for name, t in p.items():
        t.requires_grad_(" " in name and name[0] in part.split(" and "))
    shapes, tn = [], linear.tn

    def noted(dy: Tensor, x: Tensor, **given: Any) -> Tensor:
        shapes.append((dy.shape[1], x.shape[1]))
        return tn(dy, x, **given)

    monkeypatch.setattr(linear, "tn", noted)
    ours(policy)(x, p, cos, sin).backward(dy)
    assert len(shapes) == len(LINEAR) * len(part.split(" and "))
    assert all(min(shape) < 16 for shape in shapes)
    for name, t in p.items():
        assert (t.grad is not None) == t.requires_grad
        if t.grad is not None:
            torch.testing.assert_close(t.grad, want[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("path", ["torch", "brgemm"])
def test_float32_beside_bfloat16_weights(path: str) -> None:
    """As PEFT keeps them: gradients in float32, rounded to it alone where the products' path can."""
    truth = run(plain, "all", torch.float64, torch.bfloat16)
    p, (x, dy, cos, sin) = make("all", torch.bfloat16), inputs(torch.bfloat16)
    p = {name: (t.float() if " " in name else t).requires_grad_(" " in name) for name, t in p.items()}
    with linear.force(path):
        y = ours()(x, p, cos, sin)
        assert y.dtype == torch.bfloat16
        y.backward(dy)
    for name, t in p.items():
        if t.grad is not None:
            assert t.grad.dtype == torch.float32
            if path == "brgemm" and torch.bfloat16 in linear._has_brgemm:
                assert not torch.equal(t.grad, t.grad.bfloat16().float())
            error = (t.grad.double() - truth[name]).square().mean().sqrt()
            assert error < 0.03 * truth[name].square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_beside_float32_weights(dtype: torch.dtype) -> None:
    """The product s B has the precision of the computation, not that of B."""
    truth = run(plain, "all", torch.float64, dtype)
    p, (x, dy, cos, sin) = make("all", dtype), inputs(dtype)
    p = {name: (t if " " in name else t.float()).requires_grad_(" " in name) for name, t in p.items()}
    x = x.float().requires_grad_()
    y = ours()(x, p, cos, sin)
    y.backward(dy.float())
    assert x.grad is not None
    torch.testing.assert_close(y.double(), truth["y"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), truth["x"], rtol=1e-4, atol=1e-4 * float(truth["x"].abs().max()))


@pytest.mark.parametrize("keep_residual", [False, True])
def test_autocast(keep_residual: bool) -> None:
    truth = run(plain, "all", torch.float64, torch.float32)
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    p = {name: t.requires_grad_() for name, t in p.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(keep_residual=keep_residual)(x.requires_grad_(), p, cos, sin)
    y.backward(dy.to(y.dtype))
    for name, t in (("x", x), *p.items()):
        assert t.grad is not None
        assert t.grad.dtype == torch.float32
        error = (t.grad.double() - truth[name]).square().mean().sqrt()
        assert error < 0.04 * truth[name].square().mean().sqrt(), name


def test_compiles_without_graph_break() -> None:
    torch.compiler.reset()
    found = run(torch.compile(ours(), fullgraph=True, backend="aot_eager"), "all", torch.float64, torch.float64)
    for name, exact in run(plain, "all", torch.float64, torch.float64).items():
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=name)


def test_dropout_is_refused_under_torch_compile() -> None:
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"dropout is 0.1 under torch.compile, expected 0"):
        run(torch.compile(ours(dropout=True), fullgraph=True, backend="aot_eager"), "all", torch.float64, torch.float64)


def test_a_selective_checkpoint_keeps_what_a_product_gave() -> None:
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    given = [x.requires_grad_(), *(t.requires_grad_() for t in p.values())]
    expected = torch.autograd.grad(ours()(x, p, cos, sin), given, dy)
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    y = checkpoint(ours(), x, p, cos, sin, use_reentrant=False, context_fn=kept)
    for got, want in zip(torch.autograd.grad(y, given, dy), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_what_a_dropout_keeps() -> None:
    """As many as it should, each number for itself; none depends on its neighbours or on the next call's."""
    n = 1_000_003
    for p in (1e-4, 0.05, 0.3, 0.5, 0.99):
        masks = [kept(torch.empty(n), p, seed) for seed in (1, 2)]
        first, second = (m.double() - (1 - p) for m in masks if m is not None)
        sigma = math.sqrt(p * (1 - p) / n)
        assert abs(first.mean()) < 4 * sigma + 1 / 65536, p
        others = (second, *(first.roll(lag) for lag in range(1, 9)))
        assert all(abs((first * other).mean()) < 5 * p * (1 - p) / n**0.5 for other in others), p
    assert kept(torch.empty(3, 5), 0.0, 1) is None
    assert not kept(torch.empty(3, 5), 1.0, 1).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_backward_leaves_the_generator_alone(policy: str) -> None:
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    before = torch.get_rng_state()
    y = ours(policy, dropout=True)(x.requires_grad_(), p, cos, sin)
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    y.backward(dy)
    assert torch.equal(torch.get_rng_state(), after)


def test_dropout_of_tensors_without_numbers() -> None:
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(t).requires_grad_() for t in (x, *p.values())]
        y = ours(dropout=True)(given[0], dict(zip(p, given[1:], strict=True)), cos, sin)
        found = torch.autograd.grad(y, given, mode.from_tensor(dy))
    assert [t.shape for t in found] == [t.shape for t in given]
    on_meta = {name: t.to("meta") for name, t in p.items()}
    assert ours(dropout=True)(x.to("meta"), on_meta, cos.to("meta"), sin.to("meta")).is_meta


def test_dropout_where_the_input_alone_has_a_gradient() -> None:
    want = run(functools.partial(plain, dropout=True), "all", torch.float64, torch.float64)
    p, (x, dy, cos, sin) = make("all", torch.float64), inputs(torch.float64)
    torch.manual_seed(0)
    y = ours(dropout=True)(x.requires_grad_(), p, cos, sin)
    torch.testing.assert_close(*torch.autograd.grad(y, x, dy), want["x"], rtol=1e-9, atol=1e-9)


def test_dropout_of_a_checkpoint_and_of_no_rows() -> None:
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    given, block = [x.requires_grad_(), *(t.requires_grad_() for t in p.values())], ours(dropout=True)
    found = []
    for call in (block, functools.partial(checkpoint, block, use_reentrant=False)):
        torch.manual_seed(4)
        found.append(torch.autograd.grad(call(x, p, cos, sin), given, dy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert block(x[:, :0], p, cos[:0], sin[:0]).shape == (B, 0, C)


def test_a_graph_that_is_retained_gives_the_same_twice() -> None:
    p, (x, dy, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    given = [x.requires_grad_(), *(t.requires_grad_() for t in p.values())]
    y = ours(dropout=True)(x, p, cos, sin)
    first, second = (torch.autograd.grad(y, given, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_by_row_decode_is_the_whole() -> None:
    p, (x, _, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    cache = Cache(torch.full((B, T, G, D), torch.nan), torch.full((B, T, G, D), torch.nan), 0)
    whole = transformer_block(x, weights(p), cos, sin, BlockOptions(D), low_rank=added(p))
    torch.testing.assert_close(whole, plain(x, p, cos, sin), rtol=1e-4, atol=1e-4)
    for t in range(T):
        i = slice(t, t + 1)
        now = cache._replace(used=t)
        y = transformer_block(x[:, i], weights(p), cos[i], sin[i], BlockOptions(D), cache=now, low_rank=added(p))
        torch.testing.assert_close(y, whole[:, i], rtol=1e-4, atol=1e-4)


class _Split:
    """Collectives of a block that is split over two devices, by name alone."""

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor) -> Tensor:
        return x


def test_bad_input_is_named() -> None:
    p, (x, _, cos, sin) = make("all", torch.float32), inputs(torch.float32)
    good = added(p)["wq_HDxC"]
    for changed, message in (
        ({"norm1_C": good}, r"low_rank has 'norm1_C', expected one of wq_HDxC, "),
        ({"wq_HDxC": (good.a_rC, good.b_Vr)}, r"low_rank\['wq_HDxC'\] is a tuple, expected a LowRank"),
        ({"wq_HDxC": good._replace(a_rC=None)}, r"low_rank\['wq_HDxC'\].a_rC is a NoneType, expected a torch.Tensor"),
        ({"wq_HDxC": good._replace(a_rC=torch.ones(1, 9))}, r"a_rC has shape \(1, 9\), expected \[r, 64\], r >= 1"),
        ({"wq_HDxC": good._replace(a_rC=torch.ones(0, C))}, r"a_rC has shape \(0, 64\), expected \[r, 64\], r >= 1"),
        ({"wq_HDxC": good._replace(b_Vr=torch.ones(C, 2))}, r"b_Vr has shape \(64, 2\), expected \(64, 1\)"),
        ({"wq_HDxC": good._replace(b_Vr=torch.ones(C, 1).int())}, r"b_Vr has dtype torch.int32, expected a float type"),
        ({"wq_HDxC": good._replace(a_rC=torch.ones(1, C, device="meta"))}, r"a_rC is on meta, expected cpu as x"),
        ({"wq_HDxC": good._replace(scale=math.nan)}, r"low_rank\['wq_HDxC'\].scale is nan, expected a finite number"),
        ([good], "low_rank is a list, expected a mapping of names to LowRank"),
        (good, "low_rank is a LowRank, expected a mapping of names to LowRank"),
        (1, "low_rank is a int, expected a mapping of names to LowRank"),
        ({"wq_HDxC": good._replace(a_rC=good.a_rC.to(torch.float8_e5m2))}, r"a_rC has dtype torch.float8_e5m2, "),
        ({"wq_HDxC": good._replace(scale=torch.ones(2))}, r"'wq_HDxC'\].scale is a Tensor, expected a finite number"),
        ({"wq_HDxC": good._replace(scale=torch.ones(()))}, r"'wq_HDxC'\].scale is a Tensor, expected a finite number"),
        ({"wq_HDxC": good._replace(scale="1")}, r"low_rank\['wq_HDxC'\].scale is '1', expected a finite number"),
        ({"wq_HDxC": good._replace(dropout=-0.1)}, r"\.dropout is -0.1, expected a probability from 0 to 1"),
        ({"wq_HDxC": good._replace(dropout=torch.tensor(0.1))}, r"\.dropout is a Tensor, expected a probability"),
        ({"wq_HDxC": good._replace(dropout=math.nan)}, r"\.dropout is nan, expected a probability from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_block(x, weights(p), cos, sin, BlockOptions(D), low_rank=changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low_rank is given to a block that is split over devices, expected None"):
        transformer_block(x, weights(p), cos, sin, BlockOptions(D, collectives=_Split()), low_rank=added(p))
