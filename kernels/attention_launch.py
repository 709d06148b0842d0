"""Launch parameters of the attention kernels, by device class, dtype and head dim.

Frozen: the first call compiles one variant of each kernel and measures nothing. Where the numbers come from:
docs/ops/attention_triton.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from llama_fast.kernels.launch import INTERPRETED, device_class, is_amd, lanes, multiprocessors

# Sizes that a kernel is not compiled for anew: neither for 1 nor for multiples of 16.
RUNTIME_SIZES = ["T", "S", "H", "N", "slots", "wave", "units", "window"]


@dataclass(frozen=True)
class Tiles:
    """Launch parameters of one attention kernel.

    Args:
        block_m, block_n: queries and keys of a tile.
        num_warps, num_stages: of the program; stages of the loads that run ahead.
        tma: tiles of the inner loop come through tensor descriptors (sm_90 and newer, not packed sequences).
        warp_specialize: Triton gives loads and products warps of their own (sm_100; on sm_90 its pass fails).
        swapped: dk and dv in half precision: scores stand keys by queries, and go on from registers; else queries by
            keys, and go on through shared memory, but lse and delta are two registers a thread and not a row of them.
        precision: how float32 is multiplied: "ieee", "tf32x3", "bf16x6", "float64"; of no effect in half precision.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    warp_specialize: bool = False
    swapped: bool = True
    precision: str = "ieee"


# Kernel -> Tiles of head dims padded to at most 64, 128, 256.
# sm_90: beside each what it did on an H200 (bf16, causal, one sequence of 16384, 2048 / D heads; two runs), in TFLOP/s
# of the products that the kernel does. Small programs of one warp group, two or more to a multiprocessor, hide each
# other's exponentials; larger tiles read less and lose.
_SM_90 = {
    "fwd": (
        Tiles(64, 128, 4, 3, tma=True),  # 457, 457; 64 x 64 448, 405; 128 x 64 431
        Tiles(64, 64, 4, 3, tma=True),  # 528, 497; without descriptors 472, 468; 128 x 64 478, 475; 128 x 128 430
        Tiles(128, 64, 8, 2, tma=True),  # 545; 64 x 32 435
    ),
    "dkdv": (
        Tiles(128, 64, 4, 2, tma=True),  # 508, 504; unswapped a tenth slower; 64 x 64 332
        Tiles(64, 64, 4, 2, tma=True, swapped=False),  # 596; swapped 487, 480, 482; 128 x 64 unswapped 441
        Tiles(32, 32, 4, 2, tma=True),  # 226; 32 x 64 216
    ),
    "dq": (
        Tiles(64, 64, 4, 3, tma=True),  # 636, 635; 128 x 64 543
        Tiles(128, 64, 8, 3),  # 640; with descriptors 623, 622, 623; 64 x 64 with them 593, 606, 605
        Tiles(128, 32, 8, 2, tma=True),  # 455; 64 x 32 349
    ),
}
# sm_100, sm_103: not measured; no spilled registers.
_SM_100 = {
    "fwd": (
        Tiles(128, 128, 8, 2, tma=True, warp_specialize=True),
        Tiles(128, 128, 8, 2, tma=True, warp_specialize=True),
        Tiles(128, 64, 8, 2, tma=True),
    ),
    "dkdv": (Tiles(64, 128, 8, 2, tma=True), Tiles(64, 128, 8, 2, tma=True), Tiles(32, 64, 8, 2, tma=True)),
    "dq": (Tiles(128, 64, 8, 2, tma=True), Tiles(128, 64, 8, 2, tma=True), Tiles(64, 32, 8, 2, tma=True)),
}
# mma.sync and cp.async: at most 99 KiB of shared memory (sm_86, sm_89, sm_120), few spilled registers; not measured.
_SM_80 = {
    "fwd": (Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)),
    "dkdv": (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(16, 32, 4, 1)),
    "dq": (Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 3), Tiles(32, 32, 4, 1)),
}
# AMD's, gfx9.. (CDNA: 512 vector registers a thread) and later (RDNA: 256). In 64 KiB of shared memory, and without
# spilled registers but on gfx11, whose products hold their operands twice, at D > 64, and at D 256 on RDNA. What is
# loaded ahead waits in registers, for which there is no room. Not measured.
_CDNA = {
    "fwd": (Tiles(128, 64, 8, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
    "dkdv": (Tiles(32, 128, 8, 1), Tiles(16, 64, 8, 1), Tiles(16, 16, 4, 1, swapped=False)),
    "dq": (Tiles(128, 32, 8, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
}
_RDNA = {
    "fwd": (Tiles(64, 32, 4, 1), Tiles(64, 16, 8, 1), Tiles(16, 16, 8, 1)),
    "dkdv": (Tiles(16, 64, 4, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 8, 1)),
    "dq": (Tiles(64, 32, 8, 1), Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1)),
}


def _float32(block_m: int, block_n: int, num_warps: int, precision: str = "bf16x6", num_stages: int = 2) -> Tiles:
    return Tiles(block_m, block_n, num_warps, num_stages, precision=precision)


# Six bfloat16 products: as exact as float32's on an H200 (0.2 to 0.6 of the budget; three tf32 products up to 1.1), and
# faster: TFLOP/s beside each, at 1 x 4096 tokens; tf32x3 20 to 44, plain multiply-adds 10. At D 256 their operands
# overflow the registers; plain multiply-adds fit, 5 to 7, but in a chain of 256 they miss the budget forward. Both
# kernels of the backward must multiply by the same instruction, so that their products are equal bit for bit: 32
# queries, too few for a warp group's. dq 64 x 32: 47, 38.
_FLOAT32 = {
    "fwd": (_float32(64, 64, 4), _float32(64, 32, 4), _float32(32, 32, 8, "float64")),  # 55, 46; "ieee" 6
    "dkdv": (_float32(32, 64, 4), _float32(32, 32, 4), _float32(16, 32, 8, "ieee")),  # 48, 35, 7
    "dq": (_float32(32, 64, 4), _float32(32, 32, 4), _float32(32, 16, 8, "ieee")),
}


_FLOAT32_SMALL = {  # more than 64 columns in 99 KiB of shared memory, on cards with few float64 units: not measured
    "fwd": _float32(32, 16, 8, "ieee"),
    "dkdv": _float32(16, 32, 8, "ieee"),
    "dq": _float32(32, 16, 8, "ieee"),
}


# CDNA multiplies float32 in its matrix units. None in float64: Triton 3.6 fails on it there, and RDNA would spill most.
# Not measured.
_CDNA_FLOAT32 = {
    "fwd": (_float32(64, 32, 8, "ieee", 1), _float32(64, 32, 8, "ieee", 1), _float32(32, 16, 8, "ieee", 1)),
    "dkdv": (_float32(32, 32, 8, "ieee", 1), _float32(32, 32, 8, "ieee", 1), _float32(32, 16, 8, "ieee", 1)),
    "dq": (_float32(32, 32, 8, "ieee", 1), _float32(32, 32, 8, "ieee", 1), _float32(32, 16, 8, "ieee", 1)),
}
_RDNA_FLOAT32 = {
    "fwd": (_float32(32, 32, 8, num_stages=1), *2 * (_float32(16, 16, 8, num_stages=1),)),
    "dkdv": 3 * (_float32(16, 16, 8, num_stages=1),),
    "dq": 3 * (_float32(16, 16, 8, num_stages=1),),
}


def tiles_of(kernel: str, D: int, dtype: torch.dtype, device: torch.device, few: bool = False) -> Tiles:
    """Launch parameters of "fwd", "dkdv" or "dq"; `few`: of at most PACKED_ROWS rows, which counts in float32."""
    if few and dtype == torch.float32 and not is_amd(device):
        return few_rows_gradient_tiles(D)
    place = device_class(device)
    column = 0 if D <= 64 else 1 if D <= 128 else 2
    if is_amd(device):
        half, single = (_CDNA, _CDNA_FLOAT32) if lanes(device) == 64 else (_RDNA, _RDNA_FLOAT32)
    else:
        half = {"sm_90": _SM_90, "cpu": _SM_90, "sm_100": _SM_100, "sm_103": _SM_100}.get(place, _SM_80)
        single = _FLOAT32
        if dtype == torch.float32 and half is _SM_80 and place != "sm_80" and column:
            return _FLOAT32_SMALL[kernel]
    return (single if dtype == torch.float32 else half)[kernel][column]


def few_rows_gradient_tiles(D: int) -> Tiles:
    """Backward in float32 of as few rows: the same, in both kernels."""
    return Tiles(16, 32 if D <= 128 else 16, 4, 2, precision="float64")


def few_rows_tiles(rows: int, D: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Forward of at most PACKED_ROWS rows of a key/value head (a decode): bound by reading the keys."""
    block_m = max(16, triton.next_power_of_2(rows))
    if is_amd(device):
        return (
            tiles_of("fwd", D, dtype, device)
            if dtype == torch.float32
            else Tiles(block_m, 32 if D <= 128 else 16, 4, 1)
        )
    if dtype == torch.float32:  # eager PyTorch adds the products of a few rows in trees, far more exactly than a chain
        return Tiles(min(block_m, 32 if D <= 128 else 16), 32 if D <= 128 else 16, 4, 2, precision="float64")
    # H200, B8 H32 G8 S8192 D128 as a CUDA graph: 3813 GB/s of 4200; 64 keys 3784, 128 3747, 256 3395
    return Tiles(block_m, 32, 2 if D <= 128 and block_m == 16 else 4, 4 if D <= 128 else 2)


PACKED_ROWS = 64  # up to so many rows of a key/value head, its query heads share a tile: keys are read once


def splits_of(programs: int, keys: int, device: torch.device) -> int:
    """Shares of the keys for each tile: where tiles are fewer than multiprocessors, enough for two programs on each."""
    processors = multiprocessors(device)
    if 2 * programs > processors:
        return 1
    return max(1, min(2 * processors // max(programs, 1), keys // 256, 32))


def wave_of(heads: int, keys: int, head_bytes: int) -> int:
    """How many heads run side by side: those whose keys and values fit half the second cache of an H100."""
    return max(1, min(heads, (25 << 20) // max(1, keys * head_bytes)))


@functools.cache
def constants_of(tiles: Tiles, block_d: int, packed: bool) -> tuple[Any, ...]:
    """The last compile-time arguments of every kernel, from PRECISION on; the interpreter knows no sums of products."""
    precision = "ieee" if INTERPRETED and tiles.precision != "float64" else tiles.precision
    tma = tiles.tma and not packed
    return precision, tiles.block_m, tiles.block_n, block_d, tma, tiles.warp_specialize and tma


def power_of_two(D: int) -> int:
    """BLOCK_D: a tile's columns, at least 16 for a product."""
    return max(16, triton.next_power_of_2(D))
