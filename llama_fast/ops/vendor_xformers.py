"""xFormers' memory_efficient_attention as the backend `xformers`, where it is installed: launchers of the primitives.

Written against the `fmha` of xFormers 0.0.30 to 0.0.35 and tested with a stand-in of that interface; `make test-gpu`
runs it where xFormers is installed. As many keys as queries or more, no window, no packed sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_fast.ops.vendor import _aligned, upright

_logger = logging.getLogger("xformers")
_level, _problem = _logger.level, ""
_logger.setLevel(logging.ERROR)  # what it would warn of while it is imported is what `unavailable` gives as a reason
try:
    import xformers
    from xformers.ops import fmha
except ImportError as error:  # for example a flash-attn that it does not take
    if error.name == "xformers":
        raise
    _problem = f"xFormers cannot be imported: {(str(error).splitlines() or [''])[0]}"
finally:
    _logger.setLevel(_level)


def unavailable() -> str | None:
    """Why its kernels cannot be used in this process, or None."""
    if not _problem and not getattr(xformers, "_has_cpp_library", True):
        # what it tells is two other errors: the first one names a library or symbol, such as an older CUDA's runtime
        error = getattr(getattr(xformers, "_cpp_lib", None), "_cpp_library_load_exception", None)
        while error is not None and error.__cause__ is not None:
            error = error.__cause__
        first = (str(error or "").splitlines() or [""])[0] or "python -m xformers.info"
        return (
            f"xFormers {xformers.__version__}: its kernels cannot be loaded beside torch {torch.__version__}: {first}"
        )
    return _problem or None


def objection(dims: Mapping[str, Any], dtype: torch.dtype, device: str) -> str | None:
    """What xFormers' own operators object to attention of these sizes, forward or backward, or None."""
    row = torch.empty(dims["D"], dtype=dtype, device=device)  # the checks read shapes and strides
    q, k = (row.expand(dims["B"], dims[length], dims["H"], dims["D"]) for length in ("T", "S"))
    inputs = fmha.Inputs(q, k, k, attn_bias=_mask(bool(dims.get("causal", True))), scale=1.0)
    families = ("ck",) if torch.version.hip else ("flash3", "flash", "cutlass")
    for kind, direction in (("FwOp", "forward"), ("BwOp", "backward")):
        reasons = {name: getattr(fmha, name) for name in families if hasattr(fmha, name)}
        reasons = {name: getattr(family, kind).not_supported_reasons(inputs) for name, family in reasons.items()}
        if all(reasons.values()):
            texts = [f"{name}: {'; '.join(found)}" for name, found in reasons.items()]
            return f"xFormers has no {direction} operator for this ({' | '.join(texts)})"
    return None


def _mask(causal: bool) -> Any:
    return fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None


def _expand(x: Tensor, H: int) -> Tensor:
    """[B, S, G, D] -> [B, S, H, D]"""
    return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    T, H = q.shape[1:3]
    q, scale, _ = upright(q, scale)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, _expand(k, H), _expand(v, H), attn_bias=_mask(causal), scale=scale
    )
    return out.contiguous(), lse[..., :T].contiguous()  # it may be padded to a multiple of 32 queries


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, ...]:
    (B, S, G, D), H = k.shape, q.shape[2]
    q, scale, sign = upright(q, scale)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        dout.contiguous(), out, lse, q, _expand(k, H), _expand(v, H), attn_bias=_mask(causal), scale=scale
    )
    if G != H:  # the sum over the heads that share keys, in float32
        dk, dv = (x.view(B, S, G, H // G, D).sum(3, dtype=torch.float32).to(k.dtype) for x in (dk, dv))
    dq = dq if sign == 1 else dq * sign
    return dq.contiguous(), dk.contiguous(), dv.contiguous()
