"""The product of lm_head, and the fused loss: the number and gradients of transformers, and no logits at any time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_pairs import make, patched, ran, tokens
from numerics import EveryResult
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import linear

_LABELS = tokens(seed=9)
_LABELS[0, :6], _LABELS[2, 3:] = -100, -100


def _loss(model: Any, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(input_ids=tokens(), **{"labels": _LABELS, **call})
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "number of items": {"num_items_in_batch": 7},
    "number of items in a tensor": {"num_items_in_batch": torch.tensor(11)},
    "shifted before": {"shift_labels": tokens(seed=4)},
    "other ignored label": {"labels": _LABELS.masked_fill(_LABELS == -100, 5), "ignore_index": 5},
    "padded": {"attention_mask": (tokens() > 0).long().index_fill_(1, torch.tensor([0, 1]), 0)},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_gradients(name: str, tied: bool) -> None:
    stock = make(tie_word_embeddings=tied)
    (got, gradients), (want, theirs) = (_loss(m, **CALLS[name]) for m in (patched(stock, fused_loss=True), stock))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for parameter, value in theirs.items():
        near = 1e-4 * float(value.abs().max())
        torch.testing.assert_close(gradients[parameter], value, rtol=1e-3, atol=near, msg=parameter)


def test_in_bfloat16_and_under_autocast() -> None:
    stock = make()
    exact = _loss(stock)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (_loss(m)[0] for m in (patched(stock, fused_loss=True), stock))
    assert got.dtype == want.dtype == torch.float32
    assert abs(got - exact) <= 2 * abs(want - exact) + 0.01
    stock = stock.bfloat16()
    got, want = (_loss(m)[0] for m in (patched(stock, fused_loss=True), stock))
    assert got.dtype == want.dtype == torch.float32
    assert abs(got - exact) <= 2 * abs(want - exact) + 0.01


def test_no_label_counts() -> None:
    labels = torch.full_like(tokens(), -100)
    for model in (make(), patched(make(), fused_loss=True)):
        assert torch.isnan(model(tokens(), labels=labels).loss)


class _Largest(EveryResult):
    """The most elements of a tensor that any operation gave."""

    elements = 0

    def saw(self, x: Tensor) -> None:
        self.elements = max(self.elements, x.numel())


def test_the_logits_never_exist() -> None:
    V, ids = 4096, tokens(batch=16, length=40)
    logits = ids.numel() * V
    stock = make(vocab_size=V)
    for model, fused in ((stock, False), (patched(stock), False), (patched(stock, fused_loss=True), True)):
        with _Largest() as largest:
            out = model(ids, labels=ids)
            out.loss.backward()
        assert (out.logits is None) == fused
        assert (largest.elements < logits) == fused


def test_training_only() -> None:
    ours = patched(make(), fused_loss="training")
    assert ours.train()(tokens(), labels=tokens()).logits is None
    assert "loss of labels: fused, without logits" in lf.hf.report(ours)
    assert ours.eval()(tokens(), labels=tokens()).logits is not None
    assert "the model is in evaluation mode" in lf.hf.report(ours)


def test_outputs_are_those_of_the_model_less_the_logits() -> None:
    stock = make()
    ours = patched(stock, fused_loss=True)
    call = {"labels": tokens(), "output_hidden_states": True, "use_cache": True}
    want, got = stock(tokens(), **call), ours(tokens(), **call)
    assert type(got) is type(want)
    assert list(got) == [name for name in want if name != "logits"]
    assert len(got.hidden_states) == 3
    assert isinstance(ours(tokens(), labels=tokens(), return_dict=False), tuple)
    assert ours(tokens(), None, None, None, None, tokens()).logits is None  # labels by place
    assert ours(tokens()).logits is not None
    assert ran(ours) == "block"


@pytest.mark.parametrize("what", ["a loss of its own", "logits to keep", "a bias", "a hook"])
def test_where_the_logits_are_needed_they_are_made(what: str) -> None:
    stock = make()
    call: dict[str, Any] = {}
    if what == "a bias":
        stock.lm_head.bias = torch.nn.Parameter(torch.zeros(stock.lm_head.out_features))
    ours = patched(stock, fused_loss=True)
    for model in (stock, ours):
        if what == "a loss of its own":
            model.loss_function = lambda logits, labels, **_: logits.square().mean()
        if what == "a hook":
            model.lm_head.register_forward_hook(lambda *_: None)
    if what == "logits to keep":
        call = {"logits_to_keep": 4, "labels": tokens()[:, -4:]}
    got, want = (m(input_ids=tokens(), **{"labels": _LABELS, **call}) for m in (ours, stock))
    assert got.logits is not None
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
    if what != "logits to keep":
        assert "transformers', on the logits" in lf.hf.report(ours)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"logits_to_keep": 1},
        {"logits_to_keep": 4, "labels": tokens()[:, -4:]},
        {"logits_to_keep": torch.tensor([0, 5])},
        {"labels": _LABELS},
        {"labels": _LABELS, "num_items_in_batch": 7},
        {"labels": _LABELS.masked_fill(_LABELS == -100, 5), "ignore_index": 5},
        {"output_hidden_states": True, "return_dict": False},
    ],
    ids=lambda call: " ".join(call) or "plain",
)
def test_outputs_with_logits_are_those_of_transformers(call: dict[str, Any]) -> None:
    stock = make()
    want, got = (m(tokens(), **call) for m in (stock, patched(stock)))
    assert type(got) is type(want)
    assert len(got) == len(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
    values = [(g, w) for g, w in zip(_tensors(got), _tensors(want), strict=True)]
    assert len(values) >= 1 + ("labels" in call)
    for g, w in values:
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def _tensors(outputs: Any) -> list[Tensor]:
    return [v for v in (outputs.values() if isinstance(outputs, dict) else outputs) if isinstance(v, Tensor)]


def test_the_head_is_multiplied_on_the_paths_of_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a decode by gemv; by the module where that has a hook."""
    ours = patched(make()).eval()
    V, seen = ours.config.vocab_size, []
    product = linear._product
    monkeypatch.setattr(
        linear,
        "_product",
        lambda form, a, b, *rest, **named: seen.append(b.shape[1]) or product(form, a, b, *rest, **named),
    )
    with torch.no_grad():
        want = ours(tokens(), logits_to_keep=1).logits
        assert seen.count(V) == 1
        assert "lm_head: llama_fast" in lf.hf.report(ours)
        calls: list[int] = []
        hook = ours.lm_head.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(ours(tokens(), logits_to_keep=1).logits, want)
        assert (seen.count(V), calls) == (1, [1])
        assert "lm_head: transformers' (lm_head has a hook)" in lf.hf.report(ours)
        hook.remove()
        ours.lm_head.bias = torch.nn.Parameter(torch.ones(V))
        torch.testing.assert_close(ours(tokens(), logits_to_keep=1).logits, want + 1)
        assert "lm_head: llama_fast" in lf.hf.report(ours)
    ours._llama_fast_loss = True
    assert "on the logits (lm_head has a bias)" in lf.hf.report(ours)
    lf.hf.unpatch(ours)
    assert "lm_head: transformers' (not patched)" in lf.hf.report(ours)
