"""A patched model in training: checkpointing, compilation, autocast, hooks, adapters, the Trainer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hf_pairs import BEFORE_4_56, BEFORE_5, VERSION, assert_close, exact, make, patched, ran, run, tokens, transformers
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["recompute-cheap", "recompute-linear", "recompute-all"])
def test_gradient_checkpointing(policy: str, reentrant: bool) -> None:
    stock = make().double()
    ours = patched(stock, policy=policy)
    calls = []
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    ours.model.layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    ours.train()
    found = run(ours)
    assert ran(ours) == "block"
    assert_close(found, run(stock), run(exact(stock)))
    assert calls


@pytest.mark.parametrize("call", [{}, {"use_cache": False}, {"attention_mask": "ones"}], ids=str)
def test_compiled_without_graph_break(call: dict[str, Any]) -> None:
    """Equal, and by the attention of the docs' table: with a cache ours, else sdpa."""
    call = {k: torch.ones_like(tokens()) if v == "ones" else v for k, v in call.items()}
    stock, seen = make().double(), []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    found = run(torch.compile(patched(stock), backend=backend, fullgraph=not BEFORE_4_56), **call)
    found = {name.replace("_orig_mod.", ""): t for name, t in found.items()}
    assert_close(found, run(stock, **call), run(exact(stock), **call))
    ours = "llama_fast.attention_bwd.default" in seen
    assert ours == (not call)
    assert "llama_fast.swiglu_bwd.default" in seen


@pytest.mark.parametrize("runs", ["block", "down_proj has a hook"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_autocast_keeps_the_residual_stream_in_float32(padded: bool, dtype: torch.dtype, runs: str) -> None:
    stock = make()
    ours, truth = patched(stock), exact(stock)
    call = {"attention_mask": (torch.arange(19) < torch.tensor([[19], [11], [4]])).long()} if padded else {}
    if runs != "block":
        for layer in ours.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda *_: None)
    found = []
    for model in (ours, stock):
        with torch.autocast("cpu", dtype=dtype):
            out = model(tokens(), output_hidden_states=True, **call)
            assert out.hidden_states[1].dtype == torch.float32
            logits = out.logits.float()
        model.zero_grad()
        logits.square().mean().backward()
        found.append({"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    assert ran(ours) == runs
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    logits = truth(tokens(), **call).logits
    logits.square().mean().backward()
    truths = {"logits": logits.detach(), **{n: p.grad for n, p in truth.named_parameters()}}
    assert_close(*found, truths, autocast=dtype)


def test_autocast_without_gradients_casts_the_weights_once() -> None:
    """autocast keeps what it has cast for as long as it lasts: a token costs no pass over the weights."""
    ours = patched(make())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours(tokens())
        assert ran(ours).startswith("autocast without gradients")
        assert "last call: ops, for autocast without gradients" in lf.hf.report(ours)
        with _Casts() as casts:
            ours(tokens())
    assert not casts.of_parameters(ours)
    double = patched(make()).double()
    want = double(tokens()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(double(tokens()).logits, want)  # which autocast leaves as it is
    assert ran(double) == "block"
    with torch.autocast("cpu", dtype=torch.float16):
        half = patched(make()).bfloat16()
        half(tokens())
    assert half.model.layers[0]._llama_fast.last == "autocast beside hidden states of torch.bfloat16"


class _Casts(TorchDispatchMode):
    """The sizes of tensors that were cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))

    def of_parameters(self, model: torch.nn.Module) -> list[torch.Size]:
        matrices = {p.shape for p in model.parameters() if p.ndim == 2}
        return [shape for shape in self.shapes if shape in matrices]


def _tensors(found: Any) -> list[Tensor]:
    found = found if isinstance(found, tuple | list) else (found,)
    return [t.detach().clone() for t in found if isinstance(t, Tensor)]


_HOOKS: dict[str, Any] = {
    "forward": lambda m, log: m.register_forward_hook(lambda _m, _args, out: log.extend(_tensors(out))),
    "before": lambda m, log: m.register_forward_pre_hook(lambda _m, args: log.extend(_tensors(args))),
    "backward": lambda m, log: m.register_full_backward_hook(lambda _m, dx, dy: log.extend(_tensors((*dx, *dy)))),
    "before backward": lambda m, log: m.register_full_backward_pre_hook(lambda _m, dy: log.extend(_tensors(dy))),
}


@pytest.mark.parametrize("kind", _HOOKS)
@pytest.mark.parametrize(
    ("names", "runs"),
    [
        (["model.layers.1", "lm_head"], "block"),
        (["model.layers.0.mlp", "model.layers.1.mlp"], "mlp has a hook"),
        (["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"], "v_proj has a hook"),
        (["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"], "mlp has a hook on its activation"),
    ],
    ids=["layer", "mlp", "v_proj", "activation"],
)
def test_hooks_see_what_they_saw(names: list[str], runs: str, kind: str) -> None:
    stock = make().double()
    ours = patched(stock)
    seen = []
    for model in (ours, stock):
        log: list[Tensor] = []
        handles = [_HOOKS[kind](model.get_submodule(name), log) for name in names]
        run(model)
        if model is ours:
            assert ran(ours) == runs
        for handle in handles:
            handle.remove()
        seen.append(log)
    assert len(seen[0]) == len(seen[1]) > 0
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    run(ours)
    assert ran(ours) == "block"


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_see_all(kind: str) -> None:
    stock, seen = make(), []
    ours = patched(stock)
    register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        for model in (stock, ours):
            model(tokens()).logits.sum().backward()
    finally:
        handle.remove()
    names = [sorted(seen[: len(seen) // 2]), sorted(seen[len(seen) // 2 :])]
    assert names[0] == names[1]
    assert "LlamaMLP" in names[0]
    assert "last call: ops, for mlp has a hook, as all modules have" in lf.hf.report(ours)
    ours(tokens())
    assert ran(ours) == "block"


def test_within_a_transform_of_torch_func() -> None:
    """No kernel can read the tensors that it makes: transformers' own code runs."""
    stock = make().double().eval()
    found = []
    for model in (patched(stock, fused_loss=True), stock):

        def loss(parameters: Any, ids: Tensor, model: Any = model) -> Tensor:
            call = {"labels": ids[None], "use_cache": False}
            return torch.func.functional_call(model, parameters, (ids[None],), call).loss

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens(length=7)))
        if model is not stock:
            assert ran(model) == "a transform of torch.func"
            model(tokens())
            assert ran(model) == "block"
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=name)


def test_forward_mode() -> None:
    stock = make(attn_implementation="eager").double().eval()
    ours = patched(stock)
    embeddings, found = torch.randn(2, 5, 64, dtype=torch.float64), []
    for model in (ours, stock):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
            out = model(inputs_embeds=x, use_cache=False).logits
            found.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert ran(ours) == "forward-mode differentiation"
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("use_cache", [False, True])
def test_traced_by_torch_jit(use_cache: bool) -> None:
    """A trace sees no kernel: it would hold nothing but the memory that a kernel was to fill."""

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=use_cache).logits

    if BEFORE_5 and not use_cache:
        pytest.skip("transformers 4.x does not trace its own model without a cache: its mask is made by vmap")
    ours = patched(make()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(Logits(ours), (tokens(),), check_trace=False)
        assert ran(ours) == "torch.jit.trace"
        other = tokens(seed=3)
        torch.testing.assert_close(traced(other), ours(other).logits, rtol=1e-4, atol=1e-5)


def test_weights_that_the_config_asks_for() -> None:
    stock = make(attn_implementation="eager")
    stock.config.output_attentions = True
    ours = patched(stock)
    want, got = stock(tokens()).attentions, ours(tokens()).attentions
    recorded = "self_attn has a forward of its own"  # 4.57 wraps it while it notes the weights
    assert ran(ours) == (recorded if VERSION[:2] == (4, 57) else "the attention weights are asked for")
    assert len(got) == len(want) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_hidden_states_and_weights_are_given() -> None:
    stock = make(attn_implementation="eager").double()
    ours = patched(stock)
    call = {"output_hidden_states": True, "output_attentions": True}
    want, got = stock(tokens(), **call), ours(tokens(), **call)
    for one, other in ((got.hidden_states, want.hidden_states), (got.attentions, want.attentions)):
        assert len(one) == len(other) > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    ours(tokens())
    assert ran(ours) == "block"  # what was asked for once does not stay on
    assert ours(tokens(), output_hidden_states=True).hidden_states is not None
    assert ran(ours) == "block"


def test_the_flattening_collator() -> None:
    """One row of sequences, told apart by position_ids and by what flash attention takes: each as it is alone."""
    stock = make().double()
    ours = patched(stock)
    rows = [row[:n] for row, n in zip(tokens(), (19, 4, 11), strict=True)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    call = collate([{"input_ids": row.tolist()} for row in rows])
    assert "cu_seq_lens_q" in call
    found = ours(**call, use_cache=False)
    assert ran(ours) == "block"
    alone = torch.cat([stock(row[None]).logits for row in rows], dim=1)
    torch.testing.assert_close(found.logits, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, stock(**call, use_cache=False).loss, rtol=1e-5, atol=1e-5)


def test_exported() -> None:
    ours = patched(make()).eval()
    program = torch.export.export(ours, (tokens(),), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(tokens(), use_cache=False).logits, ours(tokens()).logits)


def _kept_bytes(model: Any, **call: Any) -> int:
    """What is held between forward and backward beside the parameters, by storage."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens(), **call)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_less_is_kept_for_the_backward(padded: bool, autocast: bool) -> None:
    stock = make()
    call = {"attention_mask": (torch.arange(19) < torch.tensor([[19], [11], [4]])).long()} if padded else {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert _kept_bytes(patched(stock), **call) < 0.6 * _kept_bytes(stock, **call)


def test_frequencies_that_are_learned() -> None:
    found = []
    stock = make().double()
    for model in (patched(stock), stock):
        rotary = model.model.rotary_emb
        frequencies = torch.nn.Parameter(rotary.inv_freq.double())
        angles = torch.arange(19)[None, :, None] * frequencies
        tables = [t(torch.cat((angles, angles), dim=-1)) for t in (torch.cos, torch.sin)]
        rotary.forward = lambda x, position_ids, tables=tables: tables
        model(tokens()).logits.square().mean().backward()
        found.append([frequencies.grad, *(p.grad for p in model.parameters())])
        if model is not stock:
            assert ran(model) == "rotary tables that need gradients"
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_frozen_and_half_frozen_models() -> None:
    stock = make().double()
    for trainable in ("mlp", "layers.1", "embed_tokens"):
        found = []
        for model in (patched(stock), exact(stock)):
            for name, p in model.named_parameters():
                p.requires_grad_(trainable in name)
            model(tokens()).logits.square().mean().backward()
            found.append({n: p.grad for n, p in model.named_parameters()})
        for name, want in found[1].items():
            assert (want is None) == (found[0][name] is None), name
            if want is not None:
                torch.testing.assert_close(found[0][name], want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")
@pytest.mark.usefixtures("one_process")
def test_sharded_by_fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    stock = make().double()
    ours = patched(stock, fused_loss=True)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in ours.model.layers:
        fully_shard(layer, mesh=mesh)
    found = run(fully_shard(ours, mesh=mesh))
    assert {m._llama_fast.last for m in ours.model.layers} == {"block"}
    assert "in shards, what runs depends on what a call finds; last call: block, rec" in lf.hf.report(ours)
    assert lf.hf.patch(ours, policy="save", fused_loss=True)(tokens(), labels=tokens()).logits is None
    assert "loss of labels: fused, without logits" in lf.hf.report(ours)
    with pytest.raises(ValueError, match="is a FSDPLlamaForCausalLM, expected the class that patch gave it"):
        lf.hf.unpatch(ours)
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}
    assert_close(whole, run(stock), run(exact(stock)))
    theirs = make()
    for layer in theirs.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"FSDPLlamaDecoderLayer, expected LlamaDecoderLayer itself; .*before fully_shard"
    ):
        lf.hf.patch(theirs)


def test_autocast_casts_the_input_of_several_projections_once() -> None:
    ours, kept = patched(make()), {}

    def pack(t: Tensor) -> Tensor:
        if t.dtype == torch.bfloat16 and t.numel() == tokens().numel() * 64:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    for layer in ours.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: None)  # so that the ops run
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours.model(tokens())
    assert len(kept) == 2 * 4  # in each layer: both normalised inputs, the queries, what attention gave


# ---- PEFT ------------------------------------------------------------------------------------------------------------
@needs_peft
@pytest.mark.parametrize("which", ["norms", "attention"])
def test_adapters_in_the_place_of_a_norm_or_the_attention(which: str) -> None:
    import peft

    config = {
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        "attention": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    }[which]
    found = []
    for patch in (True, False):
        torch.manual_seed(5)
        model = peft.get_peft_model(make().double(), config()).double()
        if patch:
            lf.hf.patch(model)
            why = {"norms": "input_layernorm is a peft LNTuningLayer", "attention": "self_attn is a peft Adapted"}[
                which
            ]
            assert f"ops, for {why}" in lf.hf.report(model)
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_prefix_tuning_sends_gradients_through_the_cache(dtype: torch.dtype) -> None:
    """The keys in the cache are all that needs gradients."""
    import peft

    found = []
    stock = make().to(dtype)
    for model in (patched(stock), stock):
        torch.manual_seed(5)
        config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(model, config).to(dtype)
        out = tuned(tokens(), attention_mask=torch.ones_like(tokens()))
        out.logits.square().mean().backward()
        found.append([out.logits, *(p.grad for p in tuned.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) > 1
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


# ---- Trainer ---------------------------------------------------------------------------------------------------------
@needs_accelerate
def test_the_trainer_trains_alike(tmp_path: Any) -> None:
    data = [{"input_ids": row, "labels": row.masked_fill(torch.arange(19) < n, -100)}
            for n, row in enumerate(tokens(batch=12))]  # fmt: skip
    losses = []
    stock = make()
    for model in (patched(stock, fused_loss=True), stock):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4,
            logging_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
