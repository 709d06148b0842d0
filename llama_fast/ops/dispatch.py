"""The only place that chooses a backend, and the primitives through which everything else calls one.

Eager calls go straight to the launcher. Where something else must see the call (`torch.compile`, a dispatch mode, a
tensor subclass such as FakeTensor or DTensor) it becomes the registered op `torch.ops.llama_fast.<primitive>`, opaque
to the compiler, with a fake kernel made from the op's row.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llama_fast.ops import flops, proven
from llama_fast.ops.table import MOST_SHAPES, NUMBERS, OPS, Backend, Op

_forced: ContextVar[str | None] = ContextVar("llama_fast_backend", default=os.environ.get("LLAMA_FAST_BACKEND") or None)


class NotSupported(RuntimeError):
    """No backend takes the call; the message lists every objection."""


@functools.cache
def backend_names() -> tuple[str, ...]:
    """Every backend that some op has, in order of preference."""
    return tuple(dict.fromkeys(b.name for op in OPS.values() for b in op.backends))


_PLAIN = NUMBERS | {Tensor, torch.nn.Parameter}


def plain(*args: Any) -> bool:
    """Whether the arguments are scalars and tensors whose memory a kernel may read, and nothing must see the call: no
    dispatch mode, no torch.jit.trace."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None
    return not watched and _PLAIN.issuperset(map(type, args))


def readable(x: Tensor) -> bool:
    """Whether a check may look at the values of `x`: at no cost (on a CPU), outside of tracing and of torch.func."""
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not hidden and x.device.type == "cpu" and plain(x)


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device of the tensor `x`, else None."""
    if not isinstance(x, Tensor) or x.is_meta:  # autocast knows no meta device
        return None
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def no_autocast(dtype: torch.dtype | None, x: Any) -> Any:
    """A context without autocast on the device of `x`, where `autocast_dtype` has given `dtype`."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, ops run on the backend `name` or raise `NotSupported`; None leaves the choice as it was.

    The backward pass of an op runs on the backend that its forward pass was forced to, wherever it is called.

    Raises:
        ValueError: no op has a backend of that name.
    """
    if name is not None and name not in backend_names():
        raise ValueError(f"backend: {name!r} is not one of {', '.join(backend_names())}")
    with _forcing(name):
        yield


@contextmanager
def _forcing(name: str | None) -> Iterator[None]:
    token = _forced.set(name if name is not None else _forced.get())
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that `lf.backend` or LLAMA_FAST_BACKEND asks for, or None."""
    if torch.compiler.is_compiling():
        return None
    return _forced.get()


@functools.cache
def unavailable(module: str) -> str | None:
    """Why the backend module cannot be used on this machine, or None."""
    try:
        return importlib.import_module(module).unavailable()
    except ModuleNotFoundError as error:
        if error.name in ("triton", "xformers"):
            return f"{error.name} is not installed"
        raise


def objection(b: Backend, dims: dict[str, Any], dtype: torch.dtype, device: str) -> str | None:
    """Why backend `b` cannot take a call of these sizes and options, or None."""
    if b.device is not None and device != b.device:
        return f"runs on {b.device}, the tensors are on {device}"
    if dtype not in b.dtypes:
        return f"dtype {dtype} not in {', '.join(sorted(str(d) for d in b.dtypes))}"
    reason = unavailable(b.module)
    if reason is not None:
        return reason
    text = next((text for limit in b.limits if (text := limit(dims)) is not None), None)
    asks: Callable[..., str | None] | None = getattr(importlib.import_module(b.module), "objection", None)
    return text if text is not None or asks is None else asks(dims, dtype, device)


def _unproven(b: Backend, primitive: str, dims: dict[str, Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why backend `b`, which can take a call, is not chosen unless it is asked for, or None."""
    if not b.needs_proof:
        return None
    untimed = next((text for limit in b.timed if (text := limit(dims)) is not None), None)
    if untimed is None and unavailable(b.module) is None:
        asks: Callable[..., str | None] | None = getattr(importlib.import_module(b.module), "untimed", None)
        untimed = None if asks is None else asks(device)
    return proven.objection(b.name, primitive, dtype, device, untimed)


def _choose(
    primitive: Primitive, dims: dict[str, int], dtype: torch.dtype, device: torch.device, only: str | None
) -> Backend:
    op, objections = primitive.op, []
    for b in op.backends:
        if only is not None and b.name != only:
            continue
        text = objection(b, dims, dtype, device.type)
        if text is None and only is None:
            text = _unproven(b, primitive.name, dims, dtype, device)
        if text is None:
            return b
        objections.append(f"  {b.name}: {text}")
    if not objections:
        objections.append(f"  {only}: no such backend, {op.name} has {', '.join(b.name for b in op.backends)}")
    why = "no backend takes this call"
    if only is not None:
        why = f"{only} is asked for (lf.backend or LLAMA_FAST_BACKEND) and does not take this call"
    raise NotSupported(f"{op.name}: {why}\n" + "\n".join(objections))


def explain(name: str, *tensors: Tensor, **options: Any) -> str:
    """Says which backend runs the op `name` on these tensors, forward and backward, and what each other one objects.

    Args:
        name: a public op, for example "attention"; or "linear", for the matrix products of a layer x W^T, its forward
            and its two gradients, and the vendor's path that each takes.
        tensors: the op's tensors, in the order of its public function; of "linear", x [..., C] and W [V, C].
        options: of the op, where a backend's answer depends on them, for example window=4096.

    Raises:
        ValueError: unknown name, or tensors that the op would refuse.
    """
    if name == "linear":
        return _explain_linear(*tensors)
    if name not in OPS:
        raise ValueError(f"name: {name!r} is not one of {', '.join(OPS)}, linear")
    op = OPS[name]
    if not 0 < len(tensors) <= len(op.public):
        raise ValueError(f"tensors: {name} takes {', '.join(op.public)}, found {len(tensors) or 'none'}")
    dims = op.check(**dict(zip_longest(op.public, tensors))) | options
    dtype, device = tensors[0].dtype, tensors[0].device
    only, lines = forced(), []
    chosen = {"forward": False, "backward": False}
    for b in op.backends:
        texts = {}
        for direction, primitive in (("forward", f"{name}_fwd"), ("backward", f"{name}_bwd")):
            text = objection(b, dims, dtype, device.type)
            if text is None and only is not None and b.name != only:
                text = f"{only} is asked for"
            if text is None and only is None:
                text = _unproven(b, primitive, dims, dtype, device)
            if text is None:
                text = "could run, stands later in the order" if chosen[direction] else "runs"
                chosen[direction] = True
            texts[direction] = text
        same = texts["forward"] == texts["backward"]
        lines.append(f"{b.name}: " + (texts["forward"] if same else "; ".join(f"{d} {t}" for d, t in texts.items())))
    return f"{name} {str(dtype).removeprefix('torch.')} on {device.type}\n" + "\n".join(f"  {line}" for line in lines)


def _explain_linear(*tensors: Tensor) -> str:
    from llama_fast.ops import linear

    if len(tensors) != 2 or tensors[0].ndim < 1 or tensors[1].ndim != 2 or tensors[0].shape[-1] != tensors[1].shape[1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"tensors: linear takes x [..., C] and W [V, C], found {shapes or 'none'}")
    x, weight = tensors
    head = f"linear {str(x.dtype).removeprefix('torch.')} on {x.device.type}\n  "
    if x.device.type != "cpu":
        return f"{head}torch: the vendor's products of {x.device.type}"
    V, C = weight.shape
    R = x.shape[:-1].numel()
    sizes = {"nt": (R, V, C), "nn": (R, C, V), "tn": (V, C, R)}
    return head + "\n  ".join(linear.explain(form, x.dtype, *mnk) for form, mnk in sizes.items())


class Primitive:
    """A pure function of the table, `<op>_fwd` or `<op>_bwd`: no autograd, no checks. Gives a tuple of its results."""

    def __init__(self, op: Op, direction: str) -> None:
        self.op, self.direction, self.name = op, direction, f"{op.name}_{direction}"
        schema = op.schema(direction)
        self._single = len(schema.results) == 1
        self._tensors = [i for i, arg in enumerate(schema.args) if arg.type.startswith("Tensor")]
        self._switches = [i for i, arg in enumerate(schema.args) if arg.type in ("bool", "int")]
        self._leader = next(i for i in self._tensors if op.base(schema.args[i].name) not in op.dtypes)
        self._chosen: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any, backend: str | None = None, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """`into`: contiguous tensors, arguments too, that the results may take the place of, where a backend can do so
        (its module's INPLACE has the name): who calls reads the results only, wherever they are."""
        if torch.compiler.is_compiling():
            return self._registered(args)
        if not plain(*args):
            with _forcing(backend):
                return self._registered(args)
        return self.launch(args, backend or forced(), into)

    def _registered(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        target = getattr(torch.ops.llama_fast, self.name)
        if not torch.compiler.is_compiling():
            flops.tell_counters(self.op, self.direction, target)
        results = target(*args)
        return (results,) if self._single else results

    def launch(self, args: tuple[Any, ...], only: str | None, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        leader = args[self._leader]
        shapes = [None if args[i] is None else args[i].shape for i in self._tensors]
        key = (only, leader.dtype, leader.device, *[args[i] for i in self._switches], *shapes)
        module = self._chosen.get(key)
        if module is None:
            if len(self._chosen) >= MOST_SHAPES:
                self._chosen.clear()
            dims = self.op.bind(self.direction, args)
            module = importlib.import_module(_choose(self, dims, leader.dtype, leader.device, only).module)
            self._chosen[key] = module
        if into and self.name in getattr(module, "INPLACE", ()) and all([t.is_contiguous() for t in into]):
            return getattr(module, self.name)(*args, into=into)
        return getattr(module, self.name)(*args)

    def register(self, library: torch.library.Library) -> None:
        """Makes the primitive known to torch as `llama_fast::<name>`."""
        library.define(self.name + self.op.schema(self.direction).text)

        def unwrap(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return results[0] if self._single else results

        library.impl(self.name, lambda *args: unwrap(self.launch(args, forced())), "CompositeExplicitAutograd")
        fake: Callable[..., Any] = lambda *args: unwrap(self.op.empty_results(self.direction, args))  # noqa: E731
        torch.library.register_fake(f"llama_fast::{self.name}", fake, lib=library)


_library = torch.library.Library("llama_fast", "DEF")
primitives: dict[str, Primitive] = {}
for _op in OPS.values():
    for _direction in ("fwd", "bwd"):
        _primitive = Primitive(_op, _direction)
        _primitive.register(_library)
        primitives[_primitive.name] = _primitive


# ---- autograd --------------------------------------------------------------------------------------------------------
class _Unpacked:
    """A context whose saved tensors are asked for once: torch.utils.checkpoint gives them no second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an autograd.Function: to differentiate it again is an error.

    torch's decorator of this name lets the second derivative pass as zero where the incoming gradient is a constant.
    It runs without autocast, wherever it is called: in the dtypes of the forward. Raises NotSupported for a batch of
    gradients.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        name, saved = type(ctx).__name__.removesuffix("Backward").lstrip("_"), ()
        if torch.is_grad_enabled():
            ctx = _Unpacked(ctx)
            saved = ctx.saved_tensors  # before it may be released
        first = next((g for g in gradients if g is not None), None)
        if first is not None and torch._C._functorch.is_legacy_batchedtensor(first):
            raise NotSupported(
                "llama_fast's ops take one gradient at a time: expected torch.autograd.grad without is_grads_batched "
                "(jacobian and hessian without vectorize), or plain PyTorch (llama_fast.ops.reference)"
            )
        with torch.no_grad(), no_autocast(autocast_dtype(first), first):
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        causes = [x for x in (*gradients, *saved) if isinstance(x, Tensor) and x.requires_grad]
        return _Once.apply(name, len(results), *results, *causes) if causes else results

    return wrapper


def release(ctx: Any) -> bool:
    """Gives up what `ctx` has saved, unless the graph is retained, so that its memory is free as soon as the caller of
    `ctx.saved_tensors` is done with it. Whether it did: the caller alone has these tensors then."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    ctx.maybe_clear_saved_tensors()
    return True


class _Once(torch.autograd.Function):
    """The first `n` of the tensors; to autograd they depend on all of them."""

    @staticmethod
    def forward(ctx: Any, name: str, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if x is None else x.detach() for x in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} is differentiable once: llama_fast has no derivative of its backward pass")


def recorded(*args: Any) -> bool:
    """Whether autograd takes part in a call with these arguments, in backward or (which no op has) in forward mode."""
    wanted = torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args])
    return wanted or forward_ad._current_level >= 0


def refuse_transforms() -> None:
    """Raises NotSupported within a transform of torch.func: a kernel cannot read the tensors that it makes."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise NotSupported(
            "llama_fast's ops do not take part in torch.func's transforms (grad, vmap, jvp and their kin): expected "
            "torch.autograd, or plain PyTorch (llama_fast.ops.reference)"
        )


class _Forgetful:
    """The context of a forward pass that has no backward."""

    def save_for_backward(self, *_: Any) -> None:
        pass


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`; where no argument wants a gradient its forward alone, for half the host time.

    Raises:
        NotSupported: within a transform of torch.func.
    """
    refuse_transforms()
    if recorded(*args) or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_Forgetful(), *args)
