"""generate() of a patched model beside the stock one: every cache, padding, beams, sampling, continued caches."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
from hf_pairs import BEFORE_4_56, make, patched, ran, tokens, transformers
from torch import Tensor

from llama_fast.hf import layout

NEW = 6
CACHE = layout.MODEL_CACHE  # how a model's forward and its outputs call it
POSITIONS = "cache_position" in layout.parameters(transformers.LlamaForCausalLM.forward)
_PADDED = torch.ones(3, 19, dtype=torch.long)
_PADDED[0, :5], _PADDED[2, :11] = 0, 0


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """In float64, so that rounding chooses no token."""
    stock = make(max_position_embeddings=128).double().eval()
    return stock, patched(stock)


def _generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits)


_SMALL = {"nbits": 4, "q_group_size": 16, "residual_length": 8}
CACHES = {
    "none": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "quanto": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", **_SMALL}},
    "hqq": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", **_SMALL}},
}
NEEDS = {"quanto": "optimum.quanto", "hqq": "hqq"}
NEEDS_GPU = ("offloaded", "offloaded static")


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_same_tokens_with_every_cache(cache: str, padded: bool, pair: tuple[Any, Any]) -> None:
    if cache in NEEDS and importlib.util.find_spec(NEEDS[cache].partition(".")[0]) is None:
        pytest.skip(f"{NEEDS[cache]} is not installed")
    if cache in NEEDS_GPU and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs a GPU")
    mask = _PADDED if padded else torch.ones_like(_PADDED)
    (got, logits), (want, their_logits) = (_generate(m, tokens(), mask, **CACHES[cache]) for m in reversed(pair))
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    if not padded and cache != "static":
        assert ran(pair[1]) == "block"


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 7},
    ],
    ids=" ".join,
)
def test_the_same_tokens_with_every_way_to_choose_them(options: dict[str, Any], pair: tuple[Any, Any]) -> None:
    ids = tokens(batch=1) if "prompt_lookup_num_tokens" in options else tokens()
    got, want = (_generate(m, ids, torch.ones_like(ids), **options)[0] for m in reversed(pair))
    assert torch.equal(got, want)


def test_assisted_decoding(pair: tuple[Any, Any]) -> None:
    """With a patched assistant; by transformers' promise the tokens are those of the model alone."""
    assistant = make(1, max_position_embeddings=128, num_hidden_layers=1).double().eval()
    ids = tokens(batch=1)
    want = _generate(pair[0], ids, torch.ones_like(ids))[0]
    got = _generate(pair[1], ids, torch.ones_like(ids), assistant_model=patched(assistant))[0]
    assert torch.equal(got, want)
    assert ran(pair[1]) == "block"


def test_a_cache_is_continued(pair: tuple[Any, Any]) -> None:
    ids = tokens(length=24)
    with torch.no_grad():
        whole = pair[0](ids).logits
        cache = None
        for begin, end in ((0, 10), (10, 11), (11, 24)):
            name = {} if cache is None else {CACHE: cache}
            out = pair[1](ids[:, begin:end], use_cache=True, **name)
            cache = out[CACHE]
            assert ran(pair[1]) == "block"
            torch.testing.assert_close(out.logits, whole[:, begin:end], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 24


@pytest.mark.skipif(BEFORE_4_56, reason="before 4.56 a static cache is made by other rules")
def test_a_static_cache_is_filled_by_hand(pair: tuple[Any, Any]) -> None:
    ids = tokens(length=24)
    sizes = (
        {"max_batch_size": 3, "dtype": torch.float64}
        if "max_batch_size" in inspect.signature(transformers.StaticCache).parameters
        else {}
    )
    cache = transformers.StaticCache(config=pair[1].config, max_cache_len=32, **sizes)
    with torch.no_grad():
        whole = pair[0](ids).logits
        for begin, end in ((0, 10), (10, 11), (11, 24)):
            where = {"cache_position": torch.arange(begin, end)} if POSITIONS else {}
            out = pair[1](ids[:, begin:end], use_cache=True, **{CACHE: cache}, **where)
            torch.testing.assert_close(out.logits, whole[:, begin:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", layout.CACHES)
def test_a_layer_takes_the_cache_by_each_of_its_names(name: str, pair: tuple[Any, Any]) -> None:
    model, cache = pair[1].model, transformers.DynamicCache()
    x = torch.randn(1, 5, 64, dtype=torch.float64)
    position = torch.arange(5)
    where = {"cache_position": position} if POSITIONS else {}
    with torch.no_grad():
        model.layers[0](x, position_embeddings=model.rotary_emb(x, position.unsqueeze(0)), **{name: cache}, **where)
    assert cache.get_seq_length() == 5


class _ReadsArguments(transformers.DynamicCache):
    """As the paged cache of continuous batching: reads the arguments of the call and changes them."""

    told: list[tuple[int, list[str]]]

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.told.append((len(args), sorted(kwargs)))
        kwargs.get("kwargs", {})["is_causal"] = False
        return super().update(k, v, layer, *args, **kwargs)


def test_a_cache_is_told_what_transformers_tells_it(pair: tuple[Any, Any]) -> None:
    found, told = [], []
    for model in (patched(pair[0]), pair[0]):
        model.config._attn_implementation = "sdpa"
        cache = _ReadsArguments()
        cache.told = []
        with torch.no_grad():
            found.append(model(tokens(), use_cache=True, **{CACHE: cache}).logits)
        told.append(cache.told)
    assert len(told[0]) == 2
    assert told[0] == told[1]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_cache(pair: tuple[Any, Any]) -> None:
    """The keys of the first call get their gradient from the second."""
    ids, found = tokens(), []
    for model in pair:
        model.zero_grad()
        first = model(ids[:, :8], use_cache=True)
        second = model(ids[:, 8:], use_cache=True, **{CACHE: first[CACHE]})
        (first.logits.square().sum() + second.logits.square().sum()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert ran(pair[1]) == "a cache that holds keys while gradients are recorded"
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_right_padding_in_generation(pair: tuple[Any, Any]) -> None:
    """Unusual, and warned about; the padding then lies between the prompt and what is new."""
    mask = _PADDED.flip(1)
    (got, logits), (want, their_logits) = (_generate(m, tokens(), mask) for m in reversed(pair))
    assert torch.equal(got, want)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)


def test_half_precision_generates(pair: tuple[Any, Any]) -> None:
    model = make().bfloat16()
    ids = tokens()
    got, want = (
        m.generate(ids, attention_mask=_PADDED, max_new_tokens=1, do_sample=False, output_logits=True,
                   return_dict_in_generate=True).logits[0]
        for m in (patched(model), model)
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
