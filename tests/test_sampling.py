"""Sampling: transformers' filters and draws for the same logits and seed; bad arguments are named."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_fast.sampling import Sampler


def some_logits(B: int = 6, V: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(B, V, generator=generator)
    logits[1] = logits[1].round()  # ties
    logits[2] = -logits[2].abs() - 1  # all negative, for the penalty
    return logits


def test_draws_repeat_by_seed_and_follow_the_probabilities() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0, -5.0]]).expand(4000, 5)
    draw = Sampler(temperature=1.0, seed=3)(logits)
    assert torch.equal(draw, Sampler(temperature=1.0, seed=3)(logits))
    assert not torch.equal(draw, Sampler(temperature=1.0, seed=4)(logits))
    assert torch.equal(draw, Sampler(temperature=1.0, seed=np.int64(3))(logits))  # type: ignore[arg-type]
    share = draw.bincount(minlength=5) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0.0, atol=0.03)
    hot = Sampler(temperature=2.0, seed=3)(logits).bincount(minlength=5) / 4000
    torch.testing.assert_close(hot, (logits[0] / 2).softmax(-1), rtol=0.0, atol=0.03)
    assert Sampler()(logits).tolist() == [0] * 4000


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    """Divided by it the logits are infinite, or it is 0 in float32."""
    logits = some_logits()
    for filters in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        drawn = Sampler(temperature, seed=0, **filters)(logits)  # type: ignore[arg-type]
        assert torch.equal(logits.gather(1, drawn[:, None]), logits.amax(-1, keepdim=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_named(bad: float) -> None:
    """As of a model whose activations float16 cannot hold."""
    logits = some_logits()
    logits[3, 7] = bad
    with pytest.raises(FloatingPointError, match="the model's logits hold NaN or infinity"):
        Sampler(0.8, top_p=0.9)(logits)


def test_without_a_seed_it_is_torchs_generator() -> None:
    logits = some_logits()
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(Sampler(1.0)(logits))
    assert torch.equal(*draws)
    assert torch.equal(draws[0], Sampler(1.0, seed=5)(logits))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {0}),  # the likeliest alone has 0.66
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.3}, {0, 1}),  # the second has e^-1 = 0.37 of the first
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "min_p": 0.3}, {0, 1}),
    ],
)
def test_filters_keep_what_they_say(arguments: dict[str, Any], kept: set[int]) -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5]]).expand(3000, 5)
    assert set(Sampler(1.0, seed=0, **arguments)(logits).tolist()) == kept


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, True], [False, False, False]])
    assert Sampler(repetition_penalty=1.2)(logits, seen).tolist() == [1, 0]
    assert Sampler(repetition_penalty=1.2)(logits).tolist() == [0, 0]
    assert Sampler()(logits, seen).tolist() == [0, 0]


def transformers_draw(logits: Tensor, tokens: Tensor, seed: int, options: dict[str, Any]) -> Tensor:
    """One step of transformers' `_sample`, with the processors that its `generate` builds for these options."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=logits.shape[-1]
    )
    model = transformers.LlamaForCausalLM(config)
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **options}
    generation = transformers.GenerationConfig(**settings)
    processors = model._get_logits_processor(
        generation_config=generation, input_ids_seq_length=tokens.shape[1], device="cpu", logits_processor=[]
    )
    torch.manual_seed(seed)
    return torch.multinomial(processors(tokens, logits.clone()).softmax(-1), 1).squeeze(1)


GRID = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((1.0, 0.7, 1.9), (None, 5), (None, 0.9, 0.4), (None, 0.05), (1.0, 1.3))
]


def test_transformers_draws_the_same_tokens() -> None:
    tokens = torch.randint(300, (6, 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 300, dtype=torch.bool).scatter_(1, tokens, True)
    different = set()
    for seed, options in enumerate(GRID):
        logits = some_logits(seed=seed)
        expected = transformers_draw(logits, tokens, seed, {k: v for k, v in options.items() if v is not None})
        found = Sampler(**options, seed=seed)(logits, seen)
        assert torch.equal(found, expected), options
        different.add(tuple(found.tolist()))
    assert len(different) > len(GRID) // 2, "the options change nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: expected a finite number of 0 or more"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0: expected an integer of 1 or more"),
        ({"top_k": 2.5}, "top_k = 2.5: expected an integer of 1 or more"),
        ({"temperature": None}, "temperature = None: expected a number"),
        ({"min_p": "a"}, "min_p = 'a': expected a number"),
        ({"seed": 1.5}, "seed = 1.5: expected an integer"),
        ({"seed": 2**70}, f"seed = {2**70}: expected an integer"),
        ({"top_p": 0.0}, "top_p = 0.0: expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": -0.1}, "min_p = -0.1: expected a number from 0 to 1"),
        ({"min_p": 1.1}, "min_p = 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: expected a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)
