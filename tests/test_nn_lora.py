"""LoRA adapters of PEFT's on this package's own layers: what runs as one block, and that it is what PEFT computes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_fast as lf
from llama_fast import block as block_module
from llama_fast import nn as layers
from llama_fast.low_rank import LowRank, kept
from llama_fast.plain import PlainLlama
from llama_fast.projections import adapters_objection

peft = pytest.importorskip("peft")

TINY = lf.LlamaConfig.preset("tiny")
MODELS = (lf.Llama, PlainLlama)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A model of this package with adapters that are not zero, and its twin in plain PyTorch."""
    ours, theirs = lf.Llama(TINY, dtype=dtype), PlainLlama(TINY, dtype=dtype)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}
    made = [peft.get_peft_model(model, peft.LoraConfig(**options)) for model in (ours, theirs)]
    for model in made:
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, 0.0, 0.2)
    return made[0], made[1]


def tokens() -> Tensor:
    return torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


def trained(model: Any) -> dict[str, Tensor | None]:
    """The loss, and gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(8)
    loss = model.base_model.model.loss(tokens()[:, :-1], tokens()[:, 1:].contiguous())
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many additions each block that ran had."""
    found: list[int] = []

    def noted(*args: Any, **given: Any) -> Any:
        found.append(len(given["low_rank"]))
        return block_module.transformer_block(*args, **given)

    monkeypatch.setattr(layers, "transformer_block", noted)
    return found


def assert_alike(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    found, want = trained(ours), trained(theirs)
    assert found.keys() == want.keys()
    for name, t in want.items():
        if t is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], t, rtol=tolerance, atol=tolerance * float(t.abs().max()), msg=name)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"]], ids=len)
def test_a_block_with_adapters_is_one_block(targets: list[str], blocks: list[int]) -> None:
    ours, theirs = pair(target_modules=targets)
    assert_alike(ours, theirs)
    assert blocks == [len(targets)] * TINY.n_layers
    merged, expected = ours.merge_and_unload(), theirs(tokens())
    torch.testing.assert_close(merged(tokens()), expected, rtol=1e-9, atol=1e-9)
    assert blocks[-1] == 0


def test_generation_with_adapters(blocks: list[int]) -> None:
    ours, theirs = pair(torch.float32)
    prompt = tokens()[:, :5]
    for model in (ours, theirs):
        model.eval()
    generate = ours.base_model.model.generate
    found, ids = generate(prompt, max_new_tokens=6), prompt
    assert blocks[-1] == len(ALL)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, theirs(ids)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)
    with ours.disable_adapter():
        without = generate(prompt, max_new_tokens=6)
    assert torch.equal(without, lf.Llama(TINY, dtype=torch.float32).generate(prompt, max_new_tokens=6))
    assert not torch.equal(without, found)


def test_autocast_and_adapters_in_float32(blocks: list[int]) -> None:
    ours, theirs = pair(torch.float32)
    truth = trained(copy.deepcopy(theirs).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained(ours)
    assert blocks == [len(ALL)] * TINY.n_layers
    for name, t in truth.items():
        assert (found[name].double() - t).norm() < 0.05 * t.norm(), name  # type: ignore[union-attr]


class _Dropout(nn.Module):
    """nn.Dropout, of the numbers that the block drops."""

    def forward(self, x: Tensor) -> Tensor:
        mask = kept(x, 0.25, int(torch.empty((), dtype=torch.int64).random_())) if self.training else None
        return x if mask is None else x * mask / 0.75


def test_dropout(blocks: list[int]) -> None:
    """Of its own in each call, that of a seed again; in evaluation none, and nothing is drawn."""
    ours, theirs = pair(lora_dropout=0.25)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = _Dropout()
    for train in (True, False):
        for model in (ours, theirs):
            model.train(train)
        assert_alike(ours, theirs)
        before = torch.get_rng_state()
        first, second = ours(tokens()), ours(tokens())
        assert torch.equal(first, second) != train
        assert torch.equal(before, torch.get_rng_state()) != train
    assert blocks == [len(ALL)] * TINY.n_layers * 6


def test_dropout_under_torch_compile_runs_by_the_modules() -> None:
    ours, theirs = pair(lora_dropout=0.25)
    torch.compiler.reset()
    compiled = torch.compile(ours.train().base_model.model, backend="aot_eager", fullgraph=True)
    found = []
    for model in (compiled, theirs.train()):
        torch.manual_seed(8)
        found.append(model(tokens()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def _first(model: Any) -> Any:
    return model.base_model.model.layers[0].self_attn.q_proj


def _set_bias(model: Any) -> None:
    base = _first(model).base_layer
    base.bias = nn.Parameter(torch.linspace(-1, 1, base.out_features, dtype=base.weight.dtype), requires_grad=False)


OTHERS: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "DoRA": ({"use_dora": True}, lambda _: None, "self_attn.q_proj has a variant of LoRA"),
    "a bias": ({}, _set_bias, "self_attn.q_proj has a bias"),
    "a hook": ({}, lambda m: _first(m).register_forward_hook(lambda *_: None), "self_attn.q_proj has a hook"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_block_cannot_do_runs_by_the_modules(what: str, blocks: list[int]) -> None:
    options, change, why = OTHERS[what]
    ours, theirs = pair(**options)
    for model in (ours, theirs):
        change(model)
    assert ours.base_model.model.layers[0].change() == why
    assert_alike(ours, theirs)
    assert len(blocks) == (0 if what == "DoRA" else TINY.n_layers - 1)


def test_adapters_that_float16_would_lose_run_by_the_modules(blocks: list[int]) -> None:
    ours, _ = pair(torch.float16)
    trained(ours)
    assert not blocks
    with torch.no_grad():
        ours(tokens())
    assert blocks == [len(ALL)] * TINY.n_layers


@pytest.mark.parametrize("has", [{"qkv_bias": True}, {"qk_norm": True}, {"window": 5}], ids=str)
def test_biases_norms_of_heads_and_a_window_beside_adapters(has: dict[str, Any], blocks: list[int]) -> None:
    config = dataclasses.replace(TINY, **has)
    ours, theirs = (
        peft.get_peft_model(m(config, dtype=torch.float64), peft.LoraConfig(target_modules=ALL)) for m in MODELS
    )
    for model in (ours, theirs):
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "lora_" in name or p.ndim == 1:
                nn.init.normal_(p, 0.0 if "lora_" in name else 1.0, 0.2)
    assert_alike(ours, theirs)
    assert blocks == [len(ALL)] * TINY.n_layers


def test_dropout_while_a_graph_is_captured_runs_by_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    a, b = torch.ones(1, 3), torch.ones(3, 1)
    with_, without = ({"wq_HDxC": LowRank(a, b, dropout=p)} for p in (0.1, 0.0))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert adapters_objection(without, x, True) is None
        expected = "adapters with dropout while a CUDA graph is captured" if capturing else None
        assert adapters_objection(with_, x, True) == expected


def test_adapters_of_a_tied_output_projection() -> None:
    model = lf.Llama(dataclasses.replace(TINY, tie_embeddings=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    adapted.load_state_dict(adapted.bfloat16().state_dict(), assign=True)
    assert model.lm_head.base_layer.weight is model.embed_tokens.weight
    assert model.lm_head.base_layer.weight.dtype == torch.bfloat16
