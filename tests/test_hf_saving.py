"""A patched model is saved, loaded, placed on devices, tied and resized as the stock one is."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_pairs import BEFORE_5, VOCABULARY, T, make, patched, ran, run, tokens, transformers

import llama_fast as lf

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_the_stock_model_saves(tied: bool, tmp_path: Path) -> None:
    stock = make(tie_word_embeddings=tied)
    ours = patched(stock, fused_loss=True)
    for name, model in (("stock", stock), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    assert _files(tmp_path / "ours") == _files(tmp_path / "stock")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "llama_fast" not in json.dumps(config)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(loaded) is transformers.LlamaForCausalLM
    assert torch.equal(loaded(tokens()).logits, stock(tokens()).logits)


def test_state_dicts_go_both_ways() -> None:
    stock, other = make(0), make(1)
    ours = patched(other)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-5)
    again = make(2)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(tokens()).logits, stock(tokens()).logits)


def test_tied_weights_stay_tied() -> None:
    ours = patched(make(tie_word_embeddings=True), fused_loss=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours(tokens(), labels=tokens()).loss.backward()
    ours.tie_weights()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.resize_token_embeddings(VOCABULARY + 7)
    assert ours(tokens()).logits.shape[-1] == VOCABULARY + 7
    assert ran(ours) == "block"
    assert torch.isfinite(ours(tokens(), labels=tokens()).loss)


def test_moved_to_another_dtype() -> None:
    stock = make()
    ours = patched(stock)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        ours.to(dtype)
        assert ours(tokens()).logits.dtype == dtype
        assert ran(ours) == "block"
    ours.model.layers.bfloat16()  # layers of another dtype than what comes in: as the stock model, whatever it does
    stock.model.layers.bfloat16()
    found = []
    for model in (ours, stock):
        try:
            found.append(str(model(tokens()).logits.dtype))
        except RuntimeError as error:
            found.append(type(error).__name__)
    assert found[0] == found[1]


def test_on_the_meta_device() -> None:
    """Shapes without numbers, as for an estimate of the memory."""
    ids = tokens().to("meta")
    for fused in (False, True):
        ours = patched(make(), fused_loss=fused)
        if BEFORE_5:  # whose rotary tables ask for autocast of their device, which torch has not for this one
            tables = [t.to("meta") for t in ours.model.rotary_emb(torch.zeros(1), torch.arange(T)[None])]
            ours.model.rotary_emb.forward = lambda *_, tables=tables: tables
        ours.to("meta")
        out = ours(ids, labels=ids)
        out.loss.backward()
        assert fused or out.logits.shape == (*ids.shape, VOCABULARY)
        assert all(p.grad.shape == p.shape for p in ours.parameters())


_PLACES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def _place(model: Any, how: str) -> None:
    """As `device_map` does: "devices" stands for several devices that are all the CPU here."""
    import accelerate
    from accelerate.hooks import attach_align_device_hook_on_blocks

    cpu = torch.device("cpu")
    if how == "offloaded":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        attach_align_device_hook_on_blocks(model, dict.fromkeys(_PLACES, cpu), dict.fromkeys(_PLACES, False))


@needs_accelerate
@pytest.mark.parametrize("first", [True, False], ids=["patch then place", "place then patch"])
@pytest.mark.parametrize(
    ("how", "runs"),
    [("devices", "block"), ("offloaded", "input_layernorm has a forward of its own")],
    ids=["devices", ""],
)
def test_a_device_map_keeps_working(how: str, runs: str, first: bool) -> None:
    """accelerate stands around each module's forward; offloaded weights are nowhere until their module is called."""
    from accelerate.hooks import remove_hook_from_submodules

    stock = make().eval()
    ours = copy.deepcopy(stock)
    want = stock(tokens()).logits
    for step in ("patch", "place") if first else ("place", "patch"):
        if step == "patch":
            lf.hf.patch(ours)
        else:
            _place(ours, how)
    assert hasattr(ours.model.layers[0].mlp.up_proj, "_hf_hook")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, want, rtol=1e-4, atol=1e-5)
        assert ran(ours) == runs
        lf.hf.unpatch(ours)
        assert torch.equal(ours(tokens()).logits, want)
        assert not any(type(m).__module__.startswith("llama_fast") for m in ours.modules())
        remove_hook_from_submodules(ours)
        assert torch.equal(ours(tokens()).logits, want)


@needs_accelerate
def test_sharded_files_on_one_device(tmp_path: Path) -> None:
    stock = make().eval()
    stock.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = lf.hf.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"))
    torch.testing.assert_close(ours(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert ran(ours) == "block"


@needs_accelerate
def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    stock = make().eval()
    stock.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
                              "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}  # fmt: skip
    ours = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    lf.hf.patch(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_stock_after_unpatch_is_bitwise_stock() -> None:
    stock = make()
    found = run(lf.hf.unpatch(patched(stock)))
    for name, want in run(stock).items():
        assert torch.equal(found[name], want), name
