"""LoRA adapters of PEFT on a patched model: what runs as one block, and that it is what PEFT computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_pairs import make, ran, tokens
from torch import Tensor, nn

import llama_fast as lf
from llama_fast.low_rank import kept

peft = pytest.importorskip("peft")

ALL = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
TARGETS = {"q_proj": ["q_proj"], "q_proj, v_proj": ["q_proj", "v_proj"], "down_proj": ["down_proj"], ALL: "all-linear"}


def adapted(model: Any, targets: Any = "all-linear", name: str = "default", **options: Any) -> Any:
    """With LoRA adapters that are not zero."""
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options), adapter_name=name)
    _draw(model)
    return model


def _draw(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape))


def pair(targets: Any = "all-linear", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A patched model with adapters and its stock twin."""
    stock = make().to(dtype)
    ours, theirs = (adapted(m, targets, **options) for m in (copy.deepcopy(stock), stock))
    return lf.hf.patch(ours), theirs


def trained(model: Any, **call: Any) -> dict[str, Tensor]:
    """Logits, and gradients of what is trained."""
    model.zero_grad()
    out = model(tokens(), labels=tokens(), **call)
    out.logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **found}


def assert_alike(ours: Any, theirs: Any, tolerance: float = 1e-9, **call: Any) -> None:
    found, want = trained(ours, **call), trained(theirs, **call)
    assert found.keys() == want.keys()
    for name, t in want.items():
        if t is None:
            assert found[name] is None
        else:
            assert found[name].dtype == t.dtype
            torch.testing.assert_close(found[name], t, rtol=tolerance, atol=tolerance * float(t.abs().max()), msg=name)


@pytest.mark.parametrize("first", [True, False], ids=["patch then adapt", "adapt then patch"])
@pytest.mark.parametrize("which", TARGETS)
def test_lora(which: str, first: bool) -> None:
    stock = make().double()
    if first:
        ours = adapted(lf.hf.patch(copy.deepcopy(stock)), TARGETS[which])
    else:
        ours = lf.hf.patch(adapted(copy.deepcopy(stock), TARGETS[which]))
    theirs = adapted(stock, TARGETS[which])
    assert f": block, recompute-cheap, LoRA of {which}\n" in lf.hf.report(ours)
    assert_alike(ours, theirs, 1e-5)
    assert ran(ours) == "block"
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    expected = theirs(tokens()).logits
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert ran(merged) == "block"


@pytest.mark.parametrize("policy", ["save", "recompute-linear", "recompute-all"])
def test_policies(policy: str) -> None:
    ours, theirs = pair()
    lf.hf.patch(ours, policy=policy)
    assert_alike(ours, theirs, 1e-5)
    assert ran(ours) == "block"


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_weights_in_bfloat16_and_adapters_in_float32(padded: bool) -> None:
    """PEFT's default. Against the same numbers in float64: no further from them than PEFT's own result."""
    ours, theirs = pair(dtype=torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    call = {"attention_mask": (torch.arange(19) < torch.tensor([[19], [11], [4]])).long()} if padded else {}
    found, want, truth = (trained(m, **call) for m in (ours, theirs, exact))
    assert ran(ours) == "block"
    ratios = []
    for name, t in truth.items():
        assert found[name].dtype == want[name].dtype
        errors = [(f[name].double() - t).square().mean().sqrt().item() for f in (found, want)]
        ratios.append(errors[0] / errors[1])
    assert max(ratios) < 2
    assert sum(ratios) / len(ratios) < 1.1


def test_autocast() -> None:
    ours, theirs = pair(dtype=torch.float32)
    truth = trained(copy.deepcopy(theirs).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, want = trained(ours), trained(theirs)
    assert ran(ours) == "block"
    for name, t in truth.items():
        errors = [(f[name].double() - t).square().mean().sqrt().item() for f in (found, want)]
        assert errors[0] < 2 * errors[1], name


def test_adapters_in_float64_beside_float32_run_by_the_ops() -> None:
    """PEFT multiplies these in float64, under autocast too."""
    ours, theirs = pair(dtype=torch.float32)
    for model in (ours, theirs):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A.double(), module.lora_B.double()
    assert_alike(ours, theirs, 1e-4)
    assert ran(ours) == "adapters in torch.float64 beside torch.float32"


def test_small_gradients_beside_float16_weights() -> None:
    """B is small when training begins, and the gradient of A with it, which float16 would lose."""
    ours, theirs = pair(dtype=torch.float16)
    for model in (ours, theirs):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.mul_(1e-5)
    truth = trained(copy.deepcopy(theirs).double())
    found = trained(ours)
    assert ran(ours) == "adapters that are not in torch.float16, which would lose their small gradients"
    for name, t in truth.items():
        assert (found[name].double() - t).norm() < 0.05 * t.norm(), name
    with torch.no_grad():
        ours(tokens())
    assert ran(ours) == "block"


def test_generate() -> None:
    ours, theirs = pair()
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = tokens()[:, :5]
    assert torch.equal(ours.generate(input_ids=prompt, **call), theirs.generate(input_ids=prompt, **call))
    assert ran(ours) == "block"


def test_gradient_checkpointing() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_alike(ours, theirs, 1e-5)
    assert ran(ours) == "block"


def test_compiled() -> None:
    ours, theirs = pair()
    torch.compiler.reset()
    compiled = torch.compile(ours.base_model.model.model, backend="aot_eager")
    with torch.no_grad():
        found = compiled(tokens(), use_cache=False).last_hidden_state
        expected = theirs.base_model.model.model(tokens()).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_disabled_switched_and_merged_adapters() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"]))
        _draw(model)
    for step in (
        lambda m: m.set_adapter("other"),
        lambda m: m.set_adapter("default"),
        lambda m: m.base_model.merge_adapter(),
        lambda m: m.base_model.unmerge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ):
        for model in (ours, theirs):
            step(model)
        with torch.no_grad():
            found, want = (m(tokens()).logits for m in (ours, theirs))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        assert ran(ours) == "block"
    for model in (ours, theirs):
        model.base_model.merge_adapter()
        model.base_model.disable_adapter_layers()  # the next call of each of PEFT's layers takes it out of the weights
    for last in ("q_proj is to be unmerged", "block"):
        with torch.no_grad():
            found, want = (m(tokens()).logits for m in (ours, theirs))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        assert ours.base_model.model.model.layers[0]._llama_fast.last == last
    for model in (ours, theirs):
        model.base_model.enable_adapter_layers()
    with ours.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=1e-5, atol=1e-5)


def _first(model: Any) -> Any:
    return next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))


def _two(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])


OTHERS: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "a dropout in place": (
        {}, lambda m: _first(m.train()).lora_dropout.update({"default": nn.Dropout(0.25, inplace=True)}),
        "q_proj has a dropout in place",
    ),
    "another module for a dropout": (
        {}, lambda m: _first(m).lora_dropout.update({"default": nn.Tanh()}),
        "q_proj has a dropout that is a torch Tanh",
    ),
    "a hook on the dropout": (
        {}, lambda m: _first(m).lora_dropout["default"].register_forward_hook(lambda *given: 2 * given[-1]),
        "q_proj has a hook on its dropout",
    ),
    "DoRA": ({"use_dora": True}, lambda _: None, "q_proj has a variant of LoRA"),
    "a bias": ({"lora_bias": True}, lambda _: None, "q_proj has an adapter with a bias"),
    "two": ({}, _two, "q_proj has 2 active adapters"),
    "a hook": ({}, lambda m: _first(m).register_forward_hook(lambda *_: None), "q_proj has a hook"),
    "a hook on A": (
        {}, lambda m: _first(m).lora_A["default"].register_forward_hook(lambda *_: None),
        "q_proj has an adapter that has a hook",
    ),
    "a hook on the base": (
        {}, lambda m: _first(m).base_layer.register_forward_hook(lambda *_: None),
        "q_proj has a base layer that has a hook",
    ),
    "a scaling that is not finite": (
        {}, lambda m: _first(m).scaling.update(default=float("inf")), "q_proj has a scaling of inf",
    ),
    "a module of its own": (
        {}, lambda m: setattr(_first(m), "base_layer", _Own(_first(m).base_layer)), "q_proj has a base layer that is a",
    ),
}  # fmt: skip


class _Own(nn.Module):
    """Twice what a linear layer gives."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_block_cannot_do_runs_by_the_ops(what: str) -> None:
    options, change, why = OTHERS[what]
    ours, theirs = pair(**options)
    for model in (ours, theirs):
        torch.manual_seed(7)
        change(model)
        _draw(model)
    assert f"ops, for {why}" in lf.hf.report(ours)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(8)
        found.append(trained(model))
    for name, t in found[1].items():
        close = {"rtol": 1e-5, "atol": 1e-5 * float(t.abs().nan_to_num().max()), "equal_nan": True}
        torch.testing.assert_close(found[0][name], t, **close, msg=name)
    ran_first = ours.base_model.model.model.layers[0]._llama_fast.last
    assert ran_first.startswith(why)


class _Dropout(nn.Module):
    """nn.Dropout, of the numbers that the block drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        mask = kept(x, self.p, int(torch.empty((), dtype=torch.int64).random_()))
        return x if mask is None or not self.training else x * mask / (1 - self.p)


def _trained_with_dropout(dtype: torch.dtype, change: Callable[[Any], object]) -> tuple[Any, list[dict[str, Tensor]]]:
    """The patched model, and what it and its stock twin give in training with equal numbers dropped."""
    ours, theirs = pair(lora_dropout=0.25, dtype=dtype)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = _Dropout(0.25)
    found = []
    for model in (ours, theirs):
        change(model)
        model.train()
        torch.manual_seed(8)
        found.append(trained(model))
    return ours, found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dropout(dtype: torch.dtype, checkpointing: bool) -> None:
    def change(model: Any) -> None:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    ours, (found, want) = _trained_with_dropout(dtype, change)
    assert ran(ours) == "block"
    tolerance = 1e-5 if dtype == torch.float64 else 0.06
    for name, t in want.items():
        assert (found[name] - t).double().norm() <= tolerance * t.double().norm(), name


def test_dropout_under_torch_compile_runs_by_the_ops() -> None:
    """Layers compiled each for itself, which without dropout are blocks: no mask comes in their way."""
    ours, theirs = pair(lora_dropout=0.25)
    torch.compiler.reset()
    for layer in ours.base_model.model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    found = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(8)
        found.append(model(tokens(), use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_dropout_that_is_off_in_evaluation() -> None:
    ours, theirs = pair(lora_dropout=0.25)
    for model in (ours, theirs):
        model.eval()
    assert_alike(ours, theirs, 1e-5)
    assert ran(ours) == "block"


def test_adapters_by_name_for_each_row() -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        _draw(model)
        model.eval()
    with torch.no_grad():
        names = ["default", "__base__", "other"]
        found, want = (m(tokens(), adapter_names=names).logits for m in (ours, theirs))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_by_peft(tmp_path: Any) -> None:
    ours, theirs = pair(dtype=torch.float32)
    ours.save_pretrained(tmp_path)
    stock = theirs.unload()
    loaded = peft.PeftModel.from_pretrained(lf.hf.patch(stock), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, ours(tokens()).logits)
    assert ran(loaded) == "block"
    assert "lora" not in lf.hf.report(lf.hf.unpatch(ours)).lower()
