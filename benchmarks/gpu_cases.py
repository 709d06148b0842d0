"""What `benchmarks.gpu` checks and times: cases of every op, and the rivals that are timed beside the backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from llama_fast.ops import eager
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

Call = Callable[[], Any]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---- correctness ----------------------------------------------------------------------------------------------------
def _packed(*bounds: int) -> dict[str, Any]:
    return {
        "dims": {"R": bounds[-1], "N": len(bounds)},
        "tensors": {"cu_seqlens": lambda _: torch.tensor(bounds, dtype=torch.int32)},
    }


def _attention_cases() -> Iterator[Case]:
    sizes = {"B": 2, "T": 200, "S": 200, "H": 4, "G": 2, "D": 64}
    for D in (16, 32, 64, 80, 96, 128, 192, 256):
        yield Case("attention", {**sizes, "D": D})
    yield Case("attention", {**sizes, "D": 128}, {"causal": False})
    yield Case("attention", {**sizes, "D": 128}, strided=True)
    yield Case("attention", {**sizes, "D": 128}, scale=3.0)
    for T, S in ((1, 333), (5, 130), (130, 5), (1, 1), (129, 257), (0, 8), (8, 0), (70, 64)):
        yield Case("attention", {**sizes, "T": T, "S": S, "D": 128})
    for window in (1, 16, 100, 1000):
        yield Case("attention", {**sizes, "T": 300, "S": 300, "D": 128}, {"window": window})
    yield Case("attention", {**sizes, "T": 100, "S": 300, "D": 128}, {"window": 50})
    yield Case("attention", {**sizes, "H": 8, "G": 1, "D": 128})
    yield Case("attention", {**sizes, "H": 3, "G": 3, "D": 128}, {"scale": 0.3})
    yield Case("attention", {"B": 1, "T": 1500, "S": 1500, "H": 4, "G": 2, "D": 128})
    yield Case("attention", {"B": 1, "T": 1024, "S": 1024, "H": 2, "G": 2, "D": 64}, {"causal": False})
    heads = {"H": 4, "G": 2, "D": 128}
    for bounds in ((0, 20, 20, 67, 300), (0, 128, 256), (0, 1, 2, 130)):
        packed = _packed(*bounds)
        for options in ({}, {"causal": False}, {"window": 30}):
            yield Case("attention", {**packed["dims"], **heads}, options, tensors=packed["tensors"])


def _norm_cases(op: str) -> Iterator[Case]:
    for rows, C in ((10, 3), (111, 512), (2000, 1003), (5, 70000), (33, 16384), (17, 8192), (2000, 4096), (20000, 128)):
        yield Case(op, {"...": (rows,), "C": C})
    yield Case(op, {"...": (0,), "C": 16})
    yield Case(op, {"...": (), "C": 48})
    yield Case(op, {"...": (3, 37), "C": 512}, strided=True)
    yield Case(op, {"...": (9,), "C": 100}, {"eps": 1e-2}, scale=0.01)


def _swiglu_cases() -> Iterator[Case]:
    for rows, F in ((10, 3), (111, 512), (5, 4099), (700, 11008), (3, 70000), (0, 16)):
        yield Case("swiglu", {"...": (rows,), "F": F})
    yield Case("swiglu", {"...": (3, 37), "F": 512}, strided=True)
    yield Case("swiglu", {"...": (9,), "F": 100}, scale=30.0)


def _rope_cases() -> Iterator[Case]:
    sizes = {"B": 2, "T": 33, "H": 4, "G": 2, "D": 64}
    for interleaved in (False, True):
        options = {"interleaved": interleaved}
        for D in (2, 6, 64, 80, 90, 128, 256):
            yield Case("rope", {**sizes, "D": D}, options)
        yield Case("rope", {**sizes, "H": 40, "G": 8, "D": 128}, options)
        yield Case("rope", sizes, options, strided=True)
        yield Case("rope", {**sizes, "N": 2}, options)
    yield Case("rope", {**sizes, "H": 0})
    yield Case("rope", {**sizes, "T": 0})


def _loss_cases() -> Iterator[Case]:
    op = "linear_cross_entropy"
    for rows, C, V in ((1, 1, 1), (10, 3, 7), (111, 64, 1003), (6, 16, 50001), (0, 16, 33), (2100, 24, 131)):
        yield Case(op, {"...": (rows,), "C": C, "V": V})
    dims = {"...": (40,), "C": 48, "V": 515}
    for options in (
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none", "ignore_index": 2},
    ):
        yield Case(op, dims, options)
    yield Case(op, dims, strided=True)
    yield Case(op, dims, scale=3.0)
    yield Case(op, {"...": (6000,), "C": 64, "V": 256}, {"reduction": "sum"})  # dweight in a float32 copy


def test_cases(op: str, tiny: bool) -> list[Case]:
    """The cases of an op, each checked in every dtype on every backend; `tiny`: one small one, for a dry run."""
    if tiny:
        return [_tiny(op)]
    if op == "attention":
        return list(_attention_cases())
    if op in ("rms_norm", "add_rms_norm"):
        return list(_norm_cases(op))
    return list({"swiglu": _swiglu_cases, "rope": _rope_cases, "linear_cross_entropy": _loss_cases}[op]())


def _tiny(op: str) -> Case:
    sizes = {"B": 1, "T": 9, "S": 9, "H": 2, "G": 1, "D": 16, "C": 40, "F": 40, "V": 33, "...": (5,)}
    patterns = " ".join(OPS[op].public.values()).replace("/2", "").split()
    return Case(op, {k: v for k, v in sizes.items() if k in patterns})


# ---- speed ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timed:
    """A case that is timed.

    Args:
        label: names it in tables and results.
        case: sizes and options.
        dtype: a key of DTYPES.
        together: forward and backward are timed as one, with the peak of memory.
        proves: counts for proven.json, and not only for the reader.
    """

    label: str
    case: Case
    dtype: str = "bfloat16"
    together: bool = False
    proves: bool = True


def _attention(label: str, B: int, T: int, H: int, G: int, D: int, S: int = 0, **options: Any) -> Timed:
    return Timed(label, Case("attention", {"B": B, "T": T, "S": S or T, "H": H, "G": G, "D": D}, options))


def _bench_cases() -> tuple[Timed, ...]:
    def norm(op: str, rows: int, C: int, dtype: str = "bfloat16") -> Timed:
        return Timed(f"{rows}x{C}", Case(op, {"...": (rows,), "C": C}), dtype)

    rope = {"B": 4, "T": 8192, "H": 32, "G": 8, "D": 128}
    loss = {"...": (8192,), "C": 4096, "V": 128256}
    return (
        norm("rms_norm", 32768, 4096),
        norm("rms_norm", 8192, 8192),
        norm("rms_norm", 262144, 128),
        norm("rms_norm", 16384, 4096, "float32"),
        norm("add_rms_norm", 32768, 4096),
        norm("add_rms_norm", 16384, 4096, "float32"),
        Timed("16384x14336", Case("swiglu", {"...": (16384,), "F": 14336})),
        Timed("8192x11008", Case("swiglu", {"...": (8192,), "F": 11008}), "float32"),
        Timed("4x8192 32+8x128", Case("rope", rope)),
        Timed("interleaved", Case("rope", rope, {"interleaved": True})),
        Timed("2x8192 fp32", Case("rope", {**rope, "B": 2}), "float32"),
        _attention("T16k D128", 1, 16384, 16, 16, 128),
        _attention("4xT4k 32/8 D128", 4, 4096, 32, 8, 128),
        _attention("8xT2k D64", 8, 2048, 32, 32, 64),
        _attention("T16k window4k", 1, 16384, 16, 16, 128, window=4096),
        Timed("8192x4096->128256", Case("linear_cross_entropy", loss), together=True),
    )


def bench_cases(op: str, tiny: bool) -> list[Timed]:
    """What is timed of an op; `tiny`: one small case, for a dry run."""
    if tiny:
        return [Timed("tiny", _tiny(op), together=op == "linear_cross_entropy")]
    return [t for t in _bench_cases() if t.case.op == op]


@dataclass
class Rival:
    """Something else that computes an op, for timing: PyTorch plain and compiled, or another library's kernel.

    Args:
        name: as in the tables.
        function: the public function's arguments -> its result; None where it cannot run.
        reason: why not, where it is None.
        context: entered around every call.
    """

    name: str
    function: Callable[..., Any] | None
    reason: str = ""
    context: Callable[[], Any] | None = field(default=None)


def _library(name: str, module: str, make: Callable[[Any], Callable[..., Any]]) -> Rival:
    try:
        return Rival(name, make(importlib.import_module(module)))
    except Exception as error:  # not installed, or not for this torch
        return Rival(name, None, f"{type(error).__name__}: {error}")


def _sdpa(backend: str) -> Rival:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return Rival(f"sdpa-{backend}", eager.attention, context=lambda: sdpa_kernel(getattr(SDPBackend, _SDPA[backend])))


_SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _liger_rope(m: Any) -> Callable[..., Any]:
    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Any:
        if interleaved:
            raise NotImplementedError("halves only")
        doubled = [torch.cat((t, t), dim=-1).unsqueeze(0) for t in (cos, sin)]
        q_BHTD, k_BGTD = m.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled)
        return q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)

    return rope


def _liger_loss(m: Any) -> Callable[..., Any]:
    return lambda hidden, weight, targets: m.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]


_LIGER: dict[str, tuple[str, Callable[[Any], Callable[..., Any]]]] = {
    "rms_norm": ("liger_kernel.ops.rms_norm", lambda m: lambda x, w, eps=1e-6: m.LigerRMSNormFunction.apply(x, w, eps)),
    "add_rms_norm": (
        "liger_kernel.ops.fused_add_rms_norm",
        lambda m: lambda x, r, w, eps=1e-6: m.LigerFusedAddRMSNormFunction.apply(x, r, w, eps),
    ),
    "swiglu": ("liger_kernel.ops.swiglu", lambda m: m.LigerSiLUMulFunction.apply),
    "rope": ("liger_kernel.ops.rope", _liger_rope),
    "linear_cross_entropy": ("liger_kernel.ops.fused_linear_cross_entropy", _liger_loss),
}


def rivals(op: str, compiler: str) -> list[Rival]:
    """PyTorch plain and compiled, SDPA's kernels one by one, and Liger-Kernel's where it is installed."""
    found = [Rival("eager", getattr(eager, op))]
    if op == "attention":  # compiled, it is the same call of SDPA
        return [*found, *(_sdpa(name) for name in _SDPA)]
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over one forward
    found.append(Rival("compile", torch.compile(getattr(eager, op), dynamic=False, backend=compiler)))
    module, make = _LIGER[op]
    return [*found, _library("liger", module, make)]
