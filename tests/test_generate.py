"""Generation: the cache gives what the whole sequence gives, a row what it gives alone, and transformers the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_fast import decode
from llama_fast.config import LlamaConfig
from llama_fast.generate import KVCache
from llama_fast.model import Llama
from llama_fast.ops import native

TINY = LlamaConfig.preset("tiny")


def decided(config: LlamaConfig = TINY, dtype: torch.dtype = torch.float32) -> Llama:
    """A model of large logits, so that greedy choices do not hang on rounding."""
    model = Llama(config, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5.0)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return decided()


def prompts(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("B", [1, 3, 5])
def test_greedy_equals_running_the_whole_sequence_each_time(model: Llama, B: int) -> None:
    prompt = prompts(B, 5)
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=12), expected)
    assert model.generate(prompt, max_new_tokens=0).equal(prompt)


@pytest.mark.parametrize("chunk", [1, 4, 16, 17])
def test_chunked_prefill_equals_one_pass(model: Llama, chunk: int) -> None:
    tokens = prompts(2, 17, seed=1)
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(TINY, 2, 17, "cpu", torch.float32)
        parts = [model(tokens[:, a : a + chunk], cache) for a in range(0, 17, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="room of 0"):
        model(tokens[:, :1], cache)
    expected = model.generate(tokens, max_new_tokens=6)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, prefill_chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_different_lengths_are_what_each_is_alone(dtype: torch.dtype, chunk: int) -> None:
    model = decided(dtype=dtype)
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (4, 11, 1, 7, 11)]
    found = model.generate(rows, max_new_tokens=10, prefill_chunk=chunk)
    for row, answer in zip(rows, found, strict=True):
        assert answer[: len(row)] == row
        assert len(answer) == len(row) + 10
        if dtype != torch.bfloat16:  # rounded so, products of one row and of five choose differently now and then
            assert answer == model.generate([row], max_new_tokens=10)[0]


def test_what_stands_before_a_row_is_not_read(model: Llama) -> None:
    """The padding's keys and values are NaN, as a fresh cache's, and the logits are those of the row alone."""
    short, long = prompts(1, 3, seed=1), prompts(1, 9, seed=2)
    tokens = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.int64), short], dim=1), long])
    cache = KVCache(TINY, 2, 12, "cpu", torch.float32, starts=[6, 0])
    more = prompts(2, 3, seed=3)
    with torch.no_grad():
        first = model(tokens, cache)
        cache.k_LBSGD[:, 0, :6] = torch.nan
        cache.v_LBSGD[:, 0, :6] = torch.nan
        steps = [model(more[:, i : i + 1], cache) for i in range(3)]
        for b, row in enumerate((short, long)):
            alone = model(torch.cat([row, more[b : b + 1]], dim=1))
            found = torch.cat([first[b : b + 1, -row.shape[1] :], *(s[b : b + 1] for s in steps)], dim=1)
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.isas(), reason="the native library is not built")
def test_each_step_after_the_prompt_is_one_native_call(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = decode.Plan.step

    def counted(self: decode.Plan, tokens: Tensor, cache: KVCache) -> Tensor | None:
        logits = step(self, tokens, cache)
        calls.append(None if logits is None else tuple(logits.shape))
        return logits

    monkeypatch.setattr(decode.Plan, "step", counted)
    model.generate(prompts(2, 9), max_new_tokens=5)
    assert calls == [(2, TINY.vocab_size)] * 4
    calls.clear()
    model.generate([[1, 2, 3], [4], [5, 6]], max_new_tokens=4, temperature=0.5, prefill_chunk=1)
    assert calls == [(3, TINY.vocab_size)] * 4


def test_steps_are_what_generate_gives(model: Llama) -> None:
    prompt = prompts(3, 5)
    options: dict[str, Any] = {"max_new_tokens": 7, "temperature": 0.8, "top_p": 0.9, "seed": 4}
    steps = list(model.stream(prompt, **options))
    assert torch.equal(torch.stack([s.tokens for s in steps], dim=1), model.generate(prompt, **options)[:, 5:])
    assert all(s.logprobs is None for s in steps)
    first = next(model.stream(prompt, **options))
    assert torch.equal(first.tokens, steps[0].tokens)


def test_logprobs_are_the_models(model: Llama) -> None:
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (4, 9)]
    steps = list(model.stream(rows, max_new_tokens=6, temperature=1.5, top_k=9, seed=1, logprobs=True))
    for b, row in enumerate(rows):
        new = [int(s.tokens[b]) for s in steps]
        with torch.no_grad():
            logits = model(torch.tensor([[*row, *new]]))[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
        found = torch.stack([s.logprobs[b] for s in steps if s.logprobs is not None])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_goes_on_from_earlier_tokens(model: Llama) -> None:
    tokens = prompts(1, 20)
    expected = model.generate(tokens, max_new_tokens=8)
    cache = KVCache(TINY, 1, 4, "cpu", torch.float32)
    for _ in model.stream(tokens[:, :12], max_new_tokens=3, cache=cache):
        pass
    assert cache.used == 14  # the last new token was never an input
    cache.used = 12
    new = [int(s.tokens[0]) for s in model.stream(tokens[:, 12:], max_new_tokens=8, cache=cache)]
    assert new == expected[0, 20:].tolist()
    with pytest.raises(ValueError, match=r"with a prompt of 47 tokens, expected at most 81"):
        next(model.stream(tokens, max_new_tokens=100, cache=cache))
    with pytest.raises(ValueError, match=r"the prompt has 147 tokens: expected at most max_seq_len = 128"):
        next(model.stream(prompts(1, 120), max_new_tokens=1, cache=cache))  # 27 tokens stand in the cache
    with pytest.raises(ValueError, match="tokens has 2 rows: expected one beside a cache"):
        next(model.stream([[1], [2, 3]], max_new_tokens=1, cache=KVCache(TINY, 2, 0, "cpu", torch.float32)))
    with pytest.raises(ValueError, match=r"before has 0 ids: expected the \d+ of the cache"):
        next(model.stream(tokens[:, :1], max_new_tokens=1, cache=cache, repetition_penalty=1.2))


@pytest.mark.parametrize("of", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_goes_on_alike(model: Llama, of: Callable[[KVCache], KVCache]) -> None:
    """The prompt is written layer by layer, and the native step reads all layers."""
    tokens = prompts(1, 20)
    expected = model.generate(tokens, max_new_tokens=8)
    cache = KVCache(TINY, 1, 40, "cpu", torch.float32)
    with torch.no_grad():
        model(tokens[:, :12], cache)
    cache = of(cache)
    new = [int(s.tokens[0]) for s in model.stream(tokens[:, 12:], max_new_tokens=8, cache=cache)]
    assert new == expected[0, 20:].tolist()


def test_a_stream_begun_in_inference_mode_goes_on_outside(model: Llama) -> None:
    tokens, options = prompts(2, 6), {"max_new_tokens": 8, "repetition_penalty": 1.2, "eos_id": TINY.vocab_size - 1}
    expected = model.generate(tokens, **options)  # type: ignore[arg-type]
    for kind in ("native", "op by op"):
        with pytest.MonkeyPatch.context() as patch:
            if kind == "op by op":
                patch.setattr(decode, "step", lambda *_: None)
            steps = model.stream(tokens, **options)  # type: ignore[arg-type]
            with torch.inference_mode():
                first = next(steps)
            new = torch.stack([s.tokens for s in (first, *steps)], dim=1)
        assert torch.equal(new, expected[:, 6:])
    with torch.inference_mode():
        cache = KVCache(TINY, 1, 1, "cpu", torch.float32)
        cache.grow(9)
    assert len(list(model.stream(tokens[:1], max_new_tokens=3, cache=cache))) == 3


def test_end_of_sequence_fills_and_stops(model: Llama) -> None:
    prompt = prompts(2, 5)
    free = model.generate(prompt, max_new_tokens=8)
    eos = int(free[0, 7])
    first = free[0, 5:].tolist().index(eos)
    assert eos not in free[1, 5:]
    stopped = model.generate(prompt, max_new_tokens=8, eos_id=eos)
    assert stopped[0, 5:].tolist() == free[0, 5 : 6 + first].tolist() + [eos] * (7 - first)
    assert torch.equal(stopped[1], free[1])
    other = int(free[1, 6])
    both = model.generate(prompt, max_new_tokens=8, eos_id=[eos, other])
    second = free[1, 5:].tolist().index(other)
    assert both.shape[1] == 5 + max(first, second) + 1
    rows = model.generate(prompt.tolist(), max_new_tokens=8, eos_id=[eos, other])
    assert rows == [free[0, : 6 + first].tolist(), free[1, : 6 + second].tolist()]


@pytest.mark.parametrize("outside", [-1, TINY.vocab_size + 7])
def test_an_end_outside_the_vocabulary_fills_too(model: Llama, outside: int) -> None:
    """As where the tokenizer has ids that the embedding has not."""
    free = model.generate(prompts(2, 5), max_new_tokens=8)
    eos = int(free[0, 6])
    assert eos not in free[1, 5:]
    first = free[0, 5:].tolist().index(eos)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_id": [outside, eos]}
    found = model.generate(prompts(2, 5), **options)
    assert found[0, 5:].tolist() == free[0, 5 : 6 + first].tolist() + [outside] * (7 - first)
    assert torch.equal(found[1], free[1])
    steps = list(model.stream(prompts(2, 5), logprobs=True, repetition_penalty=1.0001, **options))
    assert [int(s.tokens[0]) for s in steps] == found[0, 5:].tolist()


def test_autocast_generates_in_its_dtype(model: Llama) -> None:
    prompt = torch.arange(10).view(2, 5)
    for weights, dtype in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        of = copy.deepcopy(model).to(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = of.generate(prompt, max_new_tokens=1)
            with torch.no_grad():
                logits = of(prompt)[:, -1]
        assert logits.dtype == dtype
        assert torch.equal(found[:, 5], logits.argmax(-1))


def test_bad_arguments_are_named(model: Llama) -> None:
    prompt = torch.zeros(1, 100, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"max_new_tokens = 29: with a prompt of 100 tokens, expected at most 28"):
        model.generate(prompt, max_new_tokens=29)
    with pytest.raises(ValueError, match=r"temperature = -1"):
        model.generate(prompt, max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match=r"prefill_chunk = 0"):
        model.generate(prompt, max_new_tokens=1, prefill_chunk=0)
    with pytest.raises(ValueError, match=r"expected \[B, T\] with T of 1 or more"):
        model.generate(prompt[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"rows of \[2, 0\] ids: expected one row or more, each of 1 id or more"):
        model.generate([[1, 2], []], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"holds ids 0 .. 300"):
        model.generate([[1, 2], [300]], max_new_tokens=1)
    for arguments, message in (
        ({"max_new_tokens": 2.0}, r"max_new_tokens = 2.0: expected an integer of 0 or more"),
        ({"prefill_chunk": None}, r"prefill_chunk = None: expected an integer of 1 or more"),
        ({"eos_id": 2.5}, r"eos_id = 2.5: expected a token id or several"),
        ({"eos_id": [1, "a"]}, r"eos_id = \[1, 'a'\]: expected a token id or several"),
        ({"temperature": "1"}, r"temperature = '1': expected a number"),
        ({"tokens": [1, 2]}, r"tokens is \[1, 2\]: expected \[B, T\] int64, or lists of ids"),
        ({"tokens": [[1.5, 2]]}, r"tokens is \[\[1.5, 2\]\]: expected"),
        ({"tokens": prompt.to("meta")}, r"tokens is on meta: expected cpu"),
        ({"tokens": [[300, 2], [1]], "repetition_penalty": 1.2}, r"holds ids 0 .. 300"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**{"tokens": prompt, "max_new_tokens": 1, **arguments})
    deeper = KVCache(dataclasses.replace(TINY, n_layers=TINY.n_layers + 1), 1, 8, "cpu", torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"cache has \d layers: expected \d, the model's"):
        model(prompt[:, :4], deeper)
    cache = KVCache(TINY, 2, 8, "cpu", torch.float32)
    cache.starts = (1,)
    cos, sin = model.rope_tables(0, 1, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(ValueError, match=r"cache.starts is \(1,\), expected 2 numbers of 0 or more"):
        model.layers[0](torch.zeros(2, 1, 64), cos, sin, cache=cache.layer(0))


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Any]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = decided(dataclasses.replace(TINY, tie_embeddings=True))
    path = tmp_path_factory.mktemp("weights") / "a"
    model.save_pretrained(path)
    from hf_pairs import DTYPE

    theirs = transformers.LlamaForCausalLM.from_pretrained(path, **{DTYPE: torch.float32})
    theirs.generation_config.pad_token_id = 0
    theirs.generation_config.eos_token_id = None
    return model, theirs


def test_prompts_of_any_integers_give_plain_ones(model: Llama) -> None:
    for prompts in ([torch.tensor([1, 2]), torch.tensor([3])], [np.array([1, 2]), np.array([3])], ((1, 2), (3,))):
        got = model.generate(prompts, max_new_tokens=2)
        assert got == model.generate([[1, 2], [3]], max_new_tokens=2)
        assert {type(i) for row in got for i in row} == {int}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 2.0, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
@pytest.mark.parametrize("B", [1, 4])
def test_the_tokens_of_transformers(pair: tuple[Llama, Any], options: dict[str, Any], B: int) -> None:
    model, theirs = pair
    prompt = prompts(B, 9, seed=B)
    settings: dict[str, Any] = {"do_sample": "temperature" in options, "max_new_tokens": 40}
    if settings["do_sample"]:
        settings |= {"top_k": 0, "top_p": 1.0}
    torch.manual_seed(11)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **(settings | options))
    found = model.generate(prompt, max_new_tokens=40, seed=11, **options)
    assert torch.equal(found, expected)


def test_left_padded_rows_are_those_of_transformers(pair: tuple[Llama, Any]) -> None:
    model, theirs = pair
    rows = [prompts(1, n, seed=n)[0].tolist() for n in (4, 11, 7)]
    padded = torch.tensor([[0] * (11 - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (11 - len(r)) + [1] * len(r) for r in rows])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=30, do_sample=False)
    found = model.generate(rows, max_new_tokens=30)
    assert [r[-30:] for r in found] == expected[:, 11:].tolist()
