"""patch, unpatch, report and register: what they change, what they leave, and what they refuse."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_pairs import SIZES, make, patched, ran, tokens, transformers
from torch import nn

import llama_fast as lf
from llama_fast.hf import layout
from llama_fast.hf.attention import NAME


def _state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Class, attributes and attention implementation of every module."""
    return [
        (
            name,
            type(m),
            sorted(m.__dict__),
            m.training,
            getattr(getattr(m, "config", None), "_attn_implementation", None),
        )
        for name, m in model.named_modules()
    ]


def test_importing_llama_fast_does_not_import_transformers() -> None:
    code = "import sys, llama_fast as lf; assert 'transformers' not in sys.modules; lf.hf.patch; print('imported')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.stdout == "imported\n", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'hg'"):
        _ = lf.hg


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'llama_fast\[hf\]'"):
        _reloaded()


def _reloaded() -> None:
    """Runs llama_fast/hf/layout.py again, aside from the module that is in use."""
    spec = importlib.util.spec_from_file_location("layout_again", layout.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("version", ["4.52.4", "6.0.0", "main"])
def test_an_unknown_version_raises(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(RuntimeError, match=f"transformers {version} is installed, expected"):
        _reloaded()


def test_an_unknown_layout_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = layout.stock
    with monkeypatch.context() as patch:
        patch.setattr(stock.LlamaMLP, "forward", lambda self, hidden: hidden)
        with pytest.raises(RuntimeError, match=r"LlamaMLP.forward takes \('hidden',\), expected \['x'\] among them"):
            _reloaded()
    with monkeypatch.context() as patch:
        patch.delattr(stock, "LlamaRMSNorm")
        with pytest.raises(RuntimeError, match="modeling_llama has no LlamaRMSNorm"):
            _reloaded()
    with monkeypatch.context() as patch:
        patch.setattr(stock, "LlamaRMSNorm", nn.RMSNorm)
        with pytest.raises(RuntimeError, match=r"LlamaRMSNorm is torch.nn.modules.normalization's"):
            _reloaded()
    model = make()
    model.model.layers[1].third = nn.Identity()
    with pytest.raises(RuntimeError, match=r"model.layers.1 of transformers .* has the submodules .*'third'"):
        lf.hf.patch(model)
    assert ran_nothing(model)


def ran_nothing(model: nn.Module) -> bool:
    return not any(type(m).__module__.startswith("llama_fast") for m in model.modules())


def test_unpatch_restores_exactly() -> None:
    model = make()
    before, values = _state(model), {n: t.clone() for n, t in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    assert lf.hf.patch(model, fused_loss=True) is model
    assert model.config._attn_implementation == NAME
    assert [id(p) for p in model.parameters()] == identities
    assert list(model.state_dict()) == list(values)
    model(tokens(), labels=tokens()).loss.backward()
    assert lf.hf.unpatch(model) is model
    assert _state(model) == before
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="LlamaForCausalLM has no patched module"):
        lf.hf.unpatch(model)


def test_what_was_derived_from_a_patched_class_is_not_taken_back() -> None:
    model = patched(make())
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[1].input_layernorm, "weight", nn.Identity())
    before = _state(model)
    with pytest.raises(
        ValueError,
        match=r"model.layers.1.input_layernorm is a ParametrizedLlamaRMSNorm, expected the class that patch gave it",
    ):
        lf.hf.unpatch(model)
    assert _state(model) == before


@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]
)
def test_a_wrapped_forward_outlives_the_patch(kind: str) -> None:
    """As accelerate wraps the model's for mixed precision."""
    model, calls = make(), []
    want = model(tokens(), labels=tokens())
    lf.hf.patch(model, fused_loss=True)

    def wrapped(forward: Any) -> Any:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(kind)
            return forward(*args, **kwargs)

        return counted

    for module in model.modules():
        if type(module).__name__ == kind:
            module.forward = wrapped(module.forward)
    torch.testing.assert_close(model(tokens(), labels=tokens()).loss, want.loss, rtol=1e-4, atol=1e-5)
    once = len(calls)
    assert once
    got = lf.hf.unpatch(model)(tokens(), labels=tokens())
    assert len(calls) == 2 * once
    assert torch.equal(got.logits, want.logits)
    assert "not patched" in lf.hf.report(model)


def test_an_epsilon_may_change_after_the_patch() -> None:
    stock = make()
    ours = patched(stock)
    ours(tokens())
    for model in (stock, ours):
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 0.5
    torch.testing.assert_close(ours(tokens()).logits, stock(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert ran(ours) == "block"


def test_layers_with_another_norm_or_attention() -> None:
    stock = make()
    stock.model.layers[0].input_layernorm = nn.RMSNorm(64)
    stock.model.layers[1].self_attn = _NoAttention()
    ours = patched(stock)
    call = {"use_cache": False}
    torch.testing.assert_close(ours(tokens(), **call).logits, stock(tokens(), **call).logits, rtol=1e-4, atol=1e-5)
    first, second = lf.hf.report(ours).splitlines()[1:3]
    assert first.startswith("model.layers.0: ops, for input_layernorm is a torch RMSNorm: llama_fast: rms_norm, rope")
    assert second.startswith("model.layers.1: ops, for self_attn is a test_hf _NoAttention: llama_fast: rms_norm, swi")
    ours.model.layers[0].input_layernorm = ours.model.layers[1].input_layernorm
    ours(tokens(), **call)
    assert ours.model.layers[0]._llama_fast.last == "block"


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return 0.1 * hidden_states, None


def test_patching_twice_changes_the_options_only() -> None:
    model = make()
    before = _state(model)
    lf.hf.patch(lf.hf.patch(model), policy="save", fused_loss=True)
    assert model.model.layers[0]._llama_fast.options.policy == "save"
    assert model(tokens(), labels=tokens()).logits is None
    lf.hf.patch(model)
    assert model(tokens(), labels=tokens()).logits is not None
    lf.hf.unpatch(model)
    assert _state(model) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_comes_back(implementation: str) -> None:
    model = make(attn_implementation=implementation)
    lf.hf.unpatch(lf.hf.patch(model))
    assert model.config._attn_implementation == implementation
    lf.hf.patch(model)
    model.config._attn_implementation = "sdpa"  # the user's later choice stands, in the patched model too
    model(tokens())
    assert ran(model) == "the attention implementation is sdpa"
    lf.hf.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_models_with_llama_layers() -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    ids = tokens()
    for kind in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            want = model(ids)[0]
            got = lf.hf.patch(model)(ids)[0]
        assert ran(model) == "block"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wrapped = nn.ModuleDict({"trunk": make().model})
    lf.hf.patch(wrapped)
    assert "trunk.layers.0 to trunk.layers.1: block" in lf.hf.report(wrapped)


def test_nothing_to_patch_raises() -> None:
    with pytest.raises(ValueError, match="model is a str, expected a module with a LlamaDecoderLayer or Mistral"):
        lf.hf.patch("meta-llama/Llama-3.2-1B")
    with pytest.raises(ValueError, match=r"Linear has no LlamaDecoderLayer or .* or Qwen3DecoderLayer, only Linear"):
        lf.hf.patch(nn.Linear(2, 2))

    class Sharded(layout.stock.LlamaDecoderLayer):
        pass

    model = make()
    for layer in model.model.layers:
        layer.__class__ = Sharded
    with pytest.raises(ValueError, match=r"model.layers.0 is a test_hf.Sharded, expected LlamaDecoderLayer itself"):
        lf.hf.patch(model)
    model = make()
    for layer in model.model.layers:
        layer.forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"the forward of model.layers.0 was replaced"):
        lf.hf.patch(model)
    assert ran_nothing(model)


def test_a_fused_loss_needs_a_place() -> None:
    with pytest.raises(ValueError, match=r"fused_loss is True, expected a LlamaForCausalLM or .* for it, found none"):
        lf.hf.patch(make().model, fused_loss=True)
    model = make()
    model.forward = functools.partial(model.forward, use_cache=False)
    with pytest.raises(ValueError, match="found one whose class or forward was replaced"):
        lf.hf.patch(model, fused_loss="training")
    assert ran_nothing(model)


def test_options_are_checked() -> None:
    expected = "expected one of save, recompute-cheap, recompute-linear, recompute-all"
    with pytest.raises(ValueError, match=f"policy is 'all', {expected}"):
        lf.hf.patch(make(), policy="all")
    with pytest.raises(ValueError, match="fused_loss is 'eval', expected True, False or 'training'"):
        lf.hf.patch(make(), fused_loss="eval")


def test_report_says_what_runs_and_why() -> None:
    model = make(num_hidden_layers=4)
    assert "model.layers.0 to model.layers.3: transformers' own (LlamaDecoderLayer, not patched)" in lf.hf.report(model)
    model.model.layers[1].forward = model.model.layers[0].forward
    lf.hf.patch(model)
    model.model.layers[2].mlp.act_fn = nn.GELU()
    model.model.layers[3].self_attn.o_proj = nn.Linear(64, 64, bias=True)
    lines = lf.hf.report(model).splitlines()
    assert lines[0].startswith("llama_fast ")
    assert lines[0].endswith(f"transformers {transformers.__version__}")
    assert lines[1] == "model.layers.0: block, recompute-cheap"
    assert lines[2] == "model.layers.1: transformers' own (LlamaDecoderLayer, not patched)"
    assert lines[3] == (
        "model.layers.2: ops, for mlp has the activation GELU: llama_fast: rms_norm, rope, attention, q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj; transformers: mlp has the activation GELU"
    )
    assert lines[4].startswith(
        "model.layers.3: ops, for o_proj has a bias: llama_fast: rms_norm, rope, attention, swiglu"
    )
    assert lines[4].endswith("transformers: nothing")
    assert lines[5] == "LlamaForCausalLM, lm_head: llama_fast"
    assert lines[6] == "LlamaForCausalLM, loss of labels: transformers', on the logits (fused_loss is False)"
    with pytest.raises(ValueError, match="Linear has no LlamaDecoderLayer"):
        lf.hf.report(nn.Linear(2, 2))


def test_report_tells_of_the_last_call() -> None:
    model = patched(make())
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, 3:5] = 0
    model(ids, attention_mask=mask)
    assert lf.hf.report(model).count("last call: ops, for a mask that is not causal") == 1
    model(ids)
    assert "last call" not in lf.hf.report(model)


def test_a_patched_model_can_be_copied_and_pickled() -> None:
    model = patched(make(), policy="save")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits)
        assert ran(other) == "block"
        assert other.model.layers[0]._llama_fast.options.policy == "save"
        assert ran_nothing(lf.hf.unpatch(other))
        assert other.config._attn_implementation == "sdpa"
    assert ran(model) == "block"


def test_register_takes_effect_in_from_pretrained(tmp_path: Path) -> None:
    has_registry = importlib.util.find_spec("transformers.monkey_patching") is not None
    make().save_pretrained(tmp_path)
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    try:
        with warnings.catch_warnings(record=True) as warned:
            lf.hf.register()
            lf.hf.register()
        broken = [str(w.message) for w in warned if "registry of class replacements" in str(w.message)]
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
        torch.testing.assert_close(model(tokens()).logits, before(tokens()).logits, rtol=1e-4, atol=1e-5)
        mask = torch.ones_like(tokens())
        mask[0, :3] = 0
        got, want = (m(tokens(), attention_mask=mask).logits[mask.bool()] for m in (model, before))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        hidden = model(tokens(), output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        # a stock model, made before or after, keeps recording what it is asked for
        for stock in (before, make()):
            found = stock(tokens(), output_hidden_states=True).hidden_states
            assert len(found) == 3
            torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)
        if broken or not has_registry:
            assert ran_nothing(model)
            assert len(broken) == (2 if has_registry else 0)
            return
        assert ran(model) == "block"
        assert ran_nothing(make())
        other = transformers.AutoModel.from_pretrained(tmp_path)
        other(tokens())
        assert ran(other) == "the attention implementation is sdpa"
        lf.hf.patch(other)(tokens())
        assert ran(other) == "block"
        assert ran_nothing(lf.hf.unpatch(other))
    finally:
        if has_registry:
            importlib.import_module("transformers.monkey_patching").clear_patch_mapping()


def test_a_registry_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkey_patching = pytest.importorskip(
        "transformers.monkey_patching", reason="this transformers has no registry of class replacements"
    )

    class Broken(type(sys)):  # type: ignore[misc]
        def __dir__(self) -> list[str]:
            raise ImportError("no torchvision")

    monkeypatch.setitem(sys.modules, "transformers.models.zzz", Broken("transformers.models.zzz"))
    with pytest.warns(UserWarning, match=r"fails here \(.*torchvision.*\): from_pretrained gives"):
        lf.hf.register()
    assert not monkey_patching.get_patch_mapping()
    assert transformers.models.llama.modeling_llama.LlamaDecoderLayer is layout.stock.LlamaDecoderLayer
    assert ran_nothing(make())
