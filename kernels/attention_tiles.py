"""What the attention kernels share: which keys a tile of queries sees, how a tile is loaded, what a kernel is given.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, D head dim. Query t stands at key position
t + S - T. Derivations and the reasons of the numbers: docs/ops/attention_triton.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LOG2E_REST = tl.constexpr(1.925963033500011e-08)  # log2(e) less its float32


# ---- device helpers --------------------------------------------------------------------------------------------------
@triton.jit
def sequence_of(
    cu_ptr,  # [N + 1] i32
    slot,
    rows,
    N,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The packed sequence that owns a slot of BLOCK rows: (first token, tokens, slot within the sequence).

    Sequence n has the slots from cu[n] PACK // BLOCK + n on, which is room enough for each, found without knowing all
    lengths; a slot may be left over, and is then beyond the sequence's last row.
    """
    low = 0
    high = N
    while high - low > 1:
        middle = (low + high) // 2
        owned = tl.load(cu_ptr + middle) * PACK // BLOCK + middle <= slot
        low = tl.where(owned, middle, low)
        high = tl.where(owned, high, middle)
    # clamped: under torch.compile nobody has checked the values
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + low), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + low + 1), begin), rows)
    return begin, end - begin, slot - (begin * PACK // BLOCK + low)


@triton.jit
def unit_of(pid, units, slots, wave, REVERSED: tl.constexpr):
    """(unit, slot) of a program: `wave` heads side by side, whose keys stay in the second cache; longest tile first."""
    first = pid // (wave * slots) * wave
    size = tl.minimum(wave, units - first)
    within = pid - first * slots
    slot = within // size
    if REVERSED:
        slot = slots - 1 - slot
    return first + within % size, slot


@triton.jit
def keys_seen(first, last, S, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that queries at positions first..last see: (low, full_low, full_high, high).

    Blocks from full_low to full_high are seen whole by each query; those in low..full_low and full_high..high are
    crossed by an edge of the mask or by the end of the keys. A range that is not empty starts at a multiple of BLOCK_N.
    """
    low = 0
    full_low = 0
    high = S
    full_high = S
    if CAUSAL:
        high = tl.maximum(tl.minimum(S, last + 1), 0)
        full_high = tl.maximum(tl.minimum(S, first + 1), 0)
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
    full_low = tl.minimum(full_low, high)
    return low, full_low, tl.maximum(full_high // BLOCK_N * BLOCK_N, full_low), high


@triton.jit
def queries_seeing(first, last, shift, T, window, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Queries that see keys first..last, query t at position t + shift: (low, full_low, full_high, high) as above."""
    low = 0
    full_low = 0
    high = T
    full_high = T
    if CAUSAL:
        low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        full_low = tl.cdiv(tl.maximum(last - shift, 0), BLOCK_M) * BLOCK_M
    if WINDOW:
        high = tl.maximum(tl.minimum(T, last + window - shift), 0)
        full_high = tl.maximum(tl.minimum(T, first + window - shift), 0) // BLOCK_M * BLOCK_M
    full_low = tl.minimum(full_low, high)
    return low, full_low, tl.maximum(full_high, full_low), high


@triton.jit
def sees(i, j, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at position i sees key j, broadcast."""
    seen = j < S
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW:
        seen = seen & (j > i - window)
    return seen


@triton.jit
def load_tile(
    x,  # pointer to row 0 of the head, or a descriptor [B, heads, rows, D]
    b,
    head,
    row,
    rows,
    stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    CHECKED: tl.constexpr,  # rows beyond `rows` are zeros; else the caller knows that there are none
):
    """[BLOCK, BLOCK_D]: rows from `row` on of a head, columns beyond D zero."""
    if TMA:
        tile = x.load([b, head, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        at_row = tl.arange(0, BLOCK)
        at_column = tl.arange(0, BLOCK_D)
        pointers = x + tl.cast(row, tl.int64) * stride + (at_row.to(tl.int64) * stride)[:, None] + at_column[None, :]
        if CHECKED:
            if BLOCK_D == D:
                tile = tl.load(pointers, mask=(row + at_row < rows)[:, None], other=0.0)
            else:
                tile = tl.load(pointers, mask=(row + at_row < rows)[:, None] & (at_column < D)[None, :], other=0.0)
        elif BLOCK_D == D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(at_column < D)[None, :], other=0.0)
    return tile


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b; PRECISION "float64": summed in float64 and rounded once, so that no order of the sum changes it."""
    if PRECISION == "float64":
        result = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b."""
    if PRECISION == "float64":
        acc += product(a, b, PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def power(x, EXACT: tl.constexpr):
    """2^x; EXACT: e^x, the multiple of log 2 taken out first, so that the error does not grow with x; 0 at -inf."""
    if EXACT:
        n = tl.minimum(tl.maximum(tl.floor(x * LOG2E + 0.5), -126.0), 127.0)
        rest = tl.fma(x, _LOG2E_REST, tl.fma(x, LOG2E, -n))
        return tl.math.exp2(rest) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.math.exp2(x)


@triton.jit
def hide(s, i, j, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """`s` [queries, keys], -inf where the query does not see the key."""
    return tl.where(sees(i[:, None], j[None, :], S, window, CAUSAL, WINDOW), s, float("-inf"))


@triton.jit
def running_weights(s, peak, scale, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """(alpha, p, peak): the factor of what came before; the weights relative to the new maximum.

    peak is the largest product, not yet times `scale`, so that an exponent is one fused multiply-add; EXACT: of the
    difference of two products, whose error does not grow with them.
    """
    peak_new = tl.maximum(peak, tl.max(s, 1))
    base = peak_new if EXACT else peak_new * scale
    if MASKED:
        base = tl.where(peak_new == float("-inf"), 0.0, base)  # no key seen yet: weights are exp(-inf), not NaN
    if EXACT:
        x = (s - base[:, None]) * scale
        return power((peak - base) * scale, EXACT), power(x, EXACT), peak_new
    x = s * scale - base[:, None]
    return power(peak * scale - base, EXACT), power(x, EXACT), peak_new


@triton.jit
def weights(s, peak, inverse, scale, EXACT: tl.constexpr):
    """exp(scale s - lse), `scale` and `peak`, which is lse, of base two; EXACT: e^(scale (s - peak)) inverse."""
    if EXACT:
        return power((s - peak) * scale, EXACT) * inverse
    return power(s * scale - peak, EXACT)


@triton.jit
def row_statistics(peak_ptr, inverse_ptr, delta_ptr, t, T, EXACT: tl.constexpr):
    """(peak, inverse, delta) of rows t, for `weights`: of all that lie beyond T or see no key every weight is 0."""
    peak = tl.load(peak_ptr + t, mask=t < T, other=float("inf"))
    if EXACT:
        inverse = tl.load(inverse_ptr + t, mask=t < T, other=1.0)
    else:
        peak = tl.where(peak == float("-inf"), float("inf"), peak) * LOG2E
        inverse = peak
    return peak, inverse, tl.load(delta_ptr + t, mask=t < T, other=0.0)


# ---- host helpers ----------------------------------------------------------------------------------------------------
def aligned(x: Tensor) -> Tensor:
    """`x` with 16-byte rows, as vector loads and tensor descriptors want them; copied only if it has none."""
    step = 16 // x.element_size()
    if x.data_ptr() % 16 == 0:
        if x.is_contiguous() and x.shape[-1] % step == 0:  # looked at first: strides take longer
            return x
        strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        if x.stride(-1) == 1 and all(stride % step == 0 for stride in strides):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def head_descriptor(x: Tensor, block: int, block_d: int) -> TensorDescriptor:
    """x [B, rows, heads, D], `aligned`, as a descriptor [B, heads, rows, D] of tiles [block, block_d] of a head."""
    key = (x.shape, x.stride(), x.dtype, block, block_d)
    known = _descriptors.get(key)
    if known is None:
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.clear()
        B, rows, heads, D = x.shape
        step = 16 // x.element_size()
        strides = [s if n > 1 else step * D for n, s in ((B, x.stride(0)), (heads, x.stride(2)), (rows, x.stride(1)))]
        descriptor = TensorDescriptor(x, [B, heads, rows, D], [*strides, 1], [1, 1, block, block_d])
        _descriptors[key] = {name: value for name, value in vars(descriptor).items() if name != "base"}
        return descriptor
    # its constructor's checks, a third of a small call's time, have passed for these sizes; `aligned` checks the rest
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(known, base=x)
    return descriptor


_descriptors: dict[tuple[Any, ...], dict[str, Any]] = {}
_MOST_DESCRIPTORS = 4096
