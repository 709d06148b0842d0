"""Errors of every op and backend against float64, beside eager PyTorch's own error in the same dtype.

The budget of the tests and of `llama-fast verify`: a result passes when its largest error, and its root-mean-square
error, is at most k times that of eager PyTorch plus one unit in the last place of the dtype at the size of the result,
k = 1.0 forward and 1.5 backward. Non-finite values must stand where the float64 result, rounded to the dtype, has them.

Eager PyTorch's largest error over one draw of the inputs is a matter of luck where few numbers decide it: a loss is one
number, and in attention a row's weights err alike, so that with 18 rows 18 roundings decide. A kernel whose error was
0.84 times eager's missed such a budget with 5 of 100 seeds, and which seeds these are differs from processor to
processor with the order of the vendor's sums. So a case with a result over its budget is judged by the means of the
same figures over `DRAWS` draws of the inputs, the first among them: errors beyond the budget by nature stay so, while
luck is averaged out, ours and eager's alike. Values that are not finite by mistake have no second judgement, nor have
errors of hundreds of budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import llama_fast
from llama_fast.ops import dispatch, eager, native, reference
from llama_fast.ops.table import OPS

FORWARD_FACTOR, BACKWARD_FACTOR = 1.0, 1.5
# PyTorch's and xFormers' own kernels are taken as they are: SDPA's float32 kernels differ from each other by this much
VENDORS, VENDOR_FACTOR = ("torch", "xformers"), 2.0
# Of 133 results over their budget among 41,000 (float32 and bfloat16, 48 or 64 seeds a case) the mean of 4 draws left
# 25 over it, of 8 draws 7, of 16 none; over all seeds their error was 0.3 to 0.85 of the budget, or equal to eager's.
DRAWS = 16


@dataclass(frozen=True)
class Case:
    """One call of an op: sizes by letter, options of the public function, and how the inputs are made.

    Args:
        op: name of the op.
        dims: size of each letter; "..." for leading dimensions is a tuple.
        options: keyword arguments of the public function that are not tensors.
        scale: standard deviation of the random inputs.
        strided: make every input a non-contiguous view.
        tensors: inputs given instead of made: name -> function of the dtype.
    """

    op: str
    dims: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    strided: bool = False
    tensors: Mapping[str, Callable[[torch.dtype], Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join(f"{k}{v}" for k, v in self.dims.items())
        extras = [f"{k}={v}" for k, v in self.options.items()]
        extras += [f"scale={self.scale:g}"] * (self.scale != 1.0) + ["strided"] * self.strided + [*self.tensors]
        return " ".join([sizes, *extras])

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The tensors of the public function, by name, in the order of its arguments; float ones rounded to `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, pattern in OPS[self.op].public.items():
            if name in self.tensors:
                made[name] = self.tensors[name](dtype).to(device)
                continue
            shape = self._shape(pattern)
            if shape is None:
                continue
            if name == "targets":
                made[name] = torch.randint(self.dims["V"], shape, generator=generator).to(device)
            elif name in ("cos", "sin"):
                frequency = 10000.0 ** (-torch.arange(shape[-1], dtype=torch.float64) / shape[-1])
                angle = torch.arange(shape[-2]).unsqueeze(1) * frequency
                made[name] = getattr(angle, name)().float().expand(shape).to(device)
            else:
                x = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
                made[name] = x.to(dtype).to(device)
                if self.strided and x.ndim > 1:
                    wide = torch.empty((*shape[:-1], shape[-1] + 3), dtype=dtype, device=device)
                    made[name] = wide[..., : shape[-1]].copy_(made[name])
        return made

    def _shape(self, pattern: str) -> tuple[int, ...] | None:
        for alternative in pattern.split("|"):
            tokens = alternative.split()
            letters = [t.partition("/")[0] for t in tokens]
            if all(letter in self.dims for letter in letters):
                shape: list[int] = []
                for token, letter in zip(tokens, letters, strict=True):
                    value = self.dims[letter]
                    shape += list(value) if token == "..." else [value // int(token.partition("/")[2] or 1)]
                return tuple(shape)
        return None


@dataclass(frozen=True)
class Result:
    """One tensor of one case: largest absolute errors against float64.

    `error`, `eager_error`, `budget` are in the tensor's units, and means over `draws` draws of the inputs; `problem` is
    empty when all is well.
    """

    case: Case
    backend: str
    isa: str
    dtype: torch.dtype
    tensor: str
    error: float
    eager_error: float
    budget: float
    problem: str
    draws: int = 1


@dataclass(frozen=True)
class Errors:
    """Of one tensor: (error, eager's error, budget) of the largest and of the root mean square; what else is wrong."""

    largest: tuple[float, float, float]
    rms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    wrong: str = ""
    draws: int = 1

    @property
    def hopeless(self) -> bool:
        """Whether no other draws need be asked: the mean could pass only if their budgets were `DRAWS` times this."""
        return any(error > DRAWS**2 * budget for error, _, budget in (self.largest, self.rms))

    @property
    def problem(self) -> str:
        """What misses the budget, or is wrong; empty when all is well."""
        for what, (error, _, budget) in (("largest", self.largest), ("root-mean-square", self.rms)):
            if not self.wrong and not error <= budget:
                means = f", means of {self.draws} draws" if self.draws > 1 else ""
                return f"{what} error {error:.3g} exceeds {budget:.3g}{means}"
        return self.wrong


def mean(draws: Sequence[Errors]) -> Errors:
    """The mean of each figure; wrong if one of them is."""

    def each(rows: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
        error, eager_error, budget = (sum(column) / len(draws) for column in zip(*rows, strict=True))
        return error, eager_error, budget

    wrong = next((d.wrong for d in draws if d.wrong), "")
    return Errors(each(d.largest for d in draws), each(d.rms for d in draws), wrong, len(draws))


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(magnitude, info.tiny)))
    return info.eps * 2.0**exponent


def _differentiate(
    function: Callable[..., Any], inputs: Mapping[str, Tensor], options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results and gradients of `function` by name, the inputs cast to `dtype`; each result's gradient is random."""
    leaves = {}
    for name, x in inputs.items():
        fixed = not x.is_floating_point() or name in ("cos", "sin")
        leaves[name] = x if fixed else x.detach().to(dtype).requires_grad_()
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    douts = []
    for out in outputs:
        # the incoming gradient is rounded to bfloat16, so that it is the same in every dtype
        dout = torch.randn(out.shape, generator=generator).to(torch.bfloat16)
        douts.append(dout.to(out.dtype).to(out.device))
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), douts)
    found = {f"out{i}" if len(outputs) > 1 else "out": out.detach() for i, out in enumerate(outputs)}
    found.update({f"d{name}": g for name, g in zip(wanted, gradients, strict=True)})
    return found


def errors(ours: Tensor, theirs: Tensor, truth: Tensor, factor: float, dtype: torch.dtype) -> Errors:
    """The errors of one tensor and of eager PyTorch's, and their budgets."""
    if ours.shape != truth.shape:
        return _wrong(f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    rounded = truth.to(dtype).double()
    finite = torch.isfinite(rounded)
    ours64, theirs64 = ours.double(), theirs.double()
    if not torch.equal(ours64.nan_to_num(0.0, 1.0, -1.0)[~finite], rounded.nan_to_num(0.0, 1.0, -1.0)[~finite]):
        return _wrong("non-finite values differ from the float64 result's")
    mistakes = int((torch.isfinite(ours64) != finite).sum())
    if mistakes:
        return _wrong(f"{mistakes} values are finite or not by mistake")
    delta, eager_delta, size = (ours64 - truth)[finite], (theirs64 - truth)[finite], truth[finite]
    eager_delta = eager_delta[torch.isfinite(eager_delta)]
    if delta.numel() == 0:
        return Errors((0.0, 0.0, 0.0))

    def figures(measure: Callable[[Tensor], float]) -> tuple[float, float, float]:
        eager_error = measure(eager_delta)
        return measure(delta), eager_error, factor * eager_error + ulp(measure(size), dtype)

    return Errors(
        figures(lambda x: x.abs().max().item() if x.numel() else 0.0),
        figures(lambda x: x.square().mean().sqrt().item() if x.numel() else 0.0),
    )


def _wrong(what: str) -> Errors:
    return Errors((math.inf, 0.0, 0.0), wrong=what)


def judge(
    ours: Tensor, theirs: Tensor, truth: Tensor, factor: float, dtype: torch.dtype
) -> tuple[float, float, float, str]:
    """(error, eager's error, budget, problem) of one tensor, by this draw of the inputs alone."""
    found = errors(ours, theirs, truth, factor, dtype)
    return *found.largest, found.problem


@dataclass(frozen=True)
class Expected:
    """What `measure` compares with, for a case, a dtype and a device: inputs, the float64 results, eager PyTorch's."""

    inputs: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]
    theirs: Mapping[str, Tensor]


def expect(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Expected:
    """Runs a case in float64 and in eager PyTorch."""
    inputs = case.inputs(dtype, device, seed)
    truth = _differentiate(getattr(reference, case.op), inputs, case.options, torch.float64)
    # without gaps between the rows: some versions of PyTorch multiply what lies there (docs/ops/linear.md), here NaN
    gapless = {name: x.contiguous() for name, x in inputs.items()}
    theirs = _differentiate(getattr(eager, case.op), gapless, case.options, dtype)
    return Expected(inputs, truth, theirs)


def measure(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    expected: Expected | None = None,
) -> list[Result]:
    """Runs a case on a backend, forward and backward, and judges each result and gradient.

    Where one exceeds its budget, all are judged by their means over `DRAWS` draws: of this seed and those after it.

    Args:
        case: what to run.
        backend: name of the backend, which is forced.
        dtype: of the inputs.
        device: where they are.
        seed: of the random inputs.
        expected: `expect` of the same arguments, where several backends are compared with one.

    Raises:
        NotSupported: the backend refuses the case.
    """
    drawn = [_errors(case, backend, expected or expect(case, dtype, device, seed), dtype)]
    if any(e.problem for e in drawn[0].values()) and not any(e.hopeless for e in drawn[0].values()):
        for other in range(seed + 1, seed + DRAWS):
            drawn.append(_errors(case, backend, expect(case, dtype, device, other), dtype))
    results = []
    for name in drawn[0]:
        found = mean([draw[name] for draw in drawn])
        isa = native.isa() if backend == "cpu" else ""
        results.append(Result(case, backend, isa, dtype, name, *found.largest, found.problem, found.draws))
    return results


def _errors(case: Case, backend: str, expected: Expected, dtype: torch.dtype) -> dict[str, Errors]:
    """Those of each result and gradient by name, of one draw of the inputs."""
    with dispatch.backend(backend):
        ours = _differentiate(getattr(llama_fast, case.op), expected.inputs, case.options, dtype)
    found = {}
    for name, exact in expected.truth.items():
        factor = BACKWARD_FACTOR if name.startswith("d") else FORWARD_FACTOR
        factor *= VENDOR_FACTOR if backend in VENDORS else 1.0
        found[name] = errors(ours[name], expected.theirs[name], exact, factor, ours[name].dtype)
    return found


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within the block the CPU kernels use the instruction set `name`."""
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa("")


def _cases() -> tuple[Case, ...]:
    sizes = {"B": 2, "T": 67, "S": 67, "H": 4, "G": 2, "D": 64}
    return (
        Case("rms_norm", {"...": (3, 37), "C": 512}),
        Case("rms_norm", {"...": (5,), "C": 1003}),
        Case("add_rms_norm", {"...": (3, 37), "C": 512}),
        Case("add_rms_norm", {"...": (5,), "C": 1003}),
        Case("swiglu", {"...": (3, 37), "F": 512}),
        Case("swiglu", {"...": (5,), "F": 1003}, scale=4.0),
        Case("rope", {"B": 2, "T": 33, "H": 4, "G": 2, "D": 64}),
        Case("rope", {"B": 2, "T": 33, "H": 4, "G": 2, "D": 64}, {"interleaved": True}),
        Case("attention", sizes),
        Case("attention", sizes, {"causal": False}),
        Case("attention", {**sizes, "T": 5, "D": 80}),
        Case("attention", sizes, {"window": 16}),
        Case(
            "attention",
            {"R": 67, "N": 4, "H": 4, "G": 2, "D": 64},
            tensors={"cu_seqlens": lambda _: torch.tensor([0, 20, 20, 67], dtype=torch.int32)},
        ),
        Case("linear_cross_entropy", {"...": (3, 37), "C": 64, "V": 1003}),
        Case("linear_cross_entropy", {"...": (65,), "C": 64, "V": 512}, {"label_smoothing": 0.1, "z_loss": 1e-4}),
    )


CASES = _cases()
