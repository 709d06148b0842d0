"""How the ops meet PyTorch's own machinery: every op of the table alike, the linear layer and the block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fast as lf
from llama_fast.config import rope_cos_sin
from llama_fast.ops.linear import linear
from llama_fast.ops.table import OPS
from llama_fast.verify import CASES

TINY = lf.LlamaConfig.preset("tiny")
BLOCK = lf.nn.TransformerBlock(TINY.dim, TINY.n_heads, TINY.ffn_dim, TINY.n_kv_heads)
CALLS = (*OPS, "linear", "block")


def _call(name: str, device: str = "cpu") -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of float tensors alone, and these, which want gradients."""
    if name == "linear":
        return linear, [torch.randn(s).to(device).requires_grad_() for s in ((5, 16), (24, 16))]
    if name == "block":
        cos, sin = (t.to(device) for t in rope_cos_sin(TINY, 5))
        block = BLOCK if device == "cpu" else lf.nn.TransformerBlock(64, 4, 176, 2, device=device)
        return lambda x: block(x, cos, sin), [torch.randn(2, 5, TINY.dim).to(device).requires_grad_()]
    case = next(c for c in CASES if c.op == name)
    tensors = {k: v.to(device) for k, v in case.inputs(torch.float32).items()}
    fixed = {k: v for k, v in tensors.items() if k in ("cos", "sin", "targets")}
    wanted = [k for k in tensors if k not in fixed]
    leaves = [tensors[k].requires_grad_() for k in wanted]
    return lambda *xs: getattr(lf, name)(**dict(zip(wanted, xs, strict=True)), **fixed), leaves


def _sum(result: Any) -> Tensor:
    return sum((x.sin().sum() for x in (result if isinstance(result, tuple) else (result,))), torch.zeros(()))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_the_ops_and_changes_nothing(name: str) -> None:
    function, leaves = _call(name)
    expected = torch.autograd.grad(_sum(function(*leaves)), leaves)
    with lf.backend("reference" if name in OPS else None), _Seen() as seen:
        found = torch.autograd.grad(_sum(function(*leaves)), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    for op in [name] if name in OPS else []:
        directions = ("fwd",) if op == "linear_cross_entropy" else ("fwd", "bwd")
        assert {f"llama_fast.{op}_{d}.default" for d in directions} <= seen.names


@pytest.mark.parametrize("name", OPS)
def test_a_forced_backend_is_forced_under_a_dispatch_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    launch = lf.ops.dispatch.Primitive.launch

    def watched(self: Any, args: Any, only: str | None, *into: Any) -> Any:
        asked.append(only)
        return launch(self, args, only, *into)

    monkeypatch.setattr(lf.ops.dispatch.Primitive, "launch", watched)
    function, leaves = _call(name)
    with _Seen():
        with lf.backend("reference"):
            total = _sum(function(*leaves))
        total.backward()
    assert set(asked) == {"reference"}


@pytest.mark.parametrize("name", CALLS)
def test_fake_and_meta_tensors_take_shapes_through(name: str) -> None:
    function, leaves = _call(name)
    real = function(*leaves)
    shapes = [x.shape for x in (real if isinstance(real, tuple) else (real,))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in leaves]
        fake = function(*fakes)
        gradients = torch.autograd.grad(_sum(fake), fakes)
    assert [x.shape for x in (fake if isinstance(fake, tuple) else (fake,))] == shapes
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    function, leaves = _call(name, "meta")
    meta = function(*leaves)
    assert [x.shape for x in (meta if isinstance(meta, tuple) else (meta,))] == shapes
    assert all(x.is_meta for x in (meta if isinstance(meta, tuple) else (meta,)))


class _Named(Tensor):
    """A subclass without a dispatch of its own."""


@pytest.mark.parametrize("name", OPS)
def test_a_subclass_of_tensor_gives_the_same(name: str) -> None:
    function, leaves = _call(name)
    named = [x.detach().as_subclass(_Named).requires_grad_() for x in leaves]
    total = _sum(function(*leaves))
    assert torch.equal(_sum(function(*named)).as_subclass(Tensor), total)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", [c for c in CALLS if c != "linear"])
def test_transforms_of_torch_func_are_refused_by_name(name: str) -> None:
    function, leaves = _call(name)
    leaves = [x.detach() for x in leaves]
    for transformed in (
        lambda: torch.func.grad(lambda *xs: _sum(function(*xs)))(*leaves),
        lambda: torch.vmap(function)(*[torch.stack((x, x)) for x in leaves]),
        lambda: torch.func.jvp(function, tuple(leaves), tuple(leaves)),
    ):
        with pytest.raises(lf.NotSupported, match=r"torch\.func's transforms"):
            transformed()


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_gradients_is_refused_by_name(name: str) -> None:
    function, leaves = _call(name)
    total = _sum(function(*leaves))
    with pytest.raises(lf.NotSupported, match="is_grads_batched"):
        torch.autograd.grad(total, leaves, torch.ones(3), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for a first tangent
@pytest.mark.parametrize("name", [c for c in CALLS if c != "linear"])
def test_a_tangent_of_forward_mode_is_not_lost(name: str) -> None:
    """torch itself refuses it, as of any autograd.Function without a jvp: with NotImplementedError."""
    function, leaves = _call(name)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in leaves]
        with pytest.raises(NotImplementedError, match="must implement the jvp function"):
            function(*duals)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("constant", [True, False], ids=["constant gradient", "gradient of a gradient"])
def test_a_second_derivative_is_an_error_and_not_zero(name: str, constant: bool) -> None:
    if name == "rope" and constant:
        return  # linear: its gradient does not depend on q and k
    function, leaves = _call(name)
    result = function(*leaves)
    results = result if isinstance(result, tuple) else (result,)
    total = sum((x.sum() for x in results), torch.zeros(())) if constant else _sum(results)
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    penalty = sum((g.square().sum() for g in gradients), leaves[0].square().sum())  # another way to the leaf
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(penalty, leaves[0])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("forward_too", [False, True])
def test_backward_within_autocast_gives_the_same_bits(name: str, forward_too: bool) -> None:
    function, leaves = _call(name)

    def total() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_too):
            return _sum(function(*leaves))

    outside, again = torch.autograd.grad(total(), leaves), total()
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.autograd.grad(again, leaves)
    assert all(torch.equal(a, b) for a, b in zip(outside, within, strict=True))


@pytest.mark.parametrize("name", [c for c in CALLS if c != "linear"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_ops(name: str, mode: str) -> None:
    function, leaves = _call(name)
    leaves = [x.detach() for x in leaves]

    def traced(a: Tensor, b: Tensor, c: Tensor) -> Any:
        return function(*(a, b, c)[: len(leaves)])

    inputs = (leaves * 3)[:3]
    graph = make_fx(traced, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    ops = {str(node.target) for node in graph.graph.nodes}
    assert f"llama_fast.{'attention' if name == 'block' else name}_fwd.default" in ops
    torch.testing.assert_close(graph(*inputs), traced(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("name", [c for c in CALLS if c != "block"])  # whose parameters the trace would need as inputs
def test_torch_jit_trace_records_the_ops(name: str) -> None:
    """And not empty tensors that a kernel has filled unseen."""
    f, leaves = _call(name)
    inputs = tuple(x.detach() for x in leaves)
    traced = torch.jit.trace(f, inputs, check_trace=False)
    others = [torch.randn_like(x) for x in inputs]
    found, expected = traced(*others), f(*others)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("error:The tensor attribute")  # that the export set
@pytest.mark.parametrize("called", [False, True])
def test_the_model_is_exported_for_any_sizes(called: bool) -> None:
    """Also one that has been called, and so has rotary tables, of the few rows that it needed."""
    model = lf.Llama(TINY)
    if called:
        model(torch.zeros(2, 9, dtype=torch.int64))
    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("t", min=2, max=TINY.max_seq_len)}
    exported = torch.export.export(model, (torch.zeros(2, 9, dtype=torch.int64),), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 9), (3, 33)):
        tokens = torch.randint(TINY.vocab_size, shape)
        assert torch.equal(exported(tokens), model(tokens))


def test_an_exported_program_is_loaded_where_the_ops_are_imported(tmp_path: Path) -> None:
    file, tokens = tmp_path / "tiny.pt2", torch.arange(8)[None]
    model = lf.Llama(TINY)
    torch.export.save(torch.export.export(model, (tokens,)), file)
    torch.save((tokens, model(tokens)), tmp_path / "logits.pt")
    code = (
        "import sys, torch, llama_fast.ops\n"
        "tokens, logits = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(tokens), logits)"
    )
    command = [sys.executable, "-c", code, file, tmp_path / "logits.pt"]  # another build may be here
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OPS)
def test_explain_refuses_too_few_tensors_and_too_many(name: str) -> None:
    case = next(c for c in CASES if c.op == name)
    tensors = list(case.inputs(torch.float32).values())
    assert "cpu: runs" in lf.explain(name, *tensors)
    last = list(OPS[name].public)[len(tensors) - 1]
    with pytest.raises(ValueError, match=f"{name}: {last} is a NoneType, expected a torch.Tensor"):
        lf.explain(name, *tensors[:-1])
    takes = f"tensors: {name} takes {', '.join(OPS[name].public)}"
    with pytest.raises(ValueError, match=f"{takes}, found none"):
        lf.explain(name)
    with pytest.raises(ValueError, match=f"{takes}, found 5"):
        lf.explain(name, *(tensors * 3)[:5])


def test_a_forced_backend_that_cannot_says_who_forced_it() -> None:
    x = torch.randn(2, 8)
    with (
        lf.backend("xformers"),
        pytest.raises(lf.NotSupported, match=r"rms_norm: xformers is asked for \(lf.backend or LLAMA_FAST_BACKEND\)"),
    ):
        lf.rms_norm(x, x[0])
