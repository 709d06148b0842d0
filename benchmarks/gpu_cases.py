"""The cases of every op that `benchmarks.gpu test` checks; what is timed stands in the ops' own files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llama_fast.ops.table import OPS
from llama_fast.verify import Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    # dweight by blocks of classes: some rows computed again, and none
    options = {"label_smoothing": 0.1, "z_loss": 1e-4}
    yield Case(op, {"...": (4200,), "C": 2304, "V": 32000}, options, scale=0.2)
    yield Case(op, {"...": (4100,), "C": 4352, "V": 16001}, {"reduction": "sum"}, scale=0.2)


def test_cases(op: str, tiny: bool) -> list[Case]:
    """The cases of an op, each checked in every dtype on every backend; `tiny`: one small one, for a dry run."""
    if tiny:
        return [tiny_case(op)]
    if op == "attention":
        return list(_attention_cases())
    if op in ("rms_norm", "add_rms_norm"):
        return list(_norm_cases(op))
    return list({"swiglu": _swiglu_cases, "rope": _rope_cases, "linear_cross_entropy": _loss_cases}[op]())


def tiny_case(op: str) -> Case:
    """A small case of an op, for a dry run."""
    sizes = {"B": 1, "T": 9, "S": 9, "H": 2, "G": 1, "D": 16, "C": 40, "F": 40, "V": 33, "...": (5,)}
    patterns = " ".join(OPS[op].public.values()).replace("/2", "").split()
    return Case(op, {k: v for k, v in sizes.items() if k in patterns})
