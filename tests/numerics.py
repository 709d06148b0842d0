"""What the tests of the ops share: the matrix of backends and instruction sets, the error budget as an assertion."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.ops import dispatch, native
from llama_fast.ops.dispatch import Primitive
from llama_fast.verify import Case, Result, instruction_set, measure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# "cpu/avx2" is the cpu backend forced to that instruction set; the tests run each that this processor has.
TARGETS = (*(f"cpu/{isa}" for isa in native.isas()), "reference")


class EveryResult(TorchDispatchMode, ABC):
    """A mode whose `saw` is given the results of every operation, those within an op of ours included."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "llama_fast":
            with self:
                results = dispatch.primitives[op._opname].launch(args, dispatch.forced())
            return results if len(op._schema.returns) > 1 else results[0]
        results = op(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, Tensor):
                self.saw(x)
        return results

    @abstractmethod
    def saw(self, x: Tensor) -> None:
        """Called with each."""


class LiveBytes(EveryResult):
    """Bytes of the tensors made within the block that are alive, and the most there were at one time.

    Views of tensors that are `given` do not count.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = {x.untyped_storage()._cdata for x in given}

    def saw(self, x: Tensor) -> None:
        if x.untyped_storage()._cdata not in self.known and not x._is_view():
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            self.known.add(key)
            self.live += size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
            weakref.finalize(x, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@contextmanager
def target(name: str) -> Iterator[str]:
    """Forces a target of TARGETS within the block; gives the backend's name."""
    backend, _, isa = name.partition("/")
    with dispatch.backend(backend), instruction_set(isa) if backend == "cpu" else nullcontext():
        yield backend


def over_budget(case: Case, target_name: str, dtype: torch.dtype, seed: int = 0) -> list[Result]:
    """The results of a case that miss their budget."""
    with target(target_name) as backend:
        return [r for r in measure(case, backend, dtype, seed=seed) if r.problem]


def assert_within_budget(case: Case, target_name: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Forward and backward of a case are within the error budget of llama_fast/verify.py."""
    problems = over_budget(case, target_name, dtype, seed)
    assert not problems, "\n".join(f"{case} {target_name} {dtype} {r.tensor}: {r.problem}" for r in problems)


def assert_bug_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    primitive: str,
    bug: Callable[[tuple[Tensor, ...], Mapping[str, Any]], None],
    dtype: torch.dtype = torch.float32,
    target_name: str = TARGETS[0],
) -> None:
    """Plants a bug in a primitive of a target and sees the budget fail.

    `bug(results, args)` changes the results in place; `args` are the primitive's arguments by name.
    """
    assert_within_budget(case, target_name, dtype)
    launch = Primitive.launch

    def with_bug(self: Primitive, args: tuple[Any, ...], only: str | None, *into: Any) -> tuple[Tensor, ...]:
        results = launch(self, args, only, *into)
        if self.name == primitive:
            names = [arg.name for arg in self.op.schema(self.direction).args]
            bug(results, dict(zip(names, args, strict=True)))
        return results

    monkeypatch.setattr(Primitive, "launch", with_bug)
    assert over_budget(case, target_name, dtype), f"{case}: the bug planted in {primitive} went unseen"


def kept_bytes(run: Callable[[], Any], *aside: Tensor) -> int:
    """Bytes that autograd holds between forward and backward of `run`, by storage; those of `aside` do not count."""
    apart, kept = {t.untyped_storage().data_ptr() for t in aside}, {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = run()  # while it lives, no storage takes another's place
    del held
    return sum(kept.values())


def assert_results_may_replace_arguments(
    primitive: str, shape: tuple[int, ...], replaced: tuple[int, ...], target_name: str, dtype: torch.dtype
) -> None:
    """A primitive of tensors of one `shape` writes the same bits in place of those arguments."""
    args = [torch.randn(shape).to(dtype) for _ in dispatch.primitives[primitive].op.schema(primitive[-3:]).args]
    with target(target_name) as backend:
        expected = dispatch.primitives[primitive](*args, backend=backend)
        into = tuple(args[i] for i in replaced)
        found = dispatch.primitives[primitive](*args, backend=backend, into=into)
    assert all(a is b for a, b in zip(found, into, strict=True)), "the results are elsewhere"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{target_name} {dtype} {shape}"


def vary_(model: torch.nn.Module) -> None:
    """Gains and biases that differ from one another, so that one that is lost or exchanged shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.ndim == 1:
                p.add_((0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype))
