"""What `benchmarks.gpu test` checks beyond single ops, dry: on a CPU, by its kernels, and with faults planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import llama_fast as lf
from benchmarks import gpu, gpu_model
from llama_fast.low_rank import Products
from llama_fast.ops import dispatch
from llama_fast.projections import is_lora

UNITS = gpu_model.units(gpu_model.PARTS, tiny=True)


def rows(unit: dict[str, Any]) -> list[dict[str, Any]]:
    args = gpu.parse(["test", "--device", "cpu", "--tiny", "--backends", "cpu"])
    return list(gpu.CHECKS[unit["kind"]](unit, args))


@pytest.mark.parametrize(
    "unit", UNITS, ids=lambda u: " ".join(str(v) for k, v in u.items() if k not in ("kind", "dtype"))
)
def test_all_pass(unit: dict[str, Any]) -> None:
    found = rows(unit)
    assert {r["backend"] for r in found} >= {"chosen"}
    problems = [(r["backend"], r["problem"]) for r in found if r.get("problem")]
    assert not problems
    ran = [r["backend"] for r in found if "objection" not in r]
    assert ran == [*(["reference"] if unit["kind"] == "block" else []), "cpu", "chosen"] or unit["kind"] == "hf"


def test_all_parts_are_checked_where_no_names_are_given() -> None:
    args = gpu.parse(["test", "--device", "cpu"])
    kinds = {u["op"] for u in gpu.units(args.ops, args.tiny)}
    assert kinds >= set(gpu_model.PARTS)
    assert not set(gpu.parse(["bench", "--device", "cpu"]).ops) & set(gpu_model.PARTS)
    with pytest.raises(SystemExit):
        gpu.parse(["bench", "--device", "cpu", "--ops", "block"])


def _unit(**wanted: str) -> dict[str, Any]:
    return next(u for u in UNITS if wanted.items() <= u.items())


def test_a_gradient_that_is_not_the_results_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the backward drops other numbers than the forward."""
    mask = Products._mask
    monkeypatch.setattr(Products, "_mask", lambda self, name, x: (self.seeds.pop(name, None), mask(self, name, x))[1])
    found = rows(_unit(op="block", variant="LoRA with dropout"))
    assert "away from that of the results" in next(r["problem"] for r in found if r["backend"] == "reference")


def test_a_wrong_result_of_a_backend_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    block = gpu_model.transformer_block

    def wrong(*args: Any, **given: Any) -> torch.Tensor:
        y = block(*args, **given)
        return y if dispatch.forced() == "reference" else y * 1.01

    monkeypatch.setattr(gpu_model, "transformer_block", wrong)
    found = {r["backend"]: r["problem"] for r in rows(_unit(op="block", variant="padded"))}
    assert found["reference"] == ""
    assert found["cpu"].endswith("error 0.01 of its size, expected 0.0001")


def test_a_model_that_generates_other_tokens_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lf.Llama, "generate", lambda self, prompts, max_new_tokens: prompts)
    assert all("expected" in r["problem"] for r in rows(_unit(op="llama")))


def test_a_layer_that_does_not_run_as_a_block_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(lf.hf, "patch", lambda model: model)
    assert rows(_unit(op="hf"))[0]["problem"] == "ran set(), expected the block"


def test_dropout_that_does_not_run_in_the_block_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from llama_fast.hf import layers

    objection = layers.projection_objection
    dropped = lambda m: is_lora(m) and any(isinstance(d, nn.Dropout) for d in m.lora_dropout.values())  # noqa: E731
    monkeypatch.setattr(layers, "projection_objection", lambda m: "no" if dropped(m) else objection(m))
    expected = "LoRA with dropout: ran {'q_proj no'}, expected the block"
    assert [r["problem"] for r in rows(_unit(op="hf"))] == [expected] * 2
