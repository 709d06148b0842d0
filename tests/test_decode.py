"""A decode step in one native call: the bits of the ops, and never of memory that was replaced."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from numerics import instruction_set, vary_
from torch import Tensor, nn

import llama_fast as lf
from llama_fast import decode, few_rows
from llama_fast.config import LlamaConfig
from llama_fast.generate import KVCache
from llama_fast.model import Llama
from llama_fast.ops import linear, native

pytestmark = pytest.mark.skipif(not native.isas(), reason="the native library is not built")

# large enough that every product of a few rows is the matrix-vector product on both ways
CONFIG = LlamaConfig(
    dim=520, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=1000, vocab_size=300, max_seq_len=256, explicit_head_dim=72
)
TINY = LlamaConfig.preset("tiny")


@contextmanager
def op_by_op() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "step", lambda *_: None)
        patch.setattr(few_rows, "before", lambda *_: None)
        yield


def drawn(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    model = Llama(config, dtype=dtype).requires_grad_(False)
    if config.qkv_bias or config.qk_norm:
        vary_(model)
    return model


def filled(model: Llama, B: int, used: int, starts: list[int] | None = None, room: int = 8) -> KVCache:
    cache = KVCache(model.config, B, used + room, "cpu", model.lm_head.weight.dtype, starts)
    generator = torch.Generator().manual_seed(used)
    for t in (cache.k_LBSGD, cache.v_LBSGD):
        t.copy_(torch.randn(t.shape, generator=generator))
    cache.used = used
    return cache


def tokens_of(B: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (B, 1), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def both(model: Llama, cache: KVCache, tokens: Tensor, native: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Logits, keys and values of a native step (or of none, if not `native`) and of the ops one by one."""
    other = copy.deepcopy(cache)
    one = model(tokens, cache)
    assert (cache.plan is not None) == native
    with op_by_op():
        two = model(tokens, other)
    assert cache.used == other.used
    return tuple([y, *(t[:, :, : c.used] for t in (c.k_LBSGD, c.v_LBSGD))] for y, c in ((one, cache), (two, other)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", native.isas())
def test_a_step_gives_the_bits_of_the_ops(isa: str, dtype: torch.dtype) -> None:
    model = drawn(CONFIG, dtype)
    for B, used, starts, options in (
        (1, 0, None, {}),
        (1, 37, None, {"window": 9, "interleaved": True}),
        (2, 130, [0, 129], {}),
        (3, 64, [3, 0, 64], {"window": 64}),
        (4, 5, [5, 6, 9, 0], {"interleaved": True}),
    ):
        for layer in model.layers:
            layer.options = dataclasses.replace(layer.options, **options)
        with instruction_set(isa):
            found, expected = both(model, filled(model, B, used, starts), tokens_of(B))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"{B} rows after {used}, {options}"
        assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", [{"window": 9}, {"qkv_bias": True}, {"qk_norm": True, "window": 9}], ids=str)
def test_a_step_of_another_architecture_gives_the_bits_of_the_ops(fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = drawn(dataclasses.replace(CONFIG, **fields), dtype)
    for B, used, starts in ((1, 37, None), (3, 64, [3, 0, 64])):
        found, expected = both(model, filled(model, B, used, starts), tokens_of(B))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"{B} rows after {used}"
        assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_is_as_near_to_float64_as_the_ops(dtype: torch.dtype) -> None:
    model = drawn(CONFIG, dtype)
    exact = drawn(CONFIG, torch.float64)
    exact.load_state_dict(model.state_dict())
    for B in (1, 8):
        cache = filled(model, B, 40)
        truth = KVCache(CONFIG, B, 48, "cpu", torch.float64)
        truth.k_LBSGD.copy_(cache.k_LBSGD)
        truth.v_LBSGD.copy_(cache.v_LBSGD)
        truth.used = 40
        found, ops = both(model, cache, tokens_of(B))
        with torch.no_grad():
            expected = exact(tokens_of(B), truth)
        ours, theirs = ((x[0].double() - expected).norm() / expected.norm() for x in (found, ops))
        assert ours <= 1.25 * theirs + torch.finfo(dtype).eps, (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_what_it_is_alone_in_any_batch_and_for_any_number_of_threads(dtype: torch.dtype) -> None:
    model = drawn(CONFIG, dtype)
    starts, tokens, threads = [0, 7, 30, 2, 0, 11, 29, 1], tokens_of(8), torch.get_num_threads()
    alone = []
    for b in range(8):
        cache = filled(model, 8, 30, starts)
        cache.k_LBSGD, cache.v_LBSGD = (t[:, b : b + 1].clone() for t in (cache.k_LBSGD, cache.v_LBSGD))
        cache.starts = (starts[b],)
        with torch.no_grad():
            alone.append(model(tokens[b : b + 1], cache)[0])
        assert cache.plan is not None
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            cache = filled(model, 8, 30, starts)
            with torch.no_grad():
                found = model(tokens, cache)
            assert cache.plan is not None
            assert torch.equal(found, torch.stack(alone)), f"{count} threads"
    finally:
        torch.set_num_threads(threads)


def _overwrite(p: Tensor) -> None:
    """Makes a read of memory that is no longer the parameter's visible."""
    p.untyped_storage().copy_(torch.full_like(p, torch.nan).untyped_storage())


def _data(model: Llama, _: KVCache) -> None:
    p = model.layers[1].mlp.up_proj.weight
    old, p.data = p.data, p.data * 2
    _overwrite(old)


def _transposed(model: Llama, _: KVCache) -> None:
    """The same memory and, the matrix being square, the same shape."""
    p = model.layers[0].self_attn.q_proj.weight
    p.data = p.data.t()


def _assigned(model: Llama, _: KVCache) -> None:
    state = {name: p.clone() * 1.5 for name, p in model.state_dict().items()}
    for p in model.parameters():
        _overwrite(p)
    model.load_state_dict(state, assign=True)


def _loaded(model: Llama, _: KVCache) -> None:
    model.load_state_dict({name: p * 1.5 for name, p in model.state_dict().items()})


def _moved_and_back(model: Llama, _: KVCache) -> None:
    memory = [p.data for p in model.parameters()]
    model.to(torch.float64).to(torch.float32)
    for old in memory:
        _overwrite(old)


def _parameter(model: Llama, _: KVCache) -> None:
    old = model.norm.weight
    model.norm.weight = nn.Parameter(old * 3, requires_grad=False)
    _overwrite(old)


def _submodule(model: Llama, _: KVCache) -> None:
    old = model.layers[0].mlp
    model.layers[0].mlp = copy.deepcopy(old)
    model.layers[0].mlp.down_proj.weight.mul_(2)
    for p in old.parameters():
        _overwrite(p)


def _layer_less(model: Llama, cache: KVCache) -> None:
    del model.layers[1]
    cache.k_LBSGD, cache.v_LBSGD = cache.k_LBSGD[:1], cache.v_LBSGD[:1]
    cache._layers = cache._layers[:1]


def _layers_swapped(model: Llama, _: KVCache) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def _bias(model: Llama, _: KVCache) -> None:
    p = model.layers[1].self_attn.v_proj
    old, p.bias = p.bias, nn.Parameter(p.bias * 3, requires_grad=False)
    _overwrite(old)


def _bias_data(model: Llama, _: KVCache) -> None:
    p = model.layers[1].self_attn.v_proj.bias
    old, p.data = p.data, p.data * 3
    _overwrite(old)


def _no_bias(model: Llama, _: KVCache) -> None:
    p = model.layers[0].self_attn.q_proj
    old, p.bias = p.bias, None
    _overwrite(old)


def _head_gain(model: Llama, _: KVCache) -> None:
    p = model.layers[1].self_attn.k_norm
    old, p.weight = p.weight, nn.Parameter(p.weight * 3, requires_grad=False)
    _overwrite(old)


def _head_norm(model: Llama, _: KVCache) -> None:
    old = model.layers[0].self_attn.q_norm
    model.layers[0].self_attn.q_norm = copy.deepcopy(old)
    model.layers[0].self_attn.q_norm.weight.mul_(2)
    _overwrite(old.weight)


def _no_head_norms(model: Llama, _: KVCache) -> None:
    model.layers[1].self_attn.qk_norm = False


def _options(model: Llama, _: KVCache) -> None:
    model.layers[0].options = dataclasses.replace(model.layers[0].options, window=3)


def _eps(model: Llama, _: KVCache) -> None:
    model.norm.eps = 0.5


def _angles(model: Llama, _: KVCache) -> None:
    tables = model.rope_tables
    model.rope_tables = lambda *where: tuple(t.flip(-1) for t in tables(*where))  # type: ignore[method-assign]


def _max_norm(model: Llama, _: KVCache) -> None:
    model.embed_tokens.max_norm = 0.05


def _grown(_: Llama, cache: KVCache) -> None:
    old = cache.k_LBSGD, cache.v_LBSGD
    cache.grow(40)
    for t in old:
        _overwrite(t)


def _keys(_: Llama, cache: KVCache) -> None:
    old, cache.k_LBSGD = cache.k_LBSGD, cache.k_LBSGD * 2
    cache._layers = list(zip(cache.k_LBSGD, cache.v_LBSGD, strict=True))
    _overwrite(old)


def _starts(_: Llama, cache: KVCache) -> None:
    cache.starts = (3, 5)


def _used(_: Llama, cache: KVCache) -> None:
    cache.used = 4


CHANGES: list[Callable[[Llama, KVCache], None]] = [
    _data, _transposed, _assigned, _loaded, _moved_and_back, _parameter, _submodule, _layer_less, _layers_swapped,
    _options, _eps, _angles, _max_norm, _grown, _keys, _starts, _used,
    _bias, _bias_data, _no_bias, _head_gain, _head_norm, _no_head_norms,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_change_of_model_or_cache_is_seen(change: Callable[[Llama, KVCache], None]) -> None:
    others = {"qkv_bias": "bias" in change.__name__, "qk_norm": "head" in change.__name__}
    model = drawn(dataclasses.replace(TINY, **others), torch.float32)
    cache = filled(model, 2, 9, room=20)
    with torch.no_grad():
        before = model(tokens_of(2), cache)
        plan, cache.used = cache.plan, 9
        change(model, cache)
        found, expected = both(model, cache, tokens_of(2), native=change not in (_transposed, _angles, _max_norm))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(found[0]).all()
    if change is not _moved_and_back and change is not _grown:
        assert not torch.allclose(found[0], before, rtol=1e-3), "nothing was changed"
    assert (cache.plan is plan) == (change in (_loaded, _starts, _used))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype_than_its_cache_is_named(dtype: torch.dtype) -> None:
    model = drawn(TINY, torch.float32)
    cache = filled(model, 1, 5)
    with torch.no_grad():
        model(tokens_of(1), cache)
        model.to(dtype)
        with pytest.raises(ValueError, match=rf"cache.k_BSGD has dtype torch.float32, expected {dtype}"):
            model(tokens_of(1), cache)


def test_memory_seen_as_another_dtype_is_named() -> None:
    model = drawn(TINY, torch.bfloat16)
    cache = filled(model, 1, 5)
    with torch.no_grad():
        model(tokens_of(1), cache)
        p = model.layers[1].mlp.up_proj.weight
        p.data = p.data.view(torch.float16)
        with pytest.raises(ValueError, match=r"wup_FC has dtype torch.float16, expected torch.bfloat16"):
            model(tokens_of(1), cache)


def test_functional_call_computes_with_its_own_parameters() -> None:
    model = drawn(TINY, torch.float32)
    others = {name: p * 1.1 for name, p in model.named_parameters()}
    cache, other, again = (filled(model, 1, 5) for _ in range(3))
    with torch.no_grad():
        first = model(tokens_of(1), cache)
        cache.used = 5
        found = torch.func.functional_call(model, others, (tokens_of(1), cache))
        with op_by_op():
            expected = torch.func.functional_call(model, others, (tokens_of(1), other))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        del others
        cache.used = 5
        assert torch.equal(model(tokens_of(1), cache), first)
        assert torch.equal(model(tokens_of(1), again), first)
    assert not torch.allclose(found, first)


@pytest.mark.parametrize("place", ["layers.1", "norm", "lm_head"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "forward", "class"])
def test_hooks_and_replaced_forwards_are_called(place: str, kind: str) -> None:
    model = drawn(TINY, torch.float32)
    cache = filled(model, 1, 5)
    module, seen = model.get_submodule(place), []
    with torch.no_grad():
        first = model(tokens_of(1), cache)
        if kind == "forward":
            forward = module.forward
            module.forward = lambda *a, **k: seen.append(1) or forward(*a, **k)  # type: ignore[method-assign]
        elif kind == "class":  # as FSDP2 does
            cls = type(module)
            module.__class__ = type(
                "Seen", (cls,), {"forward": lambda self, *a, **k: seen.append(1) or cls.forward(self, *a, **k)}
            )
        else:
            handle = getattr(module, kind)(lambda *_: seen.append(1))
        cache.used = 5
        torch.testing.assert_close(model(tokens_of(1), cache), first, rtol=1e-5, atol=1e-5)
        assert seen == [1]
        if kind == "forward":
            del module.forward
        elif kind == "class":
            module.__class__ = cls
        else:
            handle.remove()
        cache.used = 5
        assert torch.equal(model(tokens_of(1), cache), first)
        assert seen == [1]
        assert cache.plan is not None


def test_what_watches_the_ops_sees_them() -> None:
    from torch.nn.modules.module import register_module_forward_hook
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model = drawn(TINY, torch.float32)
    cache, seen, called = filled(model, 1, 5), [], []  # type: ignore[var-annotated]
    with torch.no_grad():
        model(tokens_of(1), cache)
        plan = cache.plan
        assert plan is not None
        step = plan.step
        plan.step = lambda *a: called.append(1) or step(*a)  # type: ignore[method-assign,assignment]
        with Watch():
            model(tokens_of(1), cache)
        assert seen
        seen.clear()
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        model(tokens_of(1), cache)
        handle.remove()
        assert model.norm in seen
        with lf.backend("reference"):
            model(tokens_of(1), cache)
        with linear.force("torch"):
            model(tokens_of(1), cache)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="dtype"):
            model(tokens_of(1), cache)
    with pytest.raises(ValueError, match="while gradients are recorded"):
        model.requires_grad_(True)(tokens_of(1), cache)
    assert not called
    with torch.no_grad(), lf.backend("cpu"):
        model(tokens_of(1), cache)
    assert called == [1]


def test_what_does_not_fit_is_named() -> None:
    model = drawn(TINY, torch.float32)
    cache = filled(model, 2, 5, room=1)
    with torch.no_grad():
        for bad, message in (
            (tokens_of(2).int(), r"tokens is \(2, 1\) torch.int32"),
            (tokens_of(2) + 256, "tokens holds ids"),
            (tokens_of(2) - 256, "tokens holds ids -"),
            (tokens_of(3), "cache.k_BSGD has shape"),
            (tokens_of(2)[0], r"tokens is \(1,\)"),
        ):
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    model(bad, cache)
                assert cache.used == 5
        cache.starts = (1, 2, 3)
        with pytest.raises(ValueError, match=r"cache.starts is \(1, 2, 3\), expected 2 numbers"):
            model(tokens_of(2), cache)
        cache.starts = (-1, 0)
        with pytest.raises(ValueError, match=r"cache.starts is \(-1, 0\), expected 2 numbers of 0 or more"):
            model(tokens_of(2), cache)
        cache.starts = None
        model(tokens_of(2), cache)
        with pytest.raises(ValueError, match="expected at most the cache's room of 0"):
            model(tokens_of(2), cache)
        long = filled(model, 1, TINY.max_seq_len)
        with pytest.raises(ValueError, match="expected at most max_seq_len"):
            model(tokens_of(1), long)


def test_a_copy_of_a_cache_makes_its_own_plan() -> None:
    model = drawn(TINY, torch.float32)
    cache = filled(model, 1, 5)
    with torch.no_grad():
        model(tokens_of(1), cache)
        assert cache.plan is not None
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.copy(cache)):
            assert other.plan is None
            expected = model(tokens_of(1), copy.deepcopy(cache))
            cache.used -= 0
            assert torch.equal(model(tokens_of(1), other), expected)


def test_the_memory_of_a_cache_is_freed_with_its_last_name() -> None:
    """Not when Python next looks for cycles: one of each generation would be held until then."""
    model = drawn(CONFIG, torch.float32)
    cache = filled(model, 1, 3)
    with torch.no_grad():
        model(tokens_of(1), cache)
    assert cache.plan is not None
    freed = weakref.ref(cache.k_LBSGD)
    gc.disable()
    try:
        del cache
        assert freed() is None
    finally:
        gc.enable()


def test_another_model_with_the_same_cache() -> None:
    one, two = drawn(TINY, torch.float32), drawn(TINY, torch.float32)
    two.reset_parameters(1)
    cache = filled(one, 1, 5)
    with torch.no_grad():
        one(tokens_of(1), cache)
        cache.used = 5
        found, expected = both(two, cache, tokens_of(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY, n_heads=16, n_kv_heads=1, explicit_head_dim=16),  # 16 query heads of one key head
        dataclasses.replace(TINY, explicit_head_dim=12),
    ],
)
def test_sizes_that_the_native_step_does_not_take_run_op_by_op(config: LlamaConfig) -> None:
    model = drawn(config, torch.float32)
    cache = filled(model, 1, 5)
    with torch.no_grad():
        assert model(tokens_of(1), cache).isfinite().all()
    assert cache.plan is None
    for B, dtype, runs in ((8, torch.float32, True), (9, torch.float32, False), (8, torch.bfloat16, False)):
        wide = drawn(dataclasses.replace(TINY, dim=1040, n_heads=4, n_kv_heads=4, explicit_head_dim=16), dtype)
        many = filled(wide, B, 5)
        with torch.no_grad():
            assert wide(tokens_of(B), many).isfinite().all()
        assert (many.plan is not None) == runs


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_argmax_is_torchs(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    with instruction_set(isa):
        for V in (1, 3, 16, 31, 1024, 1025, 5000):
            x = (torch.randn(4, V, generator=generator) * 3).to(dtype)  # half precision: many equal
            assert torch.equal(native.argmax(x), x.float().argmax(-1)), V
            x[0], x[1, V // 2], x[2, V // 3 :] = -torch.inf, torch.inf, torch.nan
            assert torch.equal(native.argmax(x), x.float().argmax(-1)), V
            assert torch.equal(native.argmax(x[:, ::2]), x[:, ::2].float().argmax(-1)), V
