"""Who can compute an op: ours by backend, PyTorch in its several ways, and the libraries that people would pick.

A provider is a function with the public function's arguments. One that is not installed, or cannot take a case, says
why. Layouts are ours ([B, T, H, D]); a library that wants another is given a view, so that no copy is counted as its
time unless it makes one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llama_fast
from llama_fast.ops import dispatch, eager
from llama_fast.ops.table import OPS, Backend
from llama_fast.verify import Case

from .results import OURS, is_ours

_NOT_OURS = ("reference", "torch", "xformers")  # backends without a kernel of ours: the truth, and others' own ops


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Args:
        name: as in result files.
        call: takes the public function's arguments.
        module: what must be importable, else "".
        package: what to install for it.
        device: the only one that it runs on, else "".
        limit: case and dtype -> why it cannot take them, or None.
        slow: left out of a quick run.
    """

    name: str
    call: Callable[..., Any]
    module: str = ""
    package: str = ""
    device: str = ""
    limit: Callable[[Case, torch.dtype], str | None] = lambda case, dtype: None
    slow: bool = True

    @property
    def ours(self) -> bool:
        return is_ours(self.name)

    def objection(self, case: Case, dtype: torch.dtype, device: str) -> str | None:
        """Why it cannot run this case here, or None."""
        if self.device and device != self.device:
            return f"runs on {self.device} only"
        if self.module and not _installed(self.module):
            return f"not installed: pip install {self.package}"
        return self.limit(case, dtype)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package around it
        return False


def sizes(case: Case) -> dict[str, int]:
    """Size of each letter, the leading dimensions as rows R."""
    return {"R" if n == "..." else n: math.prod(size) if n == "..." else size for n, size in case.dims.items()}


def of(op: str, device: str, compiler: str = "inductor") -> list[Provider]:
    """All providers of an op, ours first; `compiler`: torch.compile's backend."""
    backends = {b.name: b for b in OPS[op].backends if b.device in (None, device)}
    found = [_forced(op, b, device) for name, b in backends.items() if name not in _NOT_OURS]
    found.append(Provider("eager", getattr(eager, op), limit=_no_window, slow=False))
    if device == "cuda" and "torch" in backends:  # the measure of llama_fast/ops/proven.json
        found.append(dataclasses.replace(_forced(op, backends["torch"], device), name="torch"))
    if device != "cuda" or op != "attention":  # there it is eager's call again
        found.append(Provider("torch.compile", _compiled(op, compiler), limit=_no_window))
    return [*found, *_PEERS.get(op, lambda: iter(()))()]


def _no_window(case: Case, dtype: torch.dtype) -> str | None:
    return "takes a window as a mask of T x S numbers" if case.options.get("window") else None


def _forced(op: str, b: Backend, device: str) -> Provider:
    function = getattr(llama_fast, op)

    def call(**arguments: Any) -> Any:
        with dispatch.backend(b.name):
            return function(**arguments)

    def limit(case: Case, dtype: torch.dtype) -> str | None:
        return dispatch.objection(b, {**sizes(case), **case.options}, dtype, device)

    return Provider(f"{OURS}:{b.name}", call, limit=limit, slow=False)


@functools.cache
def _compiled(op: str, compiler: str) -> Callable[..., Any]:
    function = torch.compile(getattr(eager, op), dynamic=False, backend=compiler)

    def call(**arguments: Any) -> Any:
        return function(**arguments)

    return call


# ---- norms and feed-forward -----------------------------------------------------------------------------------------
@functools.cache
def _norm_module(dim: int, eps: float) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with torch.device("meta"):
        return LlamaRMSNorm(dim, eps)


def _their_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.func.functional_call(_norm_module(weight.shape[0], eps), {"weight": weight}, (x,))


def _rms_norm_peers() -> Iterator[Provider]:
    def liger(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, eps)  # its backward writes over the incoming gradient

    def flash(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        from flash_attn.ops.triton.layer_norm import rms_norm_fn

        return rms_norm_fn(x, weight, None, eps=eps)

    def transformers(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return _their_norm(x, weight, eps)

    yield Provider("transformers", transformers, "transformers", "transformers")
    yield Provider("liger", liger, "liger_kernel", "liger-kernel", "cuda")
    yield Provider("flash-attn", flash, "flash_attn.ops", "flash-attn", "cuda")


def _add_rms_norm_peers() -> Iterator[Provider]:
    def liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)

    def flash(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        from flash_attn.ops.triton.layer_norm import rms_norm_fn

        return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)

    def transformers(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        total = x + residual
        return _their_norm(total, weight, eps), total

    yield Provider("transformers", transformers, "transformers", "transformers")
    yield Provider("liger", liger, "liger_kernel", "liger-kernel", "cuda")
    yield Provider("flash-attn", flash, "flash_attn.ops", "flash-attn", "cuda")


def _swiglu_peers() -> Iterator[Provider]:
    def liger(gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(gate, up)  # its backward writes over gate and up

    def flash(gate: Tensor, up: Tensor) -> Tensor:
        from flash_attn.ops.activations import swiglu

        return swiglu(gate, up)

    yield Provider("liger", liger, "liger_kernel", "liger-kernel", "cuda")
    yield Provider("flash-attn", flash, "flash_attn.ops", "flash-attn", "cuda")


# ---- rotary ---------------------------------------------------------------------------------------------------------
def _halves_only(case: Case, dtype: torch.dtype) -> str | None:
    return "turns halves, not interleaved pairs" if case.options.get("interleaved") else None


def _doubled(table: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat((table, table), dim=-1).unsqueeze(0).to(dtype)


def _rope_peers() -> Iterator[Provider]:
    def transformers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = _doubled(cos, q.dtype), _doubled(sin, q.dtype)
        q_BHTD, k_BGTD = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.rope import LigerRopeFunction

        cos, sin = _doubled(cos, q.dtype), _doubled(sin, q.dtype)
        # it writes over q and k, its backward over the incoming gradients
        q_BHTD, k_BGTD = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)

    def flash(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        from flash_attn.layers.rotary import apply_rotary_emb

        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return apply_rotary_emb(q, cos, sin, interleaved), apply_rotary_emb(k, cos, sin, interleaved)

    yield Provider("transformers", transformers, "transformers", "transformers", limit=_halves_only, slow=False)
    yield Provider("liger", liger, "liger_kernel", "liger-kernel", "cuda", _halves_only)
    yield Provider("flash-attn", flash, "flash_attn.ops", "flash-attn", "cuda")


# ---- attention ------------------------------------------------------------------------------------------------------
def _square_causal(case: Case, dtype: torch.dtype) -> str | None:
    if case.dims.get("T") != case.dims.get("S") or case.options or "B" not in case.dims:
        return "its is_causal says only a causal square without options"
    return None


def _sdpa(backend: SDPBackend, repeat: bool) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        if grouped and repeat:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped and not repeat)
        return out.transpose(1, 2)

    return call


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped heads with k and v repeated: the way to PyTorch's fused kernel where enable_gqa takes the plain one."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


def _grouped_square(case: Case, dtype: torch.dtype) -> str | None:
    if case.dims["H"] == case.dims["G"]:
        return "the same as eager: no grouped heads"
    return _square_causal(case, dtype)


def _half_only(case: Case, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else "takes bfloat16 and float16 only"


_FLASH_SOURCE = "git+https://github.com/Dao-AILab/flash-attention"


def _all_weights(case: Case, dtype: torch.dtype) -> str | None:
    if math.prod(case.dims.get(n, 1) for n in "BHTS") > 1 << 29:
        return "holds the weights of all heads at once: several GB"
    return _square_causal(case, dtype)


def _attention_peers() -> Iterator[Provider]:
    def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

        H, G = q.shape[2], k.shape[2]
        bias = LowerTriangularFromBottomRightMask()
        if H == G:
            return memory_efficient_attention(q, k, v, attn_bias=bias)
        q = q.unflatten(2, (G, H // G))  # its grouped form: [B, T, G, H/G, D]
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, H // G, -1) for x in (k, v))
        return memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2, 3)

    def flash(module: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int | None = None) -> Tensor:
        more = {"window_size": (window - 1, 0)} if window else {}
        out = importlib.import_module(module).flash_attn_func(q, k, v, causal=causal, **more)
        return out[0] if isinstance(out, tuple) else out  # FlashAttention 3 and 4 give the log-sum-exp too

    def xformers_limit(case: Case, dtype: torch.dtype) -> str | None:
        (b,) = (b for b in OPS["attention"].backends if b.name == "xformers")
        return dispatch.objection(b, {**sizes(case), "causal": True, "window": 0, **case.options}, dtype, "cuda")

    sdpa = SDPBackend
    yield Provider("sdpa:math", _sdpa(sdpa.MATH, False), limit=_all_weights)
    yield Provider("sdpa:flash", _sdpa(sdpa.FLASH_ATTENTION, True), limit=_square_causal)
    yield Provider("sdpa:efficient", _sdpa(sdpa.EFFICIENT_ATTENTION, True), device="cuda", limit=_square_causal)
    yield Provider("sdpa:cudnn", _sdpa(sdpa.CUDNN_ATTENTION, False), device="cuda", limit=_square_causal)
    yield Provider("sdpa_repeated", _repeated, limit=_grouped_square, slow=False)
    yield Provider("xformers", xformers, "xformers", "xformers", "cuda", xformers_limit)
    for name, module, package in (
        ("flash-attn", "flash_attn.flash_attn_interface", "flash-attn"),
        ("flash-attn-3", "flash_attn_interface", f"{_FLASH_SOURCE}#subdirectory=hopper"),
        ("flash-attn-4", "flash_attn.cute", "flash-attn-4"),
    ):
        yield Provider(name, functools.partial(flash, module), module, package, "cuda", _half_only)


# ---- the head -------------------------------------------------------------------------------------------------------
def _linear_cross_entropy_peers() -> Iterator[Provider]:
    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        flat = hidden.reshape(-1, hidden.shape[-1])
        return LigerFusedLinearCrossEntropyFunction.apply(flat, weight, targets.reshape(-1))[0]

    def no_options(case: Case, dtype: torch.dtype) -> str | None:
        return f"called without {', '.join(case.options)}" if case.options else None

    yield Provider("liger", liger, "liger_kernel", "liger-kernel", "cuda", no_options)


_PEERS: dict[str, Callable[[], Iterator[Provider]]] = {
    "rms_norm": _rms_norm_peers,
    "add_rms_norm": _add_rms_norm_peers,
    "swiglu": _swiglu_peers,
    "rope": _rope_peers,
    "attention": _attention_peers,
    "linear_cross_entropy": _linear_cross_entropy_peers,
}
