"""Generation: the cache gives what the whole sequence gives; sampling keeps to its filters; bad arguments are named."""

from __future__ import annotations

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.generate import KVCache, Sampler
from llama_fast.model import Llama

TINY = LlamaConfig.preset("tiny")


@pytest.fixture
def model() -> Llama:
    model = Llama(TINY)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5.0)  # decided logits, so that greedy choices do not hang on rounding
    return model


@pytest.mark.parametrize("B", [1, 3])
def test_greedy_equals_running_the_whole_sequence_each_time(model: Llama, B: int) -> None:
    prompt = torch.randint(TINY.vocab_size, (B, 5), generator=torch.Generator().manual_seed(0))
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=12), expected)


def test_chunked_prefill_equals_one_pass(model: Llama) -> None:
    tokens = torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(TINY, 2, 17, "cpu", torch.float32)
        parts = [model(tokens[:, a:b], cache) for a, b in ((0, 9), (9, 10), (10, 17))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="room of 0"):
        model(tokens[:, :1], cache)


def test_sampling_repeats_by_seed_and_keeps_to_its_filters() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0, -5.0]]).expand(4000, 5)
    draw = Sampler(temperature=1.0, seed=3)(logits)
    assert torch.equal(draw, Sampler(temperature=1.0, seed=3)(logits))
    share = draw.bincount(minlength=5) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0.0, atol=0.03)
    assert set(Sampler(1.0, top_k=2, seed=0)(logits).tolist()) == {0, 1}
    assert set(Sampler(1.0, top_p=0.5, seed=0)(logits).tolist()) == {0}  # the likeliest alone has 0.66
    assert set(Sampler(1.0, top_p=0.7, seed=0)(logits).tolist()) == {0, 1}
    assert Sampler()(logits).tolist() == [0] * 4000


def test_end_of_sequence_fills_and_stops(model: Llama) -> None:
    prompt = torch.randint(TINY.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
    free = model.generate(prompt, max_new_tokens=8)
    eos = int(free[0, 7])
    first = free[0, 5:].tolist().index(eos)
    assert model.generate(prompt, max_new_tokens=8, eos_id=eos).tolist() == free[:, : 6 + first].tolist()
    seen: list[int] = []
    model.generate(prompt, max_new_tokens=3, on_token=lambda column: seen.append(int(column[0])))
    assert seen == free[0, 5:8].tolist()


def test_bad_arguments_are_named(model: Llama) -> None:
    prompt = torch.zeros(1, 100, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"max_new_tokens = 29: with a prompt of 100 tokens, expected at most 28"):
        model.generate(prompt, max_new_tokens=29)
    with pytest.raises(ValueError, match=r"temperature = -1"):
        model.generate(prompt, max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match=r"top_p = 1.5"):
        model.generate(prompt, max_new_tokens=1, temperature=1, top_p=1.5)
    with pytest.raises(ValueError, match=r"top_k = 0"):
        model.generate(prompt, max_new_tokens=1, temperature=1, top_k=0)
    with pytest.raises(ValueError, match=r"expected \[B, T\] with T of 1 or more"):
        model.generate(prompt[:, :0], max_new_tokens=1)
