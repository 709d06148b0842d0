"""Mistral, Qwen2 and Qwen3 as this package's own model: what they have and a LLaMA has not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from numerics import vary_
from torch import Tensor, nn

import llama_fast as lf
from llama_fast import checkpoint, decode, weights
from llama_fast.block import POLICIES
from llama_fast.config import LlamaConfig
from llama_fast.generate import KVCache
from llama_fast.model import Llama
from llama_fast.ops import native
from llama_fast.plain import PlainLlama
from llama_fast.weights import hf
from llama_fast.weights.source import tensor_shapes

TINY = LlamaConfig.preset("tiny")
W, T = 6, 19  # the window, and tokens beyond it
_SLIDES = {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 0}


class Kind(NamedTuple):
    """transformers' name, its options beside `hf_pairs.SIZES`, and what they are here."""

    theirs: str
    options: dict[str, Any]
    fields: dict[str, Any]


_TIED = {"qkv_bias": True, "explicit_head_dim": 24, "tie_embeddings": True}
KINDS = {
    "mistral": Kind("Mistral", {"sliding_window": W, "head_dim": 24}, {"window": W, "explicit_head_dim": 24}),
    "mistral, whole": Kind("Mistral", {"sliding_window": None}, {}),
    "qwen2": Kind("Qwen2", {"head_dim": 24, "tie_word_embeddings": True}, _TIED),
    "qwen2, window": Kind("Qwen2", _SLIDES, {"qkv_bias": True, "window": W}),
    "qwen3": Kind("Qwen3", {"head_dim": 24}, {"qk_norm": True, "explicit_head_dim": 24}),
    "qwen3, window": Kind("Qwen3", {**_SLIDES, "head_dim": 16}, {"qk_norm": True, "window": W}),
}
kinds = pytest.mark.parametrize("kind", [name for name in KINDS if name != "mistral, whole"])


def drawn(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Llama:
    model = Llama(dataclasses.replace(TINY, **KINDS[kind].fields), dtype=dtype, **options)
    vary_(model)
    return model


def tokens(batch: int = 2, length: int = T) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the loss, beside the logits."""
    model.zero_grad(set_to_none=True)
    model.loss(tokens()[:, :-1], tokens()[:, 1:]).backward()
    return {"logits": model(tokens()).detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@kinds
def test_logits_and_gradients_equal_plain(kind: str, policy: str) -> None:
    ours = drawn(kind, policy=policy)
    plain = PlainLlama(ours.config, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    assert [layer.change() for layer in ours.layers] == [None, None]
    assert_equal(gradients(ours), gradients(plain))


@kinds
def test_the_first_weights_are_a_llamas_with_biases_of_zero(kind: str) -> None:
    fields = KINDS[kind].fields
    ours, theirs = (cls(dataclasses.replace(TINY, **fields)) for cls in (Llama, PlainLlama))
    bare = dataclasses.replace(ours.config, qkv_bias=False, qk_norm=False, window=None)
    llama = dict(Llama(bare).named_parameters())
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys() >= llama.keys()
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), name
        expected = llama.get(name, torch.zeros(()) if name.endswith("bias") else torch.ones(()))
        assert torch.equal(p, expected.expand_as(p)), name


@kinds
def test_parameters_are_those_of_the_config(kind: str) -> None:
    model = drawn(kind)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == tensor_shapes(model.config)
    assert model.config.n_params == sum(p.numel() for p in model.parameters())


@kinds
def test_compiled_and_under_autocast(kind: str) -> None:
    model = drawn(kind)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens())
    torch.testing.assert_close(logits, model(tokens()), rtol=1e-9, atol=1e-9)
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    found, expected = (torch.autograd.grad(y, list(model.parameters()), dlogits) for y in (logits, model(tokens())))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    ours = drawn(kind, torch.float32)
    plain = PlainLlama(ours.config)
    plain.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(tokens()).dtype == torch.bfloat16
        losses = [m.loss(tokens(), tokens()) for m in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


# ---- within a block --------------------------------------------------------------------------------------------------


def _bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.ones(layer.out_features, dtype=layer.weight.dtype))


def _halved(module: nn.Module) -> None:
    module.register_forward_hook(lambda _m, _x, y: 0.5 * y)


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "a bias of o": ({"qkv_bias": True}, lambda b: _bias(b.self_attn.o_proj), "self_attn.o_proj has a bias"),
    "a bias of gate": ({"qkv_bias": True}, lambda b: _bias(b.mlp.gate_proj), "mlp.gate_proj has a bias"),
    "a bias of q": ({"qk_norm": True}, lambda b: _bias(b.self_attn.q_proj), "self_attn.q_proj has a bias"),
    "hook": ({"qk_norm": True}, lambda b: _halved(b.self_attn.k_norm), "self_attn.k_norm has a hook"),
    "eps": (
        {"qk_norm": True},
        lambda b: setattr(b.self_attn.q_norm, "eps", 0.5),
        "self_attn.q_norm has an eps of its own",
    ),
    "another norm": (
        {"qk_norm": True},
        lambda b: setattr(b.self_attn, "q_norm", nn.Identity()),
        "self_attn.q_norm is a torch.nn.modules.linear.Identity",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_changed_within_a_block_takes_effect(what: str) -> None:
    fields, change, text = CHANGES[what]
    ours = Llama(dataclasses.replace(TINY, window=W, **fields), dtype=torch.float64)
    plain = PlainLlama(ours.config, dtype=torch.float64)
    vary_(ours)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        before = ours(tokens())
    for model in (ours, plain):
        change(model.layers[0])
    assert [layer.change() for layer in ours.layers] == [text, None]
    assert_equal(gradients(ours), gradients(plain))
    assert (ours(tokens()) - before).abs().max() > 1e-4


def test_an_attention_in_the_place_of_another_is_the_blocks() -> None:
    """And biases that are taken away are not missed."""
    ours, plain = (cls(TINY, dtype=torch.float64) for cls in (Llama, PlainLlama))
    sizes = TINY.dim, TINY.n_heads, TINY.n_kv_heads
    for layer, other in zip(ours.layers, plain.layers, strict=True):
        layer.self_attn = lf.nn.Attention(*sizes, qkv_bias=True, qk_norm=True, dtype=torch.float64)
        layer.self_attn.k_proj.bias = None
        other.self_attn = type(other.self_attn)(
            dataclasses.replace(TINY, qkv_bias=True, qk_norm=True), {"dtype": torch.float64}
        )
        other.self_attn.k_proj.bias = None
        assert layer.change() is None
    plain.load_state_dict(ours.state_dict())
    assert_equal(gradients(ours), gradients(plain))


def test_a_window_that_the_modules_do_not_know_is_refused() -> None:
    block = drawn("mistral").layers[0]
    _bias(block.self_attn.o_proj)
    block.options = dataclasses.replace(block.options, window=W + 1)
    x, tables = torch.randn(1, 3, TINY.dim, dtype=torch.float64), lf.config.rope_cos_sin(drawn("mistral").config, 3)
    with pytest.raises(lf.NotSupported, match=r"self_attn.o_proj has a bias, .* window=7"):
        block(x, *tables)


def test_a_window_that_is_taken_away() -> None:
    model, other = drawn("mistral"), drawn("mistral")
    for layer in model.layers:  # whose attention has no say while the block is one function
        layer.options = dataclasses.replace(layer.options, window=0)
    whole = Llama(dataclasses.replace(model.config, window=None), dtype=torch.float64)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), whole(tokens()))
    other.layers[0].self_attn.window = None
    with pytest.raises(lf.NotSupported, match=r"self_attn has a window of its own, .* window=6"):
        other(tokens())


@pytest.mark.parametrize("name", ["qkv_bias", "qk_norm"])
def test_a_flag_that_is_none_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 'yes', expected True or False"):
        lf.nn.TransformerBlock(64, 4, 96, **{name: "yes"})  # type: ignore[arg-type]


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_modules", [False, True], ids=["", "by modules"])
@kinds
def test_a_cache_in_chunks_and_rows_of_their_own_lengths(kind: str, by_modules: bool) -> None:
    model = drawn(kind)
    if by_modules:
        for layer in model.layers:
            layer.mlp.register_forward_hook(lambda _m, _x, y: y)
            assert layer.change() == "mlp has a hook"
    ids, starts = tokens(), (0, 5)
    with torch.no_grad():
        whole, short = model(ids), model(ids[1:, starts[1] :])
        cache = KVCache(model.config, 2, T, "cpu", torch.float64, starts)
        parts = [model(ids[:, a:b], cache) for a, b in ((0, 4), (4, 11), (11, 12), (12, T))]
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found[0], whole[0], rtol=1e-9, atol=1e-9)
    # elsewhere the rotary angles are others, rounded to float32
    torch.testing.assert_close(found[1, starts[1] :], short[0], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not native.isas(), reason="the native library is not built")
@kinds
def test_decode_steps_are_native(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken, step = drawn(kind, torch.float32), [], decode.step
    for p in model.parameters():
        p.data *= 4.0 if p.ndim == 2 else 1.0  # so that each position has another next token
    monkeypatch.setattr(decode, "step", lambda *args: (y := step(*args), taken.append(y is not None))[0])
    found = model.generate(tokens(), max_new_tokens=9)
    assert taken == [False] + 8 * [True]
    with torch.no_grad():
        logits = model(found[:, :-1])[:, T - 1 :]
    assert torch.equal(logits.argmax(-1), found[:, T:])
    rows = model.generate([tokens()[0].tolist(), tokens()[1, :4].tolist()], max_new_tokens=9, prefill_chunk=5)
    alone = model.generate(tokens()[1:, :4], max_new_tokens=9)
    assert rows == [found[0].tolist(), alone[0].tolist()]


# ---- transformers ----------------------------------------------------------------------------------------------------


def config_of(kind: str) -> LlamaConfig:
    """Of `hf_pairs.SIZES`."""
    return LlamaConfig(64, 2, 4, 2, 112, 97, 64, norm_eps=1e-6, **KINDS[kind].fields)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_transformers(kind: str, tmp_path: Path) -> None:
    from hf_pairs import exact, make

    theirs = make(architecture=KINDS[kind].theirs, **KINDS[kind].options)
    theirs.save_pretrained(tmp_path)
    ours, theirs = Llama.from_pretrained(tmp_path, dtype=torch.float64), exact(theirs)
    assert ours.config == config_of(kind)
    logits = theirs(tokens()[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    found = gradients(ours)
    # their rotary angles are float32
    assert_equal(found, {"logits": theirs(tokens()).logits.detach(), **expected}, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_transformers_has(kind: str, tmp_path: Path) -> None:
    from hf_pairs import DTYPE, make, transformers

    theirs = make(architecture=KINDS[kind].theirs, **KINDS[kind].options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    weights.write(weights.open_checkpoint(tmp_path / "theirs"), tmp_path / "converted", shards=2)
    for name in ("ours", "converted"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, **{DTYPE: torch.float32})
        expected = "Llama" if kind == "mistral, whole" else KINDS[kind].theirs
        assert type(again).__name__ == f"{expected}ForCausalLM"
        with torch.no_grad():
            assert torch.equal(again.eval()(tokens()).logits, theirs(tokens()).logits)
        read = Llama.from_pretrained(tmp_path / name)
        assert read.config == ours.config
        assert all(torch.equal(p, read.get_parameter(n)) for n, p in ours.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_transformers(kind: str, tmp_path: Path) -> None:
    """Also of rows of their own lengths, which transformers fills up in front."""
    from hf_pairs import make

    theirs = make(architecture=KINDS[kind].theirs, **KINDS[kind].options).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids, mask = Llama.from_pretrained(tmp_path), tokens(), torch.ones(2, T, dtype=torch.long)
    mask[1, :7] = 0
    expected = theirs.generate(ids, attention_mask=mask, eos_token_id=None, max_new_tokens=12, do_sample=False)
    rows = ours.generate([ids[0].tolist(), ids[1, 7:].tolist()], max_new_tokens=12, prefill_chunk=5)
    assert rows == [expected[0].tolist(), expected[1, 7:].tolist()]


# ---- configs ---------------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("mistral", {}, {"n_kv_heads": 8, "window": 4096}),
        ("mistral", {"sliding_window": None}, {"n_kv_heads": 8}),
        ("mistral", {"sliding_window": 7, "layer_types": 2 * ["sliding_attention"]}, {"n_kv_heads": 8, "window": 7}),
        ("qwen2", {}, {}),
        ("qwen2", {"num_attention_heads": 64}, {"n_heads": 64, "n_kv_heads": 32}),
        ("qwen2", {"num_attention_heads": 64, "num_key_value_heads": None}, {"n_heads": 64, "n_kv_heads": 64}),
        ("qwen2", {"sliding_window": 7, "attention_bias": True}, {}),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 0}, {}),
        ("qwen2", {"use_sliding_window": True}, {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, {}),
        ("qwen2", {**_SLIDES, "max_window_layers": 28, "layer_types": 2 * ["sliding_attention"]}, {"window": W}),
        ("qwen2", {**_SLIDES, "layer_types": 2 * ["full_attention"]}, {}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ("qwen3", {}, {}),
        ("qwen3", {"head_dim": 8, "rope_theta": 1e6}, {"rope_theta": 1e6}),
        ("qwen3", {**_SLIDES, "max_window_layers": 2}, {}),
        ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True}, {"n_kv_heads": 4, "tie_embeddings": True}),
    ],
)
def test_what_a_missing_key_means_is_what_transformers_says(
    kind: str, values: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = hf.config_from_hf({**SIZES, "model_type": kind, **values})
    head_dim = 128 if kind == "qwen3" and "head_dim" not in values else None
    plain = LlamaConfig(256, 2, 32, 32, 96, 97, 64, 1e-6, explicit_head_dim=head_dim)
    assert config == dataclasses.replace(plain, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", **expected)
    assert hf.config_from_hf(hf.config_to_hf(config, torch.float32)) == config
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for written in ({**SIZES, **values}, hf.config_to_hf(config, torch.float32)):
        if written.get("model_type", kind) != kind:  # a Mistral without a window
            continue
        theirs = getattr(transformers, f"{kind.capitalize()}Config").from_dict(written)
        assert theirs.num_key_value_heads == config.n_kv_heads
        assert (getattr(theirs, "head_dim", None) or 256 // config.n_heads) == config.head_dim
        assert theirs.tie_word_embeddings == config.tie_embeddings
        types = 2 * ["sliding_attention"] if kind == "mistral" else theirs.layer_types
        slide = {theirs.sliding_window if t == "sliding_attention" else None for t in types}
        assert slide == {config.window}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: expected null or an integer of 1 or more"),
        ("mistral", {"sliding_window": "7"}, "sliding_window = '7': expected null or an integer"),
        ("mistral", {"num_attention_heads": 4}, "num_key_value_heads = 8: expected a divisor of num_attention_heads"),
        ("mistral", {"layer_types": 2 * ["full_attention"]}, "layer_types = .*expected a sliding window in all layers"),
        ("qwen2", {**_SLIDES, "max_window_layers": 1}, "max_window_layers = 1: expected a sliding window in all"),
        ("qwen2", {**_SLIDES, "max_window_layers": "1"}, "max_window_layers = '1': expected a sliding window in all"),
        ("qwen3", {**_SLIDES, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types = .*in all layers"),
        ("qwen3", {**_SLIDES, "layer_types": "full_attention"}, "layer_types = 'full_attention': expected a sliding"),
        ("qwen3", {**_SLIDES, "sliding_window": 2.5}, r"sliding_window = 2\.5: expected null or an integer"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True: expected False"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': expected default"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters has full_attention: expected one rotary embedding for all layers",
        ),
    ],
)
def test_configs_that_are_refused(kind: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf.write_json(tmp_path / "config.json", {**SIZES, "model_type": kind, **values})
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        Llama.from_pretrained(tmp_path)


def test_what_no_format_has_is_not_written(tmp_path: Path) -> None:
    for fields, format, message in (
        ({"qkv_bias": True, "qk_norm": True}, "hf", "qkv_bias = True, qk_norm = True: expected one of them at most"),
        ({"qkv_bias": True}, "meta", "qkv_bias = True: Meta's format expects False"),
        ({"qk_norm": True}, "meta", "qk_norm = True: Meta's format expects False"),
        ({"window": 7}, "meta", "window = 7: Meta's format expects None"),
    ):
        with pytest.raises(ValueError, match=message):
            Llama(dataclasses.replace(TINY, **fields)).save_pretrained(tmp_path / "a", format)
    assert list(tmp_path.iterdir()) == []


def test_a_biased_checkpoint_names_what_it_lacks(tmp_path: Path) -> None:
    Llama(TINY).save_pretrained(tmp_path / "a")
    settings = hf.config_to_hf(dataclasses.replace(TINY, qkv_bias=True), torch.float32)
    hf.write_json(tmp_path / "a" / "config.json", settings)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.bias, "):
        Llama.from_pretrained(tmp_path / "a")


@kinds
def test_a_training_checkpoint(kind: str, tmp_path: Path) -> None:
    model = drawn(kind, torch.float32)
    path = checkpoint.save(tmp_path, 3, model, {})
    assert checkpoint.load_config(path) == model.config
    read = Llama.from_pretrained(path)
    assert read.config == model.config
    assert all(torch.equal(p, read.get_parameter(name)) for name, p in model.named_parameters())
