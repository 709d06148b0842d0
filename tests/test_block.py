"""The block's hand-written backward against autograd of the plain block, for each policy; bytes kept; ways to call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import TARGETS, kept_bytes, target
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llama_fast import block_attention, plain
from llama_fast.block import POLICIES, BlockOptions, Cache, Weights, transformer_block
from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.ops import linear, reference
from llama_fast.verify import BACKWARD_FACTOR, FORWARD_FACTOR, judge

CONFIG = LlamaConfig(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, ffn_dim=80, vocab_size=32, max_seq_len=64)
WIDE = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=176, vocab_size=32, max_seq_len=64)
B, T = 2, 19


def _plain_block(config: LlamaConfig, dtype: torch.dtype) -> plain.PlainLlama:
    model = plain.PlainLlama(config).to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for p in model.layers.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1.0 + 0.1 * noise if p.ndim == 1 else noise / p.shape[1] ** 0.5)
    return model


def _weights(layer: torch.nn.Module) -> Weights:
    a, m = layer.self_attn, layer.mlp
    return Weights(
        layer.input_layernorm.weight,
        a.q_proj.weight,
        a.k_proj.weight,
        a.v_proj.weight,
        a.o_proj.weight,
        layer.post_attention_layernorm.weight,
        m.gate_proj.weight,
        m.up_proj.weight,
        m.down_proj.weight,
    )


def _inputs(config: LlamaConfig, dtype: torch.dtype, length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.randn(B, length, config.dim, generator=generator) for _ in range(2))
    return x.to(dtype).requires_grad_(), dy.to(dtype)


def _run_plain(config: LlamaConfig, dtype: torch.dtype, x: Tensor, dy: Tensor, rounded: torch.dtype) -> list[Tensor]:
    """y, dx and weight gradients by autograd, in `dtype`, from weights and inputs rounded to `rounded`."""
    layer = _plain_block(config, rounded).to(dtype).layers[0]
    leaf = x.detach().to(dtype).requires_grad_()
    cos, sin = rope_cos_sin(config, x.shape[1])
    y = layer(leaf, cos.to(dtype), sin.to(dtype))
    return [y.detach(), *torch.autograd.grad(y, [leaf, *_weights(layer).given()], dy.to(dtype))]


def _run_ours(config: LlamaConfig, dtype: torch.dtype, x: Tensor, dy: Tensor, policy: str) -> list[Tensor]:
    layer = _plain_block(config, dtype).layers[0]
    options = BlockOptions(config.head_dim, config.norm_eps, policy)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(config, x.shape[1]), options)
    return [y.detach(), *torch.autograd.grad(y, [x, *_weights(layer).given()], dy)]


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_equal_autograd_in_float64(policy: str) -> None:
    x, dy = _inputs(CONFIG, torch.float64)
    truth = _run_plain(CONFIG, torch.float64, x, dy, torch.float64)
    for ours, exact in zip(_run_ours(CONFIG, torch.float64, x, dy, policy), truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradcheck(policy: str) -> None:
    config = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=6, vocab_size=8, max_seq_len=8)
    layer = _plain_block(config, torch.float64).layers[0]
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_cos_sin(config, 3)
    options = BlockOptions(config.head_dim, policy=policy)
    assert torch.autograd.gradcheck(
        lambda x, *w: transformer_block(x, Weights(*w), cos, sin, options), (x, *_weights(layer).given())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_error_is_within_the_budget(target_name: str, dtype: torch.dtype) -> None:
    x, dy = _inputs(WIDE, dtype)
    truth = _run_plain(WIDE, torch.float64, x, dy, dtype)
    theirs = _run_plain(WIDE, dtype, x, dy, dtype)
    for policy in POLICIES:
        with target(target_name):
            found = _run_ours(WIDE, dtype, x, dy, policy)
        for name, a, b, exact in zip(("y", "dx", *Weights._fields[:9]), found, theirs, truth, strict=True):
            factor = FORWARD_FACTOR if name == "y" else BACKWARD_FACTOR
            *_, problem = judge(a, b, exact, factor, dtype)
            assert not problem, f"{policy} {name}: {problem}"


def _saved_bytes(policy: str, **options: bool) -> int:
    """Bytes that one block holds between forward and backward, parameters and rotary tables aside, by storage."""
    x, _ = _inputs(WIDE, torch.float32)
    layer = _plain_block(WIDE, torch.float32).layers[0]
    cos, sin = rope_cos_sin(WIDE, T)
    made = BlockOptions(WIDE.head_dim, policy=policy, **options)
    weights = _weights(layer)
    return kept_bytes(lambda: transformer_block(x, weights, cos, sin, made), *weights.given(), cos, sin)


def test_bytes_kept_by_policy() -> None:
    C, F, H, D, G = WIDE.dim, WIDE.ffn_dim, WIDE.n_heads, WIDE.head_dim, WIDE.n_kv_heads
    rows, item = B * T, 4
    statistics = rows * 4 * (2 + H)
    cheap = rows * item * (2 * C + 2 * H * D + 2 * G * D + 2 * F) + statistics
    assert _saved_bytes("recompute-all") == rows * item * C
    assert _saved_bytes("recompute-linear") == rows * (item * (C + H * D) + 4 * H)
    assert _saved_bytes("recompute-cheap") == cheap
    assert _saved_bytes("save") == cheap + rows * item * (2 * C + F)
    halves, residual = (cheap - statistics) // 2 + statistics, rows * 2 * 2 * C
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _saved_bytes("recompute-cheap") == halves
        assert _saved_bytes("recompute-cheap", keep_residual=True) == halves + residual


@pytest.mark.parametrize(
    ("policy", "products", "attention"),
    [("save", 0, 0), ("recompute-cheap", 0, 0), ("recompute-linear", 6, 0), ("recompute-all", 6, 1)],
)
def test_what_a_backward_does_again(
    policy: str, products: int, attention: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim, policy=policy))
    calls: list[str] = []

    def watched(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(name), f(*args, **kwargs))[1]

    monkeypatch.setattr(linear, "nt", watched("product", linear.nt))
    monkeypatch.setattr(block_attention, "_attention_fwd", watched("attention", block_attention._attention_fwd))
    y.backward(dy)
    assert (calls.count("product"), calls.count("attention")) == (products, attention)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_leaves_saved_tensors_alone_and_repeats(policy: str) -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim, policy=policy))
    inputs = [x, *_weights(layer).given()]
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_graph_that_is_not_retained_is_released_and_says_so() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim))
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim))
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_that_is_selective_or_part_of_a_graph(policy: str) -> None:
    """The one keeps products, which must not change then; both give what was saved once."""
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    options, inputs = BlockOptions(WIDE.head_dim, policy=policy), [x, *_weights(layer).given()]

    def run(x: Tensor) -> Tensor:
        return transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), options)

    expected = torch.autograd.grad(run(x), inputs, dy)
    kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False, context_fn=kept), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), inputs, dy, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="differentiable once"):
        found[0].sum().backward()


def test_frozen_weights_get_no_gradient_and_others_stay_right() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    full = _run_ours(WIDE, torch.float32, x, dy, "recompute-cheap")
    layer.requires_grad_(False)
    layer.self_attn.q_proj.weight.requires_grad_(True)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim))
    y.backward(dy)
    assert torch.equal(x.grad, full[1])
    assert torch.equal(layer.self_attn.q_proj.weight.grad, full[3])
    assert layer.mlp.up_proj.weight.grad is None


def test_expanded_gradient_and_accumulation() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, _ = _inputs(WIDE, torch.float32)
    for _ in range(2):
        y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim))
        y.sum().backward()
    once = _run_ours(WIDE, torch.float32, x, torch.ones_like(x), "recompute-cheap")
    torch.testing.assert_close(x.grad, 2 * once[1])
    torch.testing.assert_close(layer.mlp.up_proj.weight.grad, 2 * once[9])


def test_packed_sequences_equal_separate_ones() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, _ = _inputs(WIDE, torch.float32)
    cos, sin = rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim)
    separate = transformer_block(x, _weights(layer), cos, sin, options)
    packed = transformer_block(
        x.reshape(1, B * T, -1),
        _weights(layer),
        cos.repeat(B, 1),
        sin.repeat(B, 1),
        options,
        cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32),
    )
    torch.testing.assert_close(packed.view_as(separate), separate)


def test_cache_continues_where_it_stopped() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, _ = _inputs(WIDE, torch.float32)
    cos, sin = rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim)
    room = torch.empty(2, B, T, WIDE.n_kv_heads, WIDE.head_dim)
    with torch.no_grad():
        whole = transformer_block(x, _weights(layer), cos, sin, options)
        parts, used = [], 0
        for length in (11, 1, 7):
            span = slice(used, used + length)
            cache = Cache(room[0], room[1], used)
            parts.append(transformer_block(x[:, span], _weights(layer), cos[span], sin[span], options, cache=cache))
            used += length
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    with pytest.raises(ValueError, match="cache is given while gradients are recorded"):
        transformer_block(x[:, :1], _weights(layer), cos[:1], sin[:1], options, cache=Cache(room[0], room[1], 0))


def test_any_cache_that_appends_will_do() -> None:
    class Growing:
        rows: tuple[Tensor, ...] = ()

        def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self.rows = tuple(map(torch.cat, zip(self.rows, (k, v), strict=True), (1, 1))) if self.rows else (k, v)
            return self.rows

    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, _ = _inputs(WIDE, torch.float32)
    cos, sin = rope_cos_sin(WIDE, T)
    options, cache = BlockOptions(WIDE.head_dim), Growing()
    with torch.no_grad():
        whole = transformer_block(x, _weights(layer), cos, sin, options)
        parts = [
            transformer_block(x[:, a:b], _weights(layer), cos[a:b], sin[a:b], options, cache=cache)
            for a, b in ((0, 11), (11, 12), (12, T))
        ]
        with pytest.raises(ValueError, match="return_keys is True beside a cache"):
            transformer_block(x, _weights(layer), cos, sin, options, cache=cache, return_keys=True)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_keys_and_values_are_taken_in(policy: str) -> None:
    layer = _plain_block(CONFIG, torch.float64).layers[0]
    x, dy = _inputs(CONFIG, torch.float64)
    cos, sin = rope_cos_sin(CONFIG, T)
    w = _weights(layer)
    leaves = [x, *w.given()]
    y, k, v = transformer_block(x, w, cos, sin, BlockOptions(CONFIG.head_dim, policy=policy), return_keys=True)
    dk, dv = (torch.randn(k.shape, generator=torch.Generator().manual_seed(n)).double() for n in (1, 2))
    n1 = reference.rms_norm(x, w.norm1_C, CONFIG.norm_eps)
    their_k, their_v = ((n1 @ m.T).unflatten(-1, (CONFIG.n_kv_heads, CONFIG.head_dim)) for m in (w.wk_GDxC, w.wv_GDxC))
    their_k = reference.rope(their_k, their_k, cos, sin)[1]
    torch.testing.assert_close((k, v), (their_k, their_v), rtol=1e-9, atol=1e-9)
    their_y = layer(x, cos.double(), sin.double())
    for which, douts in (((0, 1, 2), (dy, dk, dv)), ((1,), (dk,)), ((0, 2), (dy, dv))):
        got, want = (
            torch.autograd.grad([outs[i] for i in which], leaves, douts, retain_graph=True, allow_unused=True)
            for outs in ((y, k, v), (their_y, their_k, their_v))
        )
        for one, other, leaf in zip(got, want, leaves, strict=True):
            other = torch.zeros_like(leaf) if other is None else other  # noqa: PLW2901
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_cache_that_does_not_fit_is_named() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0].requires_grad_(False)
    cos, sin = rope_cos_sin(WIDE, 1)
    x, room = torch.randn(B, 1, WIDE.dim), torch.empty(B, 4, WIDE.n_kv_heads, WIDE.head_dim)
    options = BlockOptions(WIDE.head_dim)
    for cache, message in (
        (Cache(room, room, 4), r"cache.k_BSGD has shape \(2, 4, 2, 16\), expected \(2, 5, 2, 16\)"),
        (Cache(room, room[:1], 0), r"cache.v_BSGD has shape \(1, 4, 2, 16\)"),
        (Cache(room[..., :8], room, 0), r"cache.k_BSGD has shape \(2, 4, 2, 8\)"),
        (Cache(room, room.bfloat16(), 0), "cache.v_BSGD has dtype torch.bfloat16, expected torch.float32"),
        (Cache(room, room, -1), "cache.used is -1, expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_block(x, _weights(layer), cos, sin, options, cache=cache)


def test_what_stands_beside_a_cache_is_no_packed_sequence_and_no_second_span() -> None:
    """Of one row, which a block of few rows takes, and of more."""
    layer = _plain_block(WIDE, torch.float32).layers[0].requires_grad_(False)
    options, room = BlockOptions(WIDE.head_dim), torch.randn(1, 40, WIDE.n_kv_heads, WIDE.head_dim)
    for length in (1, 9):
        x, (cos, sin) = torch.randn(1, length, WIDE.dim), rope_cos_sin(WIDE, length)
        call = functools.partial(transformer_block, x, _weights(layer), cos, sin, options)
        before = room.clone()
        with pytest.raises(ValueError, match="cu_seqlens is given beside a cache, expected one of the two"):
            call(cu_seqlens=torch.tensor([0, length], dtype=torch.int32), cache=Cache(room, room, 3))
        with pytest.raises(ValueError, match=r"spans are given beside cache.starts, expected one of the two"):
            call(spans=((0, 5),), cache=Cache(room, room, 3, (1,)))
        assert torch.equal(room, before)


@pytest.mark.parametrize("length", [1, 9])
def test_tangents_do_not_go_into_a_cache(length: int) -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0].requires_grad_(False)
    room, x = torch.zeros(1, length, WIDE.n_kv_heads, WIDE.head_dim), torch.randn(1, length, WIDE.dim)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="cache is given while gradients are recorded"):
            transformer_block(
                dual, _weights(layer), *rope_cos_sin(WIDE, length), BlockOptions(16), cache=Cache(room, room, 0)
            )


@pytest.mark.parametrize("length", [1, 9])
def test_what_a_cache_gives_is_checked(length: int) -> None:
    """The kernels read it by the shape and dtype of the queries."""

    class Giving:
        def __init__(self, change: Callable[[Tensor, Tensor], Any]) -> None:
            self.append = change

    layer = _plain_block(WIDE, torch.float32).layers[0].requires_grad_(False)
    x, (cos, sin) = torch.randn(1, length, WIDE.dim), rope_cos_sin(WIDE, length)
    for change, message in (
        (lambda k, v: (k.bfloat16(), v.bfloat16()), "gave k in torch.bfloat16 on cpu, expected torch.float32 on cpu"),
        (lambda k, v: (k, v.to("meta")), "gave v in torch.float32 on meta, expected torch.float32 on cpu"),
        (lambda k, v: (torch.cat((k, k), 1), v), rf"gave v of shape \(1, {length}, 2, 16\), expected \[B, S, G, D\]"),
        (lambda k, v: (k[:, 1:], v[:, 1:]), rf"gave k of shape .*, expected .* one S of {length} or more"),
        (
            lambda k, v: (k[:, :, :1], v[:, :, :1]),
            rf"gave k of shape \(1, {length}, 1, 16\), expected .* G = 2, D = 16",
        ),
        (lambda k, v: (k[..., :8], v[..., :8]), "gave k of shape"),
        (lambda k, v: (k[:0], v[:0]), "gave k of shape .*, expected .* with B = 1"),
        (lambda k, v: (k[0], v[0]), "gave k of shape"),
        (lambda k, v: None, "gave a NoneType, expected two tensors, k and v"),
    ):
        with pytest.raises(ValueError, match=f"block: cache.append {message}"):
            transformer_block(x, _weights(layer), cos, sin, BlockOptions(WIDE.head_dim), cache=Giving(change))


def test_rotary_tables_of_another_float_type_are_converted() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, (cos, sin) = _inputs(WIDE, torch.float32)[0], rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim)
    rounded = transformer_block(x, _weights(layer), cos.bfloat16(), sin.bfloat16(), options)
    assert torch.equal(
        rounded, transformer_block(x, _weights(layer), cos.bfloat16().float(), sin.bfloat16().float(), options)
    )
    with pytest.raises(ValueError, match=r"cos has dtype torch.int64, expected a float type"):
        transformer_block(x, _weights(layer), cos.long(), sin, options)


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), BlockOptions(WIDE.head_dim))
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    exact = _run_plain(WIDE, torch.float64, x, dy.bfloat16(), torch.float32)
    for got, want in zip([x.grad, *(p.grad for p in _weights(layer).given())], exact[1:], strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("policy", POLICIES)
def test_autocast_can_keep_the_residual_stream(policy: str) -> None:
    """Then it is not rounded, and x's gradient neither; without autocast the option changes nothing."""
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    truth = _run_plain(WIDE, torch.float64, x, dy, torch.float32)
    errors = {}
    for keep in (False, True):
        options = BlockOptions(WIDE.head_dim, WIDE.norm_eps, policy, keep_residual=keep)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), options)
        found = [y.detach(), *torch.autograd.grad(y, [x, *_weights(layer).given()], dy.to(y.dtype))]
        assert found[0].dtype == (torch.float32 if keep else torch.bfloat16)
        assert all(g.dtype == torch.float32 for g in found[1:])
        errors[keep] = [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
        assert max(errors[keep]) < 0.02
    assert errors[True][0] < 0.9 * errors[False][0]
    keeps = BlockOptions(WIDE.head_dim, WIDE.norm_eps, policy, keep_residual=True)
    y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), keeps)
    assert torch.equal(y, _run_ours(WIDE, torch.float32, x, dy, policy)[0])
    with torch.no_grad():  # nothing is added to the stream: it and its gradient pass bit for bit
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, T), keeps)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)


def test_autocast_leaves_float64_alone() -> None:
    x, dy = _inputs(WIDE, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _run_ours(WIDE, torch.float64, x, dy, "recompute-cheap")
    for got, want in zip(found, _run_plain(WIDE, torch.float64, x, dy, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


SPANS = ((4, T), (2, T - 5))


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_padded_rows_are_what_each_is_alone(policy: str, window: int) -> None:
    layer = _plain_block(WIDE, torch.float64).layers[0]
    w = _weights(layer)
    x, dy = _inputs(WIDE, torch.float64)
    cos, sin = rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim, WIDE.norm_eps, policy, window)
    spans = ((4, T), (0, T)) if window else SPANS
    y = transformer_block(x, w, cos, sin, options, spans=spans)
    inside = torch.zeros(B, T, 1, dtype=torch.bool)
    alone = []
    for b, (begin, end) in enumerate(spans):
        inside[b, begin:end] = True
        alone.append(transformer_block(x[b : b + 1, begin:end], w, cos[begin:end], sin[begin:end], options))
        torch.testing.assert_close(y[b : b + 1, begin:end], alone[b], rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(y, [x, *w.given()], dy * inside)
    parts = [dy[b : b + 1, begin:end] for b, (begin, end) in enumerate(spans)]
    for got, want in zip(found, torch.autograd.grad(alone, [x, *w.given()], parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_padded_rows() -> None:
    """Queries before and beyond their row's span too."""
    config = LlamaConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=6, vocab_size=8, max_seq_len=8)
    layer = _plain_block(config, torch.float64).layers[0]
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rope_cos_sin(config, 4)
    options, spans = BlockOptions(config.head_dim), ((1, 4), (1, 3), (2, 2))
    assert torch.autograd.gradcheck(
        lambda x, *w: transformer_block(x, Weights(*w), cos, sin, options, spans=spans), (x, *_weights(layer).given())
    )


def test_empty_batch_and_empty_sequence() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    for shape in ((0, 5), (2, 0)):
        x = torch.zeros(*shape, WIDE.dim, requires_grad=True)
        y = transformer_block(x, _weights(layer), *rope_cos_sin(WIDE, shape[1]), BlockOptions(WIDE.head_dim))
        assert y.shape == x.shape
        y.sum().backward()
        assert float(layer.mlp.up_proj.weight.grad.abs().sum()) == 0.0


def test_compiles_without_graph_break() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    x, dy = _inputs(WIDE, torch.float32)
    cos, sin = rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim)
    compiled = torch.compile(
        lambda x: transformer_block(x, _weights(layer), cos, sin, options), fullgraph=True, backend="aot_eager"
    )
    eager = _run_ours(WIDE, torch.float32, x, dy, "recompute-cheap")
    y = compiled(x)
    torch.testing.assert_close(y, eager[0])
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], eager[1])


def test_bad_input_names_argument_value_and_expectation() -> None:
    layer = _plain_block(WIDE, torch.float32).layers[0]
    w = _weights(layer)
    x, _ = _inputs(WIDE, torch.float32)
    cos, sin = rope_cos_sin(WIDE, T)
    options = BlockOptions(WIDE.head_dim)
    expected = "expected one of save, recompute-cheap, recompute-linear, recompute-all"
    with pytest.raises(ValueError, match=f"policy is 'all', {expected}"):
        BlockOptions(WIDE.head_dim, policy="all")
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\), expected \[B, T, C\]"):
        transformer_block(x[:, 0], w, cos, sin, options)
    with pytest.raises(ValueError, match=r"wq_HDxC has shape \(64, 63\), expected \(64, 64\)"):
        transformer_block(x, w._replace(wq_HDxC=w.wq_HDxC[:, 1:]), cos, sin, options)
    with pytest.raises(ValueError, match=r"cos has shape \(1, 18, 8\)"):
        transformer_block(x, w, cos[1:], sin[1:], options)
    rows = [t.expand(B, T, -1) for t in (cos, sin)]
    for some, other, message in (
        (rows[0], rows[1][:1], r"sin has shape \(1, 19, 8\), expected \(2, 19, 8\) as cos"),
        (rows[0][:1], rows[1], r"sin has shape \(2, 19, 8\), expected \(1, 19, 8\) as cos"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_block(x, w, some, other, options)
    with pytest.raises(ValueError, match=r"head_dim is 24"):
        transformer_block(x, w, cos, sin, BlockOptions(24))
    for spans in (((0, 3),), ((0, 3), (5, 4)), ((-1, 3), (0, 3))):
        with pytest.raises(ValueError, match=r"spans is .*, expected 2 pairs \(begin, end\) with 0 <= begin <= end"):
            transformer_block(x, w, cos, sin, options, spans=spans)
    with pytest.raises(ValueError, match=f"spans is .* beside a window of 4, expected each to end at key {T}"):
        transformer_block(x, w, cos, sin, BlockOptions(WIDE.head_dim, window=4), spans=((0, 3), (0, T)))
    with pytest.raises(ValueError, match=r"cos is a NoneType, expected a torch.Tensor"):
        transformer_block(x, w, None, sin, options)
    with pytest.raises(ValueError, match=r"norm2_C is a NoneType, expected a torch.Tensor"):
        transformer_block(x, w._replace(norm2_C=None), cos, sin, options)
    with pytest.raises(ValueError, match=r"x has B = 2, expected 1 with cu_seqlens"):
        transformer_block(x, w, cos, sin, options, cu_seqlens=torch.tensor([0, T], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \(2,\) and dtype torch.int64, expected \[N \+ 1\]"):
        transformer_block(x, w, cos, sin, options, cu_seqlens=torch.tensor([0, T]))
    for bounds in ([], [0], [1, T], [0, T + 1], [0, 5, 3, T]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            transformer_block(x[:1], w, cos, sin, options, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"norm1_C has dtype torch.float64, expected torch.float32 as x"):
        transformer_block(x, w._replace(norm1_C=w.norm1_C.double()), cos, sin, options)
    for wrong, message in (
        ({"head_dim": 5}, "head_dim is 5, expected an even number >= 2"),
        ({"head_dim": None}, "head_dim is None, expected an even number >= 2"),
        ({"eps": -1.0}, "eps is -1.0, expected a number >= 0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"window": -3}, r"window is -3, expected 0 or a number of keys up to 1073741824"),
        ({"window": 2.5}, "window is 2.5"),
        ({"interleaved": "yes"}, "interleaved is 'yes', expected True or False"),
        ({"keep_residual": None}, "keep_residual is None, expected True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockOptions(**{"head_dim": 16, **wrong})


def test_tensors_of_another_device_are_named() -> None:
    """The kernels read what they are given the address of."""
    layer = _plain_block(WIDE, torch.float32).layers[0].requires_grad_(False)
    x, options = torch.randn(1, T, WIDE.dim), BlockOptions(WIDE.head_dim)
    room = torch.empty(1, T, WIDE.n_kv_heads, WIDE.head_dim)
    good = {"cos": rope_cos_sin(WIDE, T)[0], "sin": rope_cos_sin(WIDE, T)[1]}
    for name, wrong in (
        ("cos", {"cos": good["cos"].to("meta")}),
        ("sin", {"sin": good["sin"].to("meta")}),
        ("norm2_C", {"weights": _weights(layer)._replace(norm2_C=_weights(layer).norm2_C.to("meta"))}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, T], dtype=torch.int32, device="meta")}),
        ("cache.v_BSGD", {"cache": Cache(room, room.to("meta"), 0)}),
    ):
        with pytest.raises(ValueError, match=f"block: {name} is on meta, expected cpu as x"):
            transformer_block(x, **{"weights": _weights(layer), **good, **wrong}, options=options)
