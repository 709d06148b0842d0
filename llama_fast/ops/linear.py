"""The matrix products of a linear layer y = x W^T, each on the fastest of the vendor's paths: `nt`, `nn`, `tn`.

Which path runs is read from `RULES`, a frozen table (docs/ops/linear.md), and depends on the class of the processor,
the dtype, the form and the sizes only: never on a measurement of the running process, on the number of threads or on
the alignment of a pointer. So a run that is resumed in another process, on such a processor, takes the same paths and
gives the same bits. Why this and not a measurement at run time, and the numbers behind each rule: docs/ops/linear.md.

`linear` is the differentiable layer; `nt`, `nn` and `tn` record no gradient on the fast paths: where one is to be
recorded, and under torch.compile, autocast, functorch and forward-mode AD, all four are plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from llama_fast.ops import library
from llama_fast.ops.dispatch import once_differentiable, plain

# Letters of this file: a product gives [M, N] and contracts over K.
#   nt: y = x W^T      x [M, K], W [N, K]     M = rows,          N = outputs of the layer, K = inputs
#   nn: dx = dy W      dy [M, K], W [K, N]    M = rows,          N = inputs,               K = outputs
#   tn: dW = dy^T x    dy [K, M], x [K, N]    M = outputs,       N = inputs,               K = rows
FORMS = ("nt", "nn", "tn")

_SLICE_BYTES = 8 << 20  # of a product that cannot be written in place: two of them fit the last cache
_ZEN4, _ZEN5 = 25, 26  # AMD's families with AVX-512: in two halves, and with 512-bit multiply-adds at full rate
_ALL = 1 << 62
_TILE = (64, _ALL)  # columns of brgemm's tile, and more
_REGISTER = 32  # bfloat16 numbers that oneDNN reads at once of a first operand, past the end of a row too
_F32 = (torch.float32,)
_BF16 = (torch.bfloat16,)
_HALF = (torch.bfloat16, torch.float16)
_BRGEMM_REASON = "oneDNN's kernel for a tile: whole products lose a tenth of it to rearranging their operands"
_BRGEMM_F32_REASON = "oneDNN's kernel for a tile uses 512-bit registers, MKL does not on this processor"
_COPIED_REASON = "oneDNN takes twice the time for a first operand that lies across: a copy of dy^T pays"
_BEHIND_REASON = "oneDNN reads on behind the rows of the first operand: those of a copy end in zeros"
_TRANSPOSED_REASON = "(W x^T)^T: oneDNN rearranges its second operand, and x is the smaller one"


@dataclass(frozen=True)
class Rule:
    """`path` runs where dtype and form are listed, the sizes are in range and 2 M N K >= `flops`.

    `amd_family`: on AMD processors with AVX-512 from this family on, and on no other maker's; 0 for all processors.
    `amx`: on processors with matrix registers for bfloat16 (Intel's server processors from Sapphire Rapids on) alone.
    `ragged`: where K, the length of the first operand's rows, is no multiple of `_REGISTER`.
    """

    path: str
    dtypes: tuple[torch.dtype, ...]
    forms: tuple[str, ...]
    reason: str
    flops: int = 0
    M: tuple[int, int] = (1, _ALL)
    N: tuple[int, int] = (1, _ALL)
    K: tuple[int, int] = (1, _ALL)
    amd_family: int = 0
    amx: bool = False
    ragged: bool = False

    def applies(self, form: str, dtype: torch.dtype, M: int, N: int, K: int) -> bool:
        if self.amd_family > _amd_family or self.amx > _amx or (self.ragged and K % _REGISTER == 0):
            return False
        sizes = all(low <= n <= high for (low, high), n in ((self.M, M), (self.N, N), (self.K, K)))
        return dtype in self.dtypes and form in self.forms and sizes and self.flops <= 2 * M * N * K


RULES = (  # the first that applies and can run; else "torch"
    Rule("transposed", _BF16, ("nt",), _TRANSPOSED_REASON, flops=1 << 24, M=(5, 64), N=(1024, _ALL), amx=True),
    Rule("gemv", (torch.float32, torch.bfloat16), ("nt",), "1 to 4 rows: bound by reading W", flops=1 << 18, M=(1, 4)),
    Rule("brgemm", _F32, ("nt", "nn"), _BRGEMM_F32_REASON, 1 << 23, (4, _ALL), _TILE, (128, _ALL), _ZEN4),
    Rule("brgemm", _F32, ("tn",), _BRGEMM_F32_REASON, 1 << 23, (1, _ALL), _TILE, (8, _ALL), _ZEN5),
    Rule("brgemm", _F32, ("tn",), _BRGEMM_F32_REASON, 1 << 23, (1, _ALL), _TILE, (128, _ALL), _ZEN4),
    Rule("brgemm", _BF16, ("nt",), _BRGEMM_REASON, 1 << 23, (512, _ALL), _TILE, (128, _ALL), _ZEN4),
    Rule("brgemm", _BF16, ("nn",), _BRGEMM_REASON, 1 << 23, (256, _ALL), _TILE, (512, _ALL), _ZEN4),
    Rule("brgemm", _BF16, ("tn",), _BRGEMM_REASON, 1 << 23, (1, _ALL), _TILE, (512, _ALL), _ZEN4),
    Rule("copied", _BF16, ("tn",), _COPIED_REASON, flops=1 << 23, M=(1024, _ALL), N=(512, _ALL), amx=True),
    Rule("copied", _BF16, ("tn",), _COPIED_REASON, flops=1 << 23, M=(512, _ALL), N=(1024, _ALL), amx=True),
    Rule("transposed", _BF16, ("nt",), _TRANSPOSED_REASON, M=(65, 256), N=(2048, _ALL), K=(512, _ALL), amx=True),
    Rule("transposed", _BF16, ("nt",), _TRANSPOSED_REASON, M=(257, 512), N=(16384, _ALL), K=(512, _ALL), amx=True),
    # below 2 * 16^3 torch multiplies without oneDNN
    Rule("copied", _BF16, ("nt", "nn"), _BEHIND_REASON, flops=1 << 13, amx=True, ragged=True),
    Rule("torch", _HALF, FORMS, "oneDNN's own instructions for both half precisions", amx=True),
    Rule(
        "transposed",
        (torch.bfloat16,),
        ("nn",),
        "a contraction this long runs a tenth faster as (W^T dy^T)^T",
        M=(256, _ALL),
        N=(1024, _ALL),
        K=(24576, _ALL),
    ),
    Rule("upcast", (torch.float16,), FORMS, "torch multiplies float16 element by element", flops=1 << 18),
)
PATHS = ("torch", "brgemm", "transposed", "copied", "upcast", "gemv")
_ADDING = ("brgemm", "copied", "upcast")  # to what is in `out`

_forced: ContextVar[str | None] = ContextVar("llama_fast_linear", default=None)


@contextmanager
def force(path: str | None) -> Iterator[None]:
    """Within the block every product takes `path` where it can run and "torch" where not; None: as the rules say.

    Raises:
        ValueError: there is no such path.
    """
    if path is not None and path not in PATHS:
        raise ValueError(f"path: {path!r} is not one of {', '.join(PATHS)}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


_native, _ = library.load("_native")
_gemv: Any = None if _native is None else _native.cpu.gemv
_transpose: Any = None if _native is None else _native.cpu.transpose
_brgemm: Any = None if _native is None else _native.cpu.brgemm
_has_brgemm: set[torch.dtype] = set()
if _native is not None:
    _has_brgemm.update(
        d for d, half in ((torch.float32, False), (torch.bfloat16, True)) if _native.cpu.has_brgemm(half)
    )


def _probe_amd_family() -> int:
    """0 without AVX-512 too, as on a Zen 3, which is of family 25 like a Zen 4: oneDNN's kernel runs there as well."""
    if _native is None or "avx512" not in _native.cpu.isas():
        return 0
    return int(_native.cpu.amd_family())


_amd_family = _probe_amd_family()
_amx: bool = _native is not None and "amx" in _native.cpu.isas()


def forced() -> str | None:
    """The path that `force` asks for, or None."""
    return _forced.get()


def _can(path: str, form: str, dtype: torch.dtype, M: int, K: int) -> bool:
    if path == "brgemm":
        return dtype in _has_brgemm and bool(torch.backends.mkldnn.enabled)
    if path == "upcast":
        return dtype == torch.float16 and _can("brgemm", form, torch.float32, M, K)
    if path == "gemv":
        return _gemv is not None and form == "nt" and 1 <= M <= 4 and K > 0 and dtype != torch.float64
    if path == "copied":
        return _transpose is not None and dtype in _HALF
    if path == "transposed" and form == "nt":
        return K % _REGISTER == 0  # the rows of W are read in whole registers, and a NaN behind one would stay
    return True


def _find(form: str, dtype: torch.dtype, M: int, N: int, K: int) -> tuple[str, str]:
    asked = forced()
    if asked is not None:
        return (asked if _can(asked, form, dtype, M, K) else "torch"), "asked for"
    for rule in RULES:
        if rule.applies(form, dtype, M, N, K) and _can(rule.path, form, dtype, M, K):
            return rule.path, rule.reason
    return "torch", "no rule names another path"


def choose(form: str, dtype: torch.dtype, M: int, N: int, K: int) -> str:
    """The path, one of `PATHS`, of a product [M, N] over K on the CPU."""
    return _find(form, dtype, M, N, K)[0]


def explain(form: str, dtype: torch.dtype, M: int, N: int, K: int) -> str:
    """One line: the path of a product on the CPU, and why."""
    path, reason = _find(form, dtype, M, N, K)
    return f"{form} {str(dtype).removeprefix('torch.')} [{M}, {N}] over {K}: {path} ({reason})"


def _watched(a: Tensor, b: Tensor) -> bool:
    """Whether plain torch must do it: something watches the operations, or the tensors are not plain CPU tensors."""
    return bool(
        torch.compiler.is_compiling()
        or a.device.type != "cpu"
        or b.device.type != "cpu"
        or a.dtype != b.dtype
        or a.layout is not torch.strided
        or b.layout is not torch.strided
        or not plain(a, b)
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _recorded(a: Tensor, b: Tensor) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)


def _plain(a: Tensor, b: Tensor) -> bool:
    return _recorded(a, b) or _watched(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nt(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        return (
            nn(dy, weight) if needs_dx else None,
            tn(dy, x) if needs_dweight else None,
            sum_rows(dy) if needs_dbias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), differentiable once, on the paths of `RULES`.

    x [..., C], weight [V, C], bias [V] or None -> [..., V].
    """
    recorded = _recorded(x, weight) or (bias is not None and _recorded(bias, bias))
    if _watched(x, weight) or (bias is not None and _watched(x, bias)) or (recorded and x.dtype == torch.float64):
        return F.linear(x, weight, bias)
    if recorded:
        return _Linear.apply(x, weight, bias)
    return nt(x, weight, bias)


def sum_rows(dy: Tensor) -> Tensor:
    """[..., V] -> [V], the gradient of a bias: the sum over all rows, in float32 at least."""
    return flat(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dy.dtype)


def nt(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: [..., C]. weight: [V, C], any strides. bias: [V] or None; the sum is rounded once where the path can add.
        out: [..., V], contiguous in all but the first dimension: y is written there, or added to it with `accumulate`
            (rounded as in `tn`; without a bias), and returned.

    Raises:
        ValueError: `accumulate` without `out`, or with a bias.
    """
    if accumulate and out is None:
        raise ValueError("out is None, expected a tensor to accumulate into")
    if accumulate and bias is not None:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected None with accumulate")
    if out is None and (_plain(x, weight) or (bias is not None and _plain(x, bias))):
        return F.linear(x, weight, bias)
    a, V, into = flat(x), weight.shape[0], None if out is None else flat(out)
    path = "torch" if bias is None else _find("nt", x.dtype, len(a), V, a.shape[1])[0]
    if bias is not None and path == "torch" and out is None:
        return F.linear(x, weight, bias)
    adds = path in _ADDING
    if bias is not None and adds:
        into = (x.new_empty(len(a), V) if into is None else into).copy_(bias)
    y = _product("nt", a, weight.t(), into, accumulate=accumulate or adds)
    if bias is not None and not adds:
        y += bias
    return y.view(*x.shape[:-1], V) if out is None else out


def nn(dy: Tensor, weight: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """dx = dy W.

    Args:
        dy: [..., V]. weight: [V, C], any strides.
        out: [..., C], contiguous in all but the first dimension: dx is written there, or added to it with `accumulate`
            (rounded as in `tn`), and returned.

    Raises:
        ValueError: `accumulate` without `out`.
    """
    if accumulate and out is None:
        raise ValueError("out is None, expected a tensor to accumulate into")
    if out is None and _plain(dy, weight):
        return dy @ weight
    dx = _product("nn", flat(dy), weight, None if out is None else flat(out), accumulate)
    return dx.view(*dy.shape[:-1], weight.shape[1]) if out is None else out


def tn(dy: Tensor, x: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """dW = dy^T x, summed over all leading dimensions.

    Args:
        dy: [..., V]. x: [..., C].
        out: [V, C], any strides: dW is written there, or added to it with `accumulate`, and returned. The sum is
            rounded once to the dtype of `out` where the path can add (torch's, and brgemm's where the last stride of
            `out` is 1), and the product before it elsewhere.
            A float32 `out` may stand beside half-precision dy and x.

    Raises:
        ValueError: `accumulate` without `out`.
    """
    if accumulate and out is None:
        raise ValueError("out is None, expected a tensor to accumulate into")
    dy, x = flat(dy), flat(x)
    if out is None and _plain(dy, x):
        return dy.t() @ x
    return _product("tn", dy.t(), x, out, accumulate)


def _product(form: str, a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool = False) -> Tensor:
    """a [M, K] times b [K, N], into `out` if it is given."""
    (M, K), N = a.shape, b.shape[1]
    if out is not None and (tuple(out.shape) != (M, N) or out.device != a.device):
        raise ValueError(f"out has shape {tuple(out.shape)} on {out.device}, expected {(M, N)} on {a.device}")
    # torch's path says what is wrong where the sizes do not fit
    path = "torch" if M * N * K == 0 or b.shape[0] != K or _plain(a, b) else _find(form, a.dtype, M, N, K)[0]
    if path == "torch" and (out is None or out.dtype == a.dtype):
        if out is None:
            return torch.mm(a, b)
        return _into(out, a, b, accumulate)
    if path == "torch" and out is not None and a.is_cuda and M * N * K > 0:  # half-precision factors, a float32 sum
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if path == "gemv" and not accumulate:
        out = a.new_empty(M, N) if out is None else out
        _gemv(rows(a), rows(b.t()), out)
        return out
    if path == "copied":
        return _copied(a, b, out, accumulate)
    if path == "transposed" and form == "nt" and not accumulate:
        return _transposed(a, b, out)
    if path in ("brgemm", "upcast"):
        return _by_tiles(a, b, out, accumulate)
    if out is None:
        return _turn(torch.mm(b.t(), a.t())) if path == "transposed" else torch.mm(a, b)
    # out = product needs the product first: by slices, so that little memory is needed for it
    for i, j in _slices(form, M, N, a.element_size()):
        part = _turn(torch.mm(b[:, j].t(), a[i].t())) if path == "transposed" else torch.mm(a[i], b[:, j])
        if accumulate:
            out[i, j] += part
        else:
            out[i, j] = part
    return out


def _slices(form: str, M: int, N: int, item: int) -> Iterator[tuple[slice, slice]]:
    """Of [M, N]: rows, or columns where these are more and leave the second operand without gaps."""
    by_rows = form != "nt" or M >= N
    long, short = (M, N) if by_rows else (N, M)
    step = max(64, _SLICE_BYTES // (item * max(short, 1)) // 64 * 64)
    for begin in range(0, long, step):
        part = slice(begin, min(begin + step, long))
        yield (part, slice(None)) if by_rows else (slice(None), part)


def _by_tiles(a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """a b by oneDNN's kernel for a tile (csrc/cpu/brgemm.cpp); float16 in float32."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    if out.stride(1) != 1 or out.dtype not in (a.dtype, torch.float32):
        product = _by_tiles(a, b, None, False)
        return out.add_(product) if accumulate else out.copy_(product)
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    _brgemm(a, b, out, accumulate)
    return out


def _into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> Tensor:
    return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)


def _copied(a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    """a b by slices of the rows of `a`, each of which is copied so that it lies one row after the other."""
    M, K = a.shape
    out = a.new_empty(M, b.shape[1]) if out is None else out
    stride = (-(-K // _REGISTER) | 1) * _REGISTER  # an odd number of cache lines: powers of two cost 5 to 8 %
    step = max(1024, _SLICE_BYTES // (2 * stride) // 64 * 64)
    buffer = a.new_empty(min(M, step), stride)
    if K % _REGISTER != 0:
        buffer[:, K:] = 0  # oneDNN multiplies them by zero: a NaN would stay one
    for begin in range(0, M, step):
        i = slice(begin, min(begin + step, M))
        copy = buffer[: i.stop - begin, :K]
        if a.stride(1) == 1:
            copy.copy_(a[i])
        else:
            _transpose(rows(a.t()[:, i]), copy)
        if out.dtype == a.dtype:
            _into(out[i], copy, b, accumulate)
        elif accumulate:
            out[i] += torch.mm(copy, b)
        else:
            out[i] = torch.mm(copy, b)
    return out


def _transposed(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """(b^T a^T)^T by slices of 4 MB, each written to its place; oneDNN keeps scratch of the same size."""
    M, N = a.shape[0], b.shape[1]
    out = a.new_empty(M, N) if out is None else out
    for i, j in _slices("nt", M, N, 2 * a.element_size()):
        _turn(torch.mm(b[:, j].t(), a[i].t()), out[i, j])
    return out


def _turn(x: Tensor, out: Tensor | None = None) -> Tensor:
    """A copy of x^T, row after row, into `out` if it is given."""
    out = x.new_empty(x.shape[1], x.shape[0]) if out is None else out
    fits = out.dtype == x.dtype and out.shape == x.t().shape and out.stride(1) == 1
    if _transpose is None or x.dtype not in _HALF or not fits:
        return out.copy_(x.t())
    _transpose(x, out)
    return out


def flat(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]: a view where strides allow, n = 0 and symbolic sizes included."""
    if x.ndim == 2:
        return x
    return x.flatten(0, -2) if x.ndim > 2 else x.unsqueeze(0)


def rows(x: Tensor) -> Tensor:
    """`x` as a kernel wants it: the last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
