"""Mistral, Qwen2 and Qwen3, patched: what is theirs and not LLaMA's; the rest is the same code (test_hf_*.py)."""

from __future__ import annotations

import copy
import math
import pickle
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_pairs import (
    BEFORE_5,
    DTYPE,
    VOCABULARY,
    B,
    Case,
    T,
    assert_close,
    exact,
    make,
    patched,
    ran,
    ran_by_layer,
    rms,
    run,
    tokens,
    transformers,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import llama_fast as lf
from llama_fast.hf import layout
from llama_fast.hf.attention import NAME

KINDS = ("Mistral", "Qwen2", "Qwen3")
WINDOW = 6
_LEFT = torch.ones(B, T, dtype=torch.bool)
_LEFT[0, :5], _LEFT[2, :11] = False, False
_RIGHT = _LEFT.flip(1)
_PACKED = torch.cat((torch.arange(7), torch.arange(9), torch.arange(3))).expand(B, T)
_SECOND_SLIDES = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": _SECOND_SLIDES,
    "Qwen3": _SECOND_SLIDES,
}
CALLS = {
    "plain": Case(),
    "no cache": Case(call={"use_cache": False}),
    "left padding": Case(call={"attention_mask": _LEFT.long()}),
    "right padding": Case(call={"attention_mask": _RIGHT.long()}, rows=_RIGHT),
    "packed": Case(call={"position_ids": _PACKED, "use_cache": False}),
}


def _make(kind: str, slides: bool = True, **options: Any) -> Any:
    windows = CONFIGS[kind] if slides else {"sliding_window": None}
    return make(architecture=kind, **{**windows, **options})


@pytest.mark.parametrize("slides", [False, True], ids=["whole", "sliding"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str, call: str, slides: bool) -> None:
    case = CALLS[call]
    stock = _make(kind, slides).double()
    ours = patched(stock)
    found = run(ours, case.rows, **case.call)
    if slides and call == "right padding":  # keys that end before the last, within a window: no two numbers say which
        first = "block" if kind != "Mistral" else "a mask that is not causal"
        assert ran_by_layer(ours) == [first, "a mask that is not causal"]
    else:
        assert ran(ours) == "block"
    assert_close(found, run(stock, case.rows, **case.call), run(exact(stock), case.rows, **case.call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_over_seeds_the_errors_are_no_larger_than_stock(kind: str, dtype: torch.dtype | str) -> None:
    """As in test_hf_numerics; of the 32 numbers of a bias's gradient a single draw says nothing."""
    n, logits, gradients = 12, [], []
    for seed in range(n):
        stock = _make(kind, seed=seed).to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        ids, fast = tokens(seed=100 + seed), patched(stock)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
            ours, theirs = (run(m, input_ids=ids) for m in (fast, stock))
        assert ran(fast) == "block"
        truth = run(exact(stock), input_ids=ids)
        ratio = {k: math.log(rms(ours[k] - t) / rms(theirs[k] - t)) for k, t in truth.items()}
        logits.append(ratio.pop("logits"))
        gradients.append(statistics.mean(ratio.values()))
    for found in (logits, gradients):
        assert statistics.mean(found) <= 3 * statistics.stdev(found) / n**0.5


@pytest.mark.parametrize("slides", [False, True], ids=["whole", "sliding"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generate(kind: str, slides: bool, padded: bool) -> None:
    """Beyond the window: the cache drops keys, where this version's does that."""
    model = _make(kind, slides, max_position_embeddings=128).double().eval()
    ids, mask = tokens(), _LEFT.long() if padded else torch.ones(B, T, dtype=torch.long)
    call = {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    got, want = (m.generate(ids, attention_mask=mask, eos_token_id=None, **call) for m in (patched(model), model))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_continued_by_more_than_one_token(kind: str) -> None:
    stock = _make(kind).double().eval()
    ids, ours, cache = tokens(length=24), patched(stock), None
    with torch.no_grad():
        whole = stock(ids, use_cache=False).logits
        for begin, end in ((0, 4), (4, 10), (10, 11), (11, 24)):
            out = ours(ids[:, begin:end], use_cache=True, **({} if cache is None else {layout.MODEL_CACHE: cache}))
            cache = out[layout.MODEL_CACHE]
            torch.testing.assert_close(out.logits, whole[:, begin:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_and_unpatch(kind: str) -> None:
    model = _make(kind)
    before = {name: type(m) for name, m in model.named_modules()}
    lf.hf.patch(model, fused_loss=True)
    changed = [type(m) for name, m in model.named_modules() if type(m) is not before[name]]
    parts = {"RMSNorm", "MLP", "Attention", "DecoderLayer", "ForCausalLM"}
    assert {c.__name__ for c in changed} == {kind + part for part in parts}
    for c in changed:  # as pickle finds them
        assert getattr(sys.modules[c.__module__], c.__qualname__) is c
        assert c.__mro__[2].__name__ == c.__name__
    report = lf.hf.report(model)
    assert "model.layers.0 to model.layers.1: block, recompute-cheap" in report
    assert f"{kind}ForCausalLM, loss of labels: fused, without logits" in report
    lf.hf.unpatch(model)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_the_report_names_a_norm_of_heads_that_is_not_ours() -> None:
    model = _make("Qwen3")
    model.model.layers[1].self_attn.k_norm = nn.RMSNorm(model.config.head_dim)
    _, first, second, *_ = lf.hf.report(lf.hf.patch(model)).splitlines()
    assert first == "model.layers.0: block, recompute-cheap"
    assert second.startswith("model.layers.1: ops, for k_norm is a torch RMSNorm: llama_fast: rms_norm, rope, ")
    assert second.endswith("transformers: k_norm is a torch RMSNorm")


@pytest.mark.parametrize("kind", KINDS)
def test_fused_loss(kind: str) -> None:
    stock = _make(kind)
    ours, found = patched(stock, fused_loss=True), []
    for model in (ours, stock):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        found.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    assert ours(tokens(), labels=tokens()).logits is None
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_another_attention_is_told_of_the_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def attend(module: nn.Module, q: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        told.append(kwargs.get("sliding_window", "nothing"))
        return q.transpose(1, 2).contiguous(), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "noted", attend)
    stock = _make(kind)
    for model in (patched(stock), stock):
        model.config._attn_implementation = "noted"
        model(tokens())
    assert told[:2] == told[2:] == ([WINDOW, WINDOW] if kind == "Mistral" else [None, WINDOW])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_copied(kind: str, tmp_path: Path) -> None:
    ours = patched(_make(kind).eval())
    want = ours(tokens()).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(tokens()).logits, want)
        assert type(other) is type(ours)
    ours.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{DTYPE: torch.float32})
    assert type(again).__module__.startswith("transformers.")
    torch.testing.assert_close(again(tokens()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_registered_layers_are_built(kind: str) -> None:
    if not hasattr(transformers, "monkey_patching"):
        pytest.skip("this transformers has no registry of class replacements")
    with warnings.catch_warnings(record=True) as warned:
        lf.hf.register()
    if any("registry of class replacements" in str(w.message) for w in warned):
        pytest.skip("the registry of this transformers needs packages that are not installed")
    try:
        config = _make(kind).config
        config._attn_implementation = NAME
        with transformers.monkey_patching.apply_patches():
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
        model(tokens())
        assert ran(model) == "block"
    finally:
        transformers.monkey_patching.clear_patch_mapping()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    """A window's numbers cannot be looked at in a trace: sdpa, by transformers' mask."""
    model = _make(kind).eval()
    ours = patched(model)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for call in ({"use_cache": False}, {"use_cache": False, "attention_mask": _LEFT.long()}):
        got, want = compiled(tokens(), **call).logits, model(tokens(), **call).logits
        torch.testing.assert_close(got[_LEFT], want[_LEFT], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    seen: list[str] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    ids = tokens(length=WINDOW)  # which the window holds
    got = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=note))(ids).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert "llama_fast.attention_fwd.default" in seen


@pytest.mark.parametrize("where", ["fake", "meta", "another default device"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_where_numbers_cannot_be_looked_at(kind: str, where: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if where == "meta" and BEFORE_5:
        pytest.skip("transformers' own rotary tables are not for tensors on it")
    device = "meta" if where == "meta" else "cpu"
    cached = where != "another default device"  # where transformers 5.x makes a sliding cache; else it reads positions
    ours, ids = patched(_make(kind)).to(device), tokens().to(device)
    with FakeTensorMode(allow_non_fake_inputs=True) if where == "fake" else torch.device("meta"):
        for mask in (None, torch.ones_like(ids)):
            logits = ours(ids, attention_mask=mask, use_cache=cached).logits
            assert logits.shape == (B, T, VOCABULARY)
            assert logits.device.type == device


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_compiled(kind: str, call: str) -> None:
    """Their masks are made outside, of numbers that a trace cannot look at."""
    stock, case = _make(kind).double(), CALLS[call]
    ours = patched(stock)
    torch.compiler.reset()
    for layer in ours.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert_close(*(run(model, case.rows, **case.call) for model in (ours, stock, exact(stock))))


def test_what_is_laid_out_in_another_way_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others stay."""
    import importlib.util

    from transformers.models.qwen3 import modeling_qwen3

    def fresh() -> Any:
        spec = importlib.util.spec_from_file_location("fresh_layout", layout.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    assert fresh().LEFT_OUT == {}
    with monkeypatch.context() as patch:
        patch.delattr(modeling_qwen3, "Qwen3MLP")
        found = fresh()
        assert list(found.ARCHITECTURES) == ["Llama", "Mistral", "Qwen2"]
        assert "modeling_qwen3 has no Qwen3MLP" in found.LEFT_OUT["Qwen3"]
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling_qwen3.Qwen3DecoderLayer,
            "forward",
            lambda self, hidden_states, attention_mask, position_embeddings, past_key_values_: None,
        )
        assert "expected one of" in fresh().LEFT_OUT["Qwen3"]
    monkeypatch.setitem(layout.LEFT_OUT, "Qwen3", "the reason")
    with pytest.raises(ValueError, match=r"Linear has no LlamaDecoderLayer .*; Qwen3 is left out: the reason"):
        lf.hf.patch(nn.Linear(2, 2))
