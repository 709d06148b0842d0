"""A patched model beside the stock one: logits and every parameter's gradient, against float64."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_pairs import DTYPES, SPREAD, B, Case, T, assert_close, exact, make, patched, ran, rms, run, tokens
from torch import Tensor

from llama_fast.block import POLICIES

_LEFT = torch.ones(B, T, dtype=torch.bool)
_LEFT[0, :5], _LEFT[2, :1] = False, False
_RIGHT = _LEFT.flip(1)
_GAPS, _EMPTY = _LEFT.clone(), _LEFT.clone()
_GAPS[1, 8:10], _EMPTY[1] = False, False
_PACKED = torch.cat((torch.arange(7), torch.arange(9), torch.arange(3))).expand(B, T)


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "rope_theta": 10000.0, **options}}


CASES = {
    "plain": Case(),
    "no cache": Case(call={"use_cache": False}),
    "as many key heads": Case({"num_key_value_heads": 4}),
    "one key head": Case({"num_key_value_heads": 1}),
    "wide heads": Case({"head_dim": 24}),
    "tied": Case({"tie_word_embeddings": True}),
    "large epsilon": Case({"rms_norm_eps": 0.1}),
    "full mask": Case(call={"attention_mask": torch.ones(B, T, dtype=torch.long)}),
    "rope llama3": Case(
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "rope yarn": Case(_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "rope linear": Case(_rope("linear", factor=2.0)),
    "rope dynamic": Case({**_rope("dynamic", factor=2.0), "max_position_embeddings": 16}),
    "positions": Case(call={"position_ids": torch.arange(7, 7 + T).unsqueeze(0), "use_cache": False}),
    "positions by row": Case(call={"position_ids": torch.arange(T) + torch.tensor([[0], [11], [5]])}),
    "packed": Case(call={"position_ids": _PACKED, "use_cache": False}),
    "hidden states": Case(call={"output_hidden_states": True}),
    "left padding": Case(call={"attention_mask": _LEFT.long()}),
    "right padding": Case(call={"attention_mask": _RIGHT.long()}),
    "padding on both sides": Case(call={"attention_mask": (_LEFT & _RIGHT).long()}),
    "padding, no cache": Case(call={"attention_mask": _RIGHT.long(), "use_cache": False}),
    "padding for the ops": Case({"mlp_bias": True}, {"attention_mask": (_LEFT & _RIGHT).long()},
                                runs="gate_proj has a bias"),
    "gaps": Case(call={"attention_mask": _GAPS.long()}, runs="a mask that is not causal"),
    "nothing but padding": Case(call={"attention_mask": _EMPTY.long()}, runs="a mask that is not causal"),
    "own mask": Case(call={"attention_mask": _LEFT[:, None, None] & torch.ones(T, T).tril().bool()}, runs="mask",
                     rows=_LEFT),
    "biases": Case({"attention_bias": True, "mlp_bias": True}, runs="o_proj has a bias"),
    "gelu": Case({"hidden_act": "gelu"}, runs="mlp has the activation GELUActivation"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    stock = make(**case.config).to(dtype)
    ours = patched(stock)
    found = run(ours, case.rows, **case.call)
    assert case.runs in ran(ours)
    assert_close(found, run(stock, case.rows, **case.call), run(exact(stock), case.rows, **case.call))


@pytest.mark.parametrize("name", ["plain", "left padding", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_seeds_the_errors_are_no_larger_than_stock(dtype: torch.dtype, name: str) -> None:
    """The mean logarithm of the errors' quotient is at most 0, up to three standard errors: logits and gradients."""
    call, n = CASES[name].call, 20
    logits, gradients = [], []
    for seed in range(n):
        stock = make(seed).to(dtype)
        ids = tokens(seed=100 + seed)
        ours, theirs, truth = (run(m, input_ids=ids, **call) for m in (patched(stock), stock, exact(stock)))
        ratio = {k: math.log(rms(ours[k] - t) / rms(theirs[k] - t)) for k, t in truth.items()}
        logits.append(ratio.pop("logits"))
        gradients.append(statistics.mean(ratio.values()))
    for found in (logits, gradients):
        assert statistics.mean(found) <= 3 * statistics.stdev(found) / n**0.5
    assert statistics.stdev(logits) <= 1.5 * SPREAD[dtype]  # else the bound of a single draw is not what it says


def _curve(model: Any, steps: int = 12) -> Tensor:
    """Losses of a training on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, losses = tokens(), []
    for _ in range(steps):
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def test_training_curves_are_the_same_in_float64() -> None:
    stock = make().double()
    found = _curve(patched(stock))
    torch.testing.assert_close(found, _curve(exact(stock)), rtol=1e-7, atol=1e-7)
    assert found[-1] < 0.6 * found[0]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
def test_training_curves_agree(dtype: torch.dtype, near: float) -> None:
    """At each step within a share of the loss: of the stock model's, and of the one in float64."""
    stock = make().to(dtype)
    truth, theirs, ours = _curve(exact(stock)), _curve(copy.deepcopy(stock)), _curve(patched(stock))
    for other in (theirs, truth):
        assert ((ours - other).abs() <= near * other).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_give_the_same(policy: str) -> None:
    stock = make().double()
    assert_close(run(patched(stock, policy=policy)), run(stock), run(exact(stock)))


def test_gradients_add_up_over_micro_batches() -> None:
    stock = make()
    ours = patched(stock)
    for model in (stock, ours):
        for seed in (1, 2, 3):
            model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
