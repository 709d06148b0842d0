"""The layers of lf.nn as modules: what is replaced, changed or hooked within a TransformerBlock takes effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import llama_fast as lf
from llama_fast.config import rope_cos_sin
from llama_fast.generate import KVCache
from llama_fast.ops import native, reference

TINY = lf.LlamaConfig.preset("tiny")


class _Adapter(nn.Module):
    """A low-rank addition to a projection that, as PEFT's, gives the projection's weight for its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(*n, bias=False) for n in ((base.in_features, 2), (2, base.out_features)))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _biased(base: nn.Linear) -> nn.Linear:
    new = nn.Linear(base.in_features, base.out_features)
    new.weight = base.weight
    return new


def _set_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.randn(layer.out_features))


def _own_forward(block: Any) -> None:
    forward = block.mlp.forward
    block.mlp.forward = lambda x: 2.0 * forward(x)


def _pruned(block: Any) -> None:
    prune.l1_unstructured(block.self_attn.q_proj, "weight", 0.5)


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda _: None,
    "adapter": lambda block: setattr(block.self_attn, "q_proj", _Adapter(block.self_attn.q_proj)),
    "bias": lambda block: setattr(block.mlp, "down_proj", _biased(block.mlp.down_proj)),
    "a bias set": lambda block: _set_bias(block.mlp.up_proj),
    "another mlp": lambda block: setattr(block, "mlp", nn.Linear(TINY.dim, TINY.dim)),
    "eps": lambda block: setattr(block.input_layernorm, "eps", 3.0),
    "window": lambda block: setattr(block.self_attn, "window", 3),
    "hook": lambda block: block.self_attn.v_proj.register_forward_hook(lambda _m, _x, y: 0.5 * y),
    "pre-hook": lambda block: block.mlp.register_forward_pre_hook(lambda _, x: (x[0] + 1.0,)),
    "backward hook": lambda block: block.mlp.register_full_backward_hook(lambda _m, dx, _: (0.5 * dx[0],)),
    "a forward of its own": _own_forward,
    "weight norm": lambda block: parametrizations.weight_norm(block.self_attn.k_proj),
    "pruned": _pruned,
}


def _changed(what: str) -> Any:
    torch.manual_seed(4)
    block = lf.nn.TransformerBlock(TINY.dim, TINY.n_heads, TINY.ffn_dim, TINY.n_kv_heads, eps=TINY.norm_eps)
    CHANGES[what](block)
    return block.double()


def _by_modules(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The block by plain PyTorch, every module called."""
    attn = block.self_attn

    def norm(layer: Any, x: Tensor) -> Tensor:
        return reference.rms_norm(x, layer.weight, layer.eps)

    n1 = norm(block.input_layernorm, x)
    q, k, v = (p(n1).unflatten(-1, (-1, attn.head_dim)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = reference.rope(q, k, cos, sin)
    h = x + attn.o_proj(reference.attention(q, k, v, window=attn.window).flatten(2))
    return h + block.mlp(norm(block.post_attention_layernorm, h))


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_within_a_block_takes_effect(what: str) -> None:
    block = _changed(what)
    assert (block.change() is None) == (what == "nothing")
    cos, sin = rope_cos_sin(TINY, 11)
    x = torch.randn(2, 11, TINY.dim, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (block, lambda *args: _by_modules(block, *args)):
        for _ in range(2):  # a hook of pruning makes the weight anew for each call
            y = function(x, cos, sin)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for found, again, expected, _ in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(found, again)


@pytest.mark.parametrize("what", ["nothing", "adapter"])
def test_a_changed_block_takes_packed_sequences_and_a_cache(what: str) -> None:
    block = _changed(what)
    cos, sin = rope_cos_sin(TINY, 9)
    x = torch.randn(2, 9, TINY.dim, dtype=torch.float64)
    with torch.no_grad():
        whole = block(x, cos, sin)
        packed = block(x.view(1, 18, -1), *(t.repeat(2, 1) for t in (cos, sin)), torch.tensor([0, 9, 18]).int())
        torch.testing.assert_close(packed.view_as(x), whole, rtol=1e-9, atol=1e-9)
        room = [torch.full((2, 9, TINY.n_kv_heads, TINY.head_dim), torch.nan, dtype=x.dtype) for _ in range(2)]
        for starts in (None, (0, 4)):
            parts = []
            for begin, end in ((0, 5), (5, 9)):
                cache = lf.block.Cache(*room, begin, starts)
                parts.append(block(x[:, begin:end], cos[begin:end], sin[begin:end], cache=cache))
            found = torch.cat(parts, 1)
            torch.testing.assert_close(found[0], whole[0], rtol=1e-9, atol=1e-9)
            alone = block(x[1:, 4:], cos[4:], sin[4:])[0] if starts else whole[1]
            torch.testing.assert_close(found[1, 4 if starts else 0 :], alone, rtol=1e-9, atol=1e-9)
    if what != "nothing":
        with pytest.raises(ValueError, match=r"x has B = 2, expected 1 with cu_seqlens"):
            block(x, cos, sin, torch.tensor([0, 9, 18]).int())
    with pytest.raises(ValueError, match="cache is given while gradients are recorded"):
        block(x, cos, sin, cache=lf.block.Cache(*room, 0))


@pytest.mark.parametrize("what", ["nothing", "adapter"])
def test_a_cache_that_does_not_fit_is_named(what: str) -> None:
    """A row beyond the last of a cache, too: torch assigns one row to none of its own."""
    block, (cos, sin) = _changed(what).requires_grad_(False), rope_cos_sin(TINY, 1)
    x = torch.randn(2, 1, TINY.dim, dtype=torch.float64)
    room = torch.randn(2, 4, TINY.n_kv_heads, TINY.head_dim, dtype=torch.float64)
    before = room.clone()
    for cache, message in (
        (lf.block.Cache(room, room, 4), r"cache.k_BSGD has shape \(2, 4, 2, 16\), expected \(2, 5, 2, 16\)"),
        (lf.block.Cache(room, room[:1], 0), r"cache.v_BSGD has shape \(1, 4, 2, 16\)"),
        (lf.block.Cache(room.float(), room, 0), "cache.k_BSGD has dtype torch.float32, expected torch.float64"),
        (lf.block.Cache(room, room, -1), "cache.used is -1, expected 0 or more"),
        (lf.block.Cache(room, room, 1, (1,)), r"cache.starts is \(1,\), expected 2 numbers"),
    ):
        for module in (block, block.self_attn):
            with pytest.raises(ValueError, match=message):
                module(x, cos, sin, cache=cache)
    for module in (block, block.self_attn):
        with pytest.raises(ValueError, match="cu_seqlens is given beside a cache, expected one of the two"):
            module(x[:1], cos, sin, torch.tensor([0, 1]).int(), lf.block.Cache(room[:1], room[:1], 0))
    assert torch.equal(room, before)


@pytest.mark.parametrize("what", ["nothing", "adapter"])
def test_a_cache_of_another_kind(what: str) -> None:
    class Growing:
        rows: tuple[Tensor, ...] = ()

        def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self.rows = tuple(map(torch.cat, zip(self.rows, (k, v), strict=True), (1, 1))) if self.rows else (k, v)
            return self.rows  # type: ignore[return-value]

    block, (cos, sin), cache = _changed(what).requires_grad_(False), rope_cos_sin(TINY, 7), Growing()
    x = torch.randn(2, 7, TINY.dim, dtype=torch.float64)
    parts = [block(x[:, a:b], cos[a:b], sin[a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), block(x, cos, sin), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", ["adapter", "eps", "window", "hook"])
def test_a_changed_block_compiles_without_graph_break(what: str) -> None:
    block = _changed(what)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 9):
        x, (cos, sin) = torch.randn(2, length, TINY.dim, dtype=torch.float64), rope_cos_sin(TINY, length)
        torch.testing.assert_close(compiled(x, cos, sin), block(x, cos, sin), rtol=1e-9, atol=1e-9)


def test_a_changed_block_refuses_options_that_its_modules_do_not_know() -> None:
    block = _changed("adapter")
    block.options = lf.block.BlockOptions(TINY.head_dim, TINY.norm_eps, interleaved=True)
    with pytest.raises(lf.NotSupported, match=r"self_attn.q_proj is a test_nn._Adapter, .* interleaved=True"):
        block(torch.randn(1, 3, TINY.dim, dtype=torch.float64), *rope_cos_sin(TINY, 3))


def test_autocast_of_a_changed_block() -> None:
    x, (cos, sin) = torch.randn(2, 9, TINY.dim), rope_cos_sin(TINY, 9)
    block, same = _changed("hook").float(), _changed("nothing").float()
    with torch.no_grad():
        same.self_attn.v_proj.weight.mul_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (b(x, cos, sin) for b in (block, same))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def _head(model: lf.Llama) -> None:
    model.lm_head = _Adapter(model.lm_head)


def _embedding(model: lf.Llama) -> None:
    model.embed_tokens.register_forward_hook(lambda _m, _x, y: 2.0 * y)


def _layer_bias(model: lf.Llama) -> None:
    model.layers[1].self_attn.q_proj = _biased(model.layers[1].self_attn.q_proj)


def _layer_hook(model: lf.Llama) -> None:
    model.layers[1].self_attn.q_proj.register_forward_hook(lambda _m, _x, y: 2.0 * y)


def _two_biases(model: lf.Llama) -> None:
    _set_bias(model.layers[1].mlp.gate_proj)
    _set_bias(model.lm_head)


def test_a_bias_that_is_set_is_added() -> None:
    layer, x = lf.nn.Linear(8, 5), torch.randn(3, 8)
    _set_bias(layer)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_takes_the_arguments_of_torchs(bias: bool) -> None:
    layers = lf.nn.Linear(8, 5, bias=bias, dtype=torch.float64), torch.nn.Linear(8, 5, bias, dtype=torch.float64)
    layers[0].load_state_dict(layers[1].state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x), layers[1](x))
    assert repr(layers[0]) == repr(layers[1])


@pytest.mark.parametrize("change", [_head, _embedding, _layer_bias, _layer_hook, _two_biases])
def test_what_is_changed_in_a_model_takes_effect(change: Callable[[lf.Llama], None]) -> None:
    """In the logits, the loss, generation, and in one that is under way."""
    torch.manual_seed(4)
    model, tokens = lf.Llama(TINY), torch.randint(TINY.vocab_size, (2, 12))
    with torch.no_grad():
        for p in model.parameters():  # so that each position has another next token
            p.mul_(4.0)
        cache = KVCache(TINY, 2, 12, "cpu", torch.float32)
        for i in range(2):
            model(tokens[:, i : i + 1], cache)
        assert (cache.plan is not None) == (native.unavailable() is None)
    before = model(tokens)
    change(model)
    logits = model(tokens)
    assert (logits - before).abs().max() > 1e-3
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model.loss(tokens, tokens), expected)
    made, whole = model.generate(tokens, max_new_tokens=6), tokens
    for _ in range(6):
        whole = torch.cat([whole, model(whole)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, whole)
    with torch.no_grad():
        model(tokens[:, 2:3], cache)
    assert cache.plan is None


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((64, 0), "n_heads is 0, expected a positive integer"),
        ((64, -4, 2), "n_heads is -4, expected a positive integer"),
        ((64, 4.0), "n_heads is 4.0, expected a positive integer"),
        ((64, 4, 3), "n_kv_heads is 3, expected a divisor of n_heads = 4"),
        ((66, 4), "n_heads is 4, expected a divisor of dim = 66"),
        ((64, 4, 2, 0), "head_dim is 0, expected a positive integer"),
    ],
)
def test_attention_names_a_size_that_cannot_be(sizes: tuple[Any, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        lf.nn.Attention(*sizes)


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_swiglu_and_a_block_name_a_width_that_cannot_be(size: Any) -> None:
    expected = f"ffn_dim is {size}, expected a positive integer"
    with pytest.raises(ValueError, match=expected):
        lf.nn.SwiGLU(64, size)
    with pytest.raises(ValueError, match=expected):
        lf.nn.TransformerBlock(64, 4, size)
