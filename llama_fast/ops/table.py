"""The op table: everything that is declared about an op, once.

A row gives the schemas of an op's two pure primitives, the shape of each tensor in the notation letters, its backends
in order of preference with the limits of each, and its cost. Input checks, allocation, fake kernels, registration,
dispatch, the test matrix and the rooflines of the benchmarks are read from here. This module imports no backend.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Dims = Mapping[str, int]
Limit = Callable[[Dims], "str | None"]

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FLOATS = frozenset({F64, F32, BF16, F16})

NUMBERS = frozenset({float, int, bool, type(None)})  # what a primitive takes besides tensors
_REMEMBERED = frozenset({Tensor, torch.nn.Parameter, type(None)})  # a FakeTensor's sizes may be symbols
MOST_SHAPES = 4096  # argument shapes that a primitive remembers; generation makes a new one with every token


# ---- limits: the sentence that a user reads stands beside the rule --------------------------------------------------
def divides(small: str, large: str) -> Limit:
    def limit(dims: Dims) -> str | None:
        ok = dims[small] > 0 and dims[large] % dims[small] == 0
        return None if ok else f"{small} = {dims[small]} does not divide {large} = {dims[large]}"

    return limit


def multiple_of(letter: str, step: int) -> Limit:
    return lambda dims: None if dims[letter] % step == 0 else f"{letter} = {dims[letter]} is not a multiple of {step}"


def one_of(letter: str, *sizes: int) -> Limit:
    allowed = ", ".join(map(str, sizes))
    return lambda dims: None if dims[letter] in sizes else f"{letter} = {dims[letter]} not in {allowed}"


def between(letter: str, low: int, high: int) -> Limit:
    return lambda dims: None if low <= dims[letter] <= high else f"{letter} = {dims[letter]} not in {low}..{high}"


def equal_or_one(letter: str, other: str) -> Limit:
    def limit(dims: Dims) -> str | None:
        ok = dims[letter] in (1, dims[other])
        return None if ok else f"{letter} = {dims[letter]} is neither 1 nor {other} = {dims[other]}"

    return limit


# ---- rows -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: what `lf.backend(name)` takes.
        module: where the launchers `<op>_fwd` and `<op>_bwd` stand; imported when first used. If it has an `objection`
            (dims, dtype, device type), that is asked after the limits: xFormers knows itself what it takes.
        device: torch device type, or None for any.
        dtypes: those that it computes in.
        limits: each gives None or the sentence that says why a call cannot be taken. Besides the sizes it sees the
            primitive's bool and int arguments by name.
        needs_proof: chosen without being asked for only where llama_fast/ops/proven.json lists it.
        timed: as limits, for a backend that needs proof: the sizes that the timings behind that file speak for. A
            module's `untimed` (device), if it has one, is asked after them.
    """

    name: str
    module: str
    device: str | None
    dtypes: frozenset[torch.dtype]
    limits: tuple[Limit, ...] = ()
    needs_proof: bool = False
    timed: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Arg:
    """An argument or a result of a schema."""

    name: str
    type: str  # "Tensor", "Tensor?", "float", "int", "bool"


_SCHEMA = re.compile(r"^\((?P<args>.*)\) -> \((?P<results>.*)\)$")


@dataclass(frozen=True)
class Schema:
    """A primitive's signature in torch.library's language, every result named."""

    text: str
    args: tuple[Arg, ...]
    results: tuple[Arg, ...]

    @staticmethod
    def parse(text: str) -> Schema:
        match = _SCHEMA.match(text)
        if match is None:
            raise ValueError(f"schema: {text!r} is not of the form '(type name, ...) -> (Tensor name, ...)'")

        def split(part: str) -> tuple[Arg, ...]:
            return tuple(Arg(name=a.split()[1], type=a.split()[0]) for a in part.split(", ") if a)

        return Schema(text, split(match["args"]), split(match["results"]))


@dataclass(frozen=True)
class Op:
    """A row of the table.

    Args:
        name: the public function's name, and the stem of every file about it.
        fwd, bwd: schemas of the primitives.
        shapes: letters of each tensor of the primitives; a gradient `dx` has those of `x` where it is not named itself.
            A size is a letter or a letter with "/2".
        public: letters of each tensor of the public function; "|" between alternatives, told apart by their length;
            a leading "..." stands for any dimensions.
        dtypes: of the tensors that do not have the dtype of the first one.
        rules: what every backend needs of the sizes.
        backends: in order of preference; the first without an objection runs.
        traffic: sizes, bytes an element -> bytes that forward and backward must move.
        flops: sizes, options -> floating-point operations of forward and backward; None for a memory-bound op.
        fake: direction -> function of the primitive's arguments that gives empty results, where shapes cannot say it.
    """

    name: str
    fwd: Schema
    bwd: Schema
    shapes: dict[str, str]
    public: dict[str, str]
    backends: tuple[Backend, ...]
    traffic: Callable[[Dims, int], tuple[int, int]]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    rules: tuple[Limit, ...] = ()
    flops: Callable[[Dims, Mapping[str, Any]], tuple[int, int]] | None = None
    fake: dict[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    _known: dict[tuple[Any, ...], list[tuple[list[int], torch.dtype]]] = field(default_factory=dict, init=False)
    _checked: dict[tuple[Any, ...], dict[str, int]] = field(default_factory=dict, init=False)  # what check has passed

    def schema(self, direction: str) -> Schema:
        return self.fwd if direction == "fwd" else self.bwd

    def base(self, name: str) -> str:
        """The tensor whose shape and dtype `name` has: `x` for the gradient `dx`."""
        return name if name in self.shapes else name[1:]

    def bind(self, direction: str, args: Sequence[Any]) -> dict[str, int]:
        """The size of each letter, and the value of each bool and int, read from a primitive's arguments."""
        dims: dict[str, int] = {}
        for arg, value in zip(self.schema(direction).args, args, strict=True):
            if arg.type.startswith("Tensor") and value is not None:
                for token, size in zip(self.shapes[self.base(arg.name)].split(), value.shape, strict=True):
                    if "/" not in token:
                        dims.setdefault(token, size)
            elif arg.type in ("bool", "int"):
                dims[arg.name] = value
        return dims

    def empty_results(self, direction: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Uninitialised results of a primitive, contiguous, on the device of its first argument."""
        if direction in self.fake:
            return self.fake[direction](*args)
        device = args[0].device
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._specs(direction, args))

    def allocate(self, direction: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """`empty_results` of a launcher: remembers what followed from the shapes of the arguments."""
        if direction in self.fake:
            return self.fake[direction](*args)
        key = (direction, args[0].dtype, *[a.shape for a in args if type(a) not in NUMBERS])
        specs = self._known.get(key)
        if specs is None:
            if len(self._known) >= MOST_SHAPES:
                self._known.clear()
            specs = self._known[key] = self._specs(direction, args)
        like = args[0]  # new_empty of single sizes is twice as fast as torch.empty of a list
        return tuple([like.new_empty(*shape, dtype=dtype) for shape, dtype in specs])

    def _specs(self, direction: str, args: Sequence[Any]) -> list[tuple[list[int], torch.dtype]]:
        dims, like = self.bind(direction, args), args[0].dtype
        specs = []
        for result in self.schema(direction).results:
            base = self.base(result.name)
            dtype = self.dtypes.get(base, like)
            if dtype == F32 and like == F64:
                dtype = F64  # statistics are float32, but for the reference's float64
            specs.append(([_size(token, dims) for token in self.shapes[base].split()], dtype))
        return specs

    def check(self, **tensors: Tensor | None) -> dict[str, int]:
        """Checks the public function's tensors against each other and gives the size of each letter.

        Raises:
            ValueError: a tensor's type, dtype, device or shape is not what the row says; names the argument, what was
                found and what was expected.
        """
        if torch.compiler.is_compiling() or not _REMEMBERED.issuperset(map(type, tensors.values())):
            return self._check(tensors)
        key = tuple([(name, None if x is None else (x.dtype, x.device, x.shape)) for name, x in tensors.items()])
        dims = self._checked.get(key)
        if dims is None:
            if len(self._checked) >= MOST_SHAPES:
                self._checked.clear()
            dims = self._checked[key] = self._check(tensors)
        return dict(dims)

    def _check(self, tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
        dims: dict[str, int] = {}
        first: tuple[str, Tensor] | None = None
        for name, tensor in tensors.items():
            if tensor is None and Arg(name, "Tensor?") in self.fwd.args:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{self.name}: {name} is a {type(tensor).__name__}, expected a torch.Tensor")
            fixed = self.dtypes.get(name)
            if fixed is not None:
                if tensor.dtype != fixed:
                    raise ValueError(f"{self.name}: {name} has dtype {tensor.dtype}, expected {fixed}")
            elif tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{self.name}: {name} has dtype {tensor.dtype}, expected float32, bfloat16, float16 or float64"
                )
            elif first is not None and tensor.dtype != first[1].dtype:
                raise ValueError(
                    f"{self.name}: {name} has dtype {tensor.dtype}, expected {first[1].dtype} as {first[0]}"
                )
            if first is None:
                first = (name, tensor)
            elif tensor.device != first[1].device:
                raise ValueError(f"{self.name}: {name} is on {tensor.device}, expected {first[1].device} as {first[0]}")
            self._match(name, tensor, dims)
        for rule in self.rules:
            objection = rule(dims)
            if objection is not None:
                raise ValueError(f"{self.name}: {objection}")
        return dims

    def _match(self, name: str, tensor: Tensor, dims: dict[str, int]) -> None:
        found = f"{self.name}: {name} has shape {tuple(tensor.shape)}"
        alternatives = [a.split() for a in self.public[name].split("|")]
        for alternative in alternatives:
            tokens, shape = alternative, tuple(tensor.shape)
            if tokens[0] == "...":
                tokens = tokens[1:]
                split = len(shape) - len(tokens)
                if split < 0:
                    continue
                lead, shape = shape[:split], shape[split:]
                if dims.setdefault("...", lead) != lead:  # type: ignore[arg-type]
                    raise ValueError(f"{found}, expected leading dimensions {dims['...']}")
            if len(shape) != len(tokens):
                continue
            for token, size in zip(tokens, shape, strict=True):
                expected = _size(token, dims) if token[0] in dims else dims.setdefault(token, size)
                if size != expected:
                    raise ValueError(f"{found}, expected [{', '.join(alternative)}] with {token} = {expected}")
            return
        raise ValueError(f"{found}, expected " + " or ".join(f"[{', '.join(a)}]" for a in alternatives))


def _size(token: str, dims: Dims) -> int:
    letter, _, divisor = token.partition("/")
    return dims[letter] // int(divisor) if divisor else dims[letter]


# ---- options --------------------------------------------------------------------------------------------------------
def check_number(
    op: str, name: str, value: Any, expected: str, low: float, high: float = math.inf, whole: bool = False
) -> None:
    """Checks an option of the public function `op`; `whole`: an integer.

    Raises:
        ValueError: it is no number, NaN, or not in low .. high; says what was `expected`.
    """
    try:
        ok = low <= value <= high and (not whole or (_integer(value) and not isinstance(value, bool)))
    except TypeError:
        ok = False
    if not ok:
        raise ValueError(f"{op}: {name} is {value!r}, expected {expected}")


def _integer(value: Any) -> bool:
    # first isinstance: torch.compile knows no hasattr of a number that it holds for variable
    return isinstance(value, int) or hasattr(value, "__index__")


WIDEST = 1 << 30  # of a window: beyond any sequence, and a position may be added to it in 32 bits


def check_flag(op: str, name: str, value: Any) -> None:
    """Raises ValueError unless the option `name` of the public function `op` is True or False."""
    if value not in (True, False):
        raise ValueError(f"{op}: {name} is {value!r}, expected True or False")


# ---- the table ------------------------------------------------------------------------------------------------------
_SINGLE, _HALF = frozenset({F32, BF16, F16}), frozenset({BF16, F16})
_REFERENCE = Backend("reference", "llama_fast.ops.reference", None, FLOATS)
# Triton's interpreter runs the kernels on a CPU's tensors, for tests: TRITON_INTERPRET=1 before the first import.
_TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Likewise the emulator runs the CUDA kernels (docs/emulator.md).
_CUDA_DEVICE = "cpu" if os.environ.get("LLAMA_FAST_EMULATE") == "1" else "cuda"


def _cuda(*limits: Limit, dtypes: frozenset[torch.dtype] = _SINGLE, timed: tuple[Limit, ...] = ()) -> Backend:
    return Backend("cuda", "llama_fast.ops.cuda", _CUDA_DEVICE, dtypes, limits, True, timed)


def _triton(stem: str, *limits: Limit, timed: tuple[Limit, ...] = ()) -> Backend:
    return Backend("triton", f"llama_fast.kernels.{stem}", _TRITON_DEVICE, _SINGLE, limits, True, timed)


def _cpu(*limits: Limit) -> Backend:
    return Backend("cpu", "llama_fast.ops.native", "cpu", _SINGLE, limits)


def _xformers(*limits: Limit) -> Backend:
    return Backend("xformers", "llama_fast.ops.vendor_xformers", "cuda", frozenset({BF16, F16}), limits)


def _torch(*limits: Limit, device: str | None = None) -> Backend:
    return Backend("torch", "llama_fast.ops.vendor", device, _SINGLE, limits)


RMS_NORM = Op(
    name="rms_norm",
    fwd=Schema.parse("(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"),
    bwd=Schema.parse("(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)"),
    shapes={"x": "R C", "weight": "C", "y": "R C", "rstd": "R"},
    public={"x": "... C", "weight": "C"},
    dtypes={"rstd": F32},
    backends=(_cuda(), _triton("rms_norm"), _cpu(), _torch(device="cuda"), _REFERENCE),
    traffic=lambda d, item: (2 * d["R"] * d["C"] * item, 3 * d["R"] * d["C"] * item),
)

ADD_RMS_NORM = Op(
    name="add_rms_norm",
    fwd=Schema.parse("(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)"),
    bwd=Schema.parse("(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)"),
    shapes={"x": "R C", "residual": "R C", "weight": "C", "y": "R C", "sum": "R C", "rstd": "R"},
    public={"x": "... C", "residual": "... C", "weight": "C"},
    dtypes={"rstd": F32},
    backends=(_cuda(), _triton("rms_norm"), _cpu(), _REFERENCE),
    traffic=lambda d, item: (4 * d["R"] * d["C"] * item, 4 * d["R"] * d["C"] * item),
)

SWIGLU = Op(
    name="swiglu",
    fwd=Schema.parse("(Tensor gate, Tensor up) -> (Tensor y)"),
    bwd=Schema.parse("(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)"),
    shapes={"gate": "R F", "up": "R F", "y": "R F"},
    public={"gate": "... F", "up": "... F"},
    backends=(_cuda(), _triton("swiglu"), _cpu(), _REFERENCE),
    traffic=lambda d, item: (3 * d["R"] * d["F"] * item, 5 * d["R"] * d["F"] * item),
)

ROPE = Op(
    name="rope",
    fwd=Schema.parse("(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor q_out, Tensor k_out)"),
    bwd=Schema.parse(
        "(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, bool interleaved) -> (Tensor dq, Tensor dk)"
    ),
    shapes={
        "q": "B T H D",
        "k": "B T G D",
        "q_out": "B T H D",
        "k_out": "B T G D",
        "cos": "N T D/2",
        "sin": "N T D/2",
    },
    public={"q": "B T H D", "k": "B T G D", "cos": "T D/2 | N T D/2", "sin": "T D/2 | N T D/2"},
    dtypes={"cos": F32, "sin": F32},
    rules=(multiple_of("D", 2), lambda d: equal_or_one("N", "B")(d) if "N" in d else None),
    backends=(_cuda(), _triton("rope"), _cpu(), _REFERENCE),
    traffic=lambda d, item: (2 * d["B"] * d["T"] * (d["H"] + d["G"]) * d["D"] * item,) * 2,
)


def _xformers_masks(d: Dims) -> str | None:
    if d.get("window") or "N" in d:
        return "neither windows nor packed sequences are handed on"
    return None if 0 < d["T"] <= d["S"] else f"T = {d['T']} not in 1..S = {d['S']}"


def _many_queries(d: Dims) -> str | None:
    T = d.get("T", d.get("R", 0))  # R: packed sequences, as the public function has them
    return None if T >= 128 else f"T = {T} is less than 128"


_ATTENTION_TIMED = (one_of("D", 64, 128), _many_queries)  # not a decode step, which has too few tiles for a GPU


def _attention_flops(d: Dims, options: Mapping[str, Any]) -> tuple[int, int]:
    T, S, window = d["T"], d["S"], options.get("window") or 0
    pairs = T * S
    if options.get("causal", True) or window:
        seen = (min(S, max(0, i + S - T + 1)) for i in range(T))
        pairs = sum(min(n, window) if window else n for n in seen)
    return 4 * d["B"] * d["H"] * d["D"] * pairs, 10 * d["B"] * d["H"] * d["D"] * pairs


ATTENTION = Op(
    name="attention",
    fwd=Schema.parse(
        "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool causal, int window)"
        " -> (Tensor out, Tensor lse)"
    ),
    bwd=Schema.parse(
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, float scale,"
        " bool causal, int window) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    shapes={
        "q": "B T H D",
        "k": "B S G D",
        "v": "B S G D",
        "out": "B T H D",
        "lse": "B H T",
        "cu_seqlens": "N",
    },
    public={
        "q": "B T H D | R H D",
        "k": "B S G D | R G D",
        "v": "B S G D | R G D",
        "cu_seqlens": "N",
    },
    dtypes={"lse": F32, "cu_seqlens": torch.int32},
    rules=(divides("G", "H"),),
    backends=(
        _cuda(one_of("D", 64, 96, 128, 256), dtypes=_HALF, timed=_ATTENTION_TIMED),
        _triton("attention", multiple_of("D", 8), between("D", 16, 256), timed=_ATTENTION_TIMED),
        _cpu(multiple_of("D", 8), between("D", 16, 256)),
        _xformers(multiple_of("D", 8), between("D", 16, 256), _xformers_masks),
        _torch(multiple_of("D", 8), between("D", 8, 256)),
        _REFERENCE,
    ),
    traffic=lambda d, item: (
        (2 * d["B"] * d["T"] * d["H"] + 2 * d["B"] * d["S"] * d["G"]) * d["D"] * item,
        (4 * d["B"] * d["T"] * d["H"] + 4 * d["B"] * d["S"] * d["G"]) * d["D"] * item,
    ),
    flops=_attention_flops,
)


def _linear_cross_entropy_gradients(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    wanted = zip((hidden, weight), options[-2:], strict=True)
    return tuple([x.new_empty(x.shape if wants else 0) for x, wants in wanted])


def _linear_cross_entropy_results(hidden: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, ...]:
    rows = hidden.new_empty(hidden.shape[0], dtype=F64 if hidden.dtype == F64 else F32)
    return rows, torch.empty_like(rows), *_linear_cross_entropy_gradients(hidden, weight, *options)


LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    # dhidden, dweight are the gradients of sum_r row_scale[r] loss[r]; one that is not wanted has no elements
    fwd=Schema.parse(
        "(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_scale, int ignore_index, float label_smoothing,"
        " float z_loss, bool wants_dhidden, bool wants_dweight)"
        " -> (Tensor loss, Tensor lse, Tensor dhidden, Tensor dweight)"
    ),
    # for any dloss [R]: computes the logits again
    bwd=Schema.parse(
        "(Tensor dloss, Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float label_smoothing,"
        " float z_loss, bool wants_dhidden, bool wants_dweight) -> (Tensor dhidden, Tensor dweight)"
    ),
    shapes={"hidden": "R C", "weight": "V C", "targets": "R", "row_scale": "R", "loss": "R", "lse": "R"},
    public={"hidden": "... C", "weight": "V C", "targets": "..."},
    dtypes={"targets": torch.int64, "row_scale": F32, "loss": F32, "lse": F32},
    backends=(_cuda(), _triton("linear_cross_entropy"), _cpu(), _REFERENCE),
    traffic=lambda d, item: (
        (2 * d["R"] * d["C"] + 2 * d["V"] * d["C"]) * item,
        (2 * d["R"] * d["C"] + 2 * d["V"] * d["C"]) * item,
    ),
    flops=lambda d, _: (2 * d["R"] * d["C"] * d["V"], 4 * d["R"] * d["C"] * d["V"]),
    fake={
        "fwd": _linear_cross_entropy_results,
        "bwd": lambda _dloss, *args: _linear_cross_entropy_gradients(*args),
    },
)

OPS = {op.name: op for op in (RMS_NORM, ADD_RMS_NORM, SWIGLU, ROPE, ATTENTION, LINEAR_CROSS_ENTROPY)}
