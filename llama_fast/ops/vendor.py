"""PyTorch's own fused ops as the backend `torch`: launchers of the primitives, made of the aten ops behind F.*.

rms_norm: `_fused_rms_norm`. attention: on a GPU cuDNN's, FlashAttention-2 or the memory-efficient kernels, on a CPU the
flash kernel with a mask tensor. Whichever ran forward, `lse` is the natural log-sum-exp: any of them can go backward.
FlashAttention's and the efficient kernel's dq repeats bitwise only under torch.use_deterministic_algorithms.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from llama_fast.ops.reference import attention_mask

_aten = torch.ops.aten


def unavailable() -> str | None:
    """None: torch is there."""
    return None


# ---- rms_norm -------------------------------------------------------------------------------------------------------
def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _aten._fused_rms_norm(x, weight.shape, weight, eps)
    return y, rstd.view(-1)


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return _aten._fused_rms_norm_backward(dy, x, weight.shape, rstd.view(-1, 1), weight, [True, True])


# ---- attention ------------------------------------------------------------------------------------------------------
_FROM_BOTTOM_RIGHT = 2  # custom_mask_type of the efficient kernels: 0 no mask, 1 causal top left, 2 causal bottom right
# Wrong gradients of a window with fewer queries than keys: seen of torch 2.11's efficient kernel on an H200, float32.
_WINDOW_NEEDS_SQUARE = frozenset({"efficient"})
_CUDNN_DIMS = (64, 128)
_CUDNN_ROWS = 512  # shorter sequences: FlashAttention-2, which has less to set up
_LEAST_SCALE = 1e-30  # not 0 in float32


def _path(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int) -> str:
    """ "cpu", or the kernels of a GPU: "cudnn", "flash", "efficient"."""
    if q.device.type != "cuda":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    T, S, D = q.shape[1], k.shape[1], q.shape[3]
    whole = cu_seqlens is None and not window and (T == S or not causal)
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (9, 0)
    return "cudnn" if whole and hopper and D in _CUDNN_DIMS and min(T, S) >= _CUDNN_ROWS else "flash"


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _expand(x: Tensor, H: int) -> Tensor:
    """[B, S, G, D] -> [B, S, H, D]"""
    return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)


def _gather(dx: Tensor, G: int) -> Tensor:
    """[B, S, H, D] -> [B, S, G, D]: the sum over the heads that share keys, in float32."""
    B, S, H, D = dx.shape
    return dx if H == G else dx.view(B, S, G, H // G, D).sum(3, dtype=torch.float32).to(dx.dtype)


def _sequences(cu_seqlens: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(cu_seqlens.tolist()) if b > a]


def _cpu_mask(q: Tensor, k: Tensor, causal: bool, window: int) -> Tensor | None:
    """[T, S], added to the scores; None where `is_causal` or nothing says the same."""
    T, S = q.shape[1], k.shape[1]
    if not window and (T == S or not causal):
        return None
    mask = attention_mask(T, S, causal=causal, window=window, cu_seqlens=None, device=q.device)
    return q.new_zeros(T, S).masked_fill_(~mask, -torch.inf)


def _aligned(x: Tensor) -> Tensor:
    """`x` with rows of 16 bytes and their multiples apart, which a GPU's kernels take for granted."""
    step = 16 // x.element_size()
    whole = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % step == 0 for s in x.stride()[:-1])
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def upright(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """q and a scale above 0 with the same scores, and what dq is multiplied by: the vendors' kernels hide a score by
    -inf before they scale it, and take the largest product for the largest score."""
    sign = (scale > 0.0) - (scale < 0.0)
    return (q if sign == 1 else q * sign), max(abs(scale), _LEAST_SCALE), sign


def _window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    (B, T, H, _), S = q.shape, k.shape[1]
    q, scale, _ = upright(q, scale)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), q.new_full(
            (B, H, T), -torch.inf, dtype=torch.float32
        )
    causal, path = causal or window > 0, _path(q, k, cu_seqlens, causal, window)
    if cu_seqlens is None and causal and T > S:  # the first queries see no key: some kernels get these wrong
        seen = attention_fwd(q[:, T - S :], k, v, None, scale, causal, window)
        out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), seen[1].new_full((B, H, T), -torch.inf)
        out[:, T - S :], lse[:, :, T - S :] = seen
        return out, lse
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if cu_seqlens is not None and path != "flash":
        parts = [attention_fwd(q[:, s], k[:, s], v[:, s], None, scale, causal, window) for s in _sequences(cu_seqlens)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    if path == "flash":
        if cu_seqlens is None:
            out, lse, *_ = _aten._flash_attention_forward(
                q, k, v, None, None, T, S, 0.0, causal, False, scale=scale, **_window(window)
            )
        else:  # T bounds every sequence: the longest would have to be waited for
            out, lse, *_ = _aten._flash_attention_forward(
                q[0], k[0], v[0], cu_seqlens, cu_seqlens, T, S, 0.0, causal, False, scale=scale, **_window(window)
            )
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # its mark of a row without keys
    elif path == "cudnn":
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, causal, False, scale=scale
        )
        out, lse = out.transpose(1, 2), lse.view(B, H, T)
    elif path == "efficient":
        out, lse, *_ = _aten._efficient_attention_forward(
            q, _expand(k, H), _expand(v, H), None, None, None, T, S, 0.0, _FROM_BOTTOM_RIGHT if causal else 0, True,
            scale=scale, window_size=window or None,
        )  # fmt: skip
        lse = lse[..., :T]  # it is padded to a multiple of 32 queries
    else:
        mask = _cpu_mask(q, k, causal, window)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(q, _expand(k, H), _expand(v, H)), 0.0, causal and mask is None, attn_mask=mask, scale=scale
        )
        out = out.transpose(1, 2)
    return out.contiguous(), lse.contiguous()


def _bwd_square(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, window: int
) -> tuple[Tensor, ...]:
    """attention_bwd of T < S with a window as one of as many queries as keys: without the keys that nobody sees, and
    with queries before the first, whose weights are zero."""
    T, S = q.shape[1], k.shape[1]
    unseen = max(0, S - T - window + 1)
    more = S - unseen - T

    def before(x: Tensor, rows: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, rows, 0))

    lse = torch.nn.functional.pad(lse, (more, 0), value=-torch.inf)
    dout, q, out = before(dout, more), before(q, more), before(out, more)
    dq, dk, dv = attention_bwd(dout, q, k[:, unseen:], v[:, unseen:], out, lse, None, scale, causal, window)
    return dq[:, more:].contiguous(), before(dk, unseen), before(dv, unseen)


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
    (_, T, H, _), (_, S, G, _) = q.shape, k.shape
    if scale < _LEAST_SCALE:
        q, scale, sign = upright(q, scale)
        dq, dk, dv = attention_bwd(dout, q, k, v, out, lse, cu_seqlens, scale, causal, window)
        return dq * sign, dk, dv
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    causal, path = causal or window > 0, _path(q, k, cu_seqlens, causal, window)
    if cu_seqlens is None and causal and T > S:
        last = slice(T - S, None)
        seen = attention_bwd(
            dout[:, last], q[:, last], k, v, out[:, last], lse[:, :, last], None, scale, causal, window
        )
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
        dq[:, T - S :] = seen[0]
        return dq, seen[1], seen[2]
    if path in _WINDOW_NEEDS_SQUARE and cu_seqlens is None and window and T < S:
        return _bwd_square(dout, q, k, v, out, lse, scale, causal, window)
    dout, q, k, v, out = _aligned(dout), _aligned(q), _aligned(k), _aligned(v), _aligned(out)
    if cu_seqlens is not None and path != "flash":
        found = [
            attention_bwd(
                *(dout[:, s], q[:, s], k[:, s], v[:, s], out[:, s], lse[:, :, s]), None, scale, causal, window
            )
            for s in _sequences(cu_seqlens)
        ]
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # e^(score - lse) is 0 in a row without keys
    seed, offset = (
        torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)
    )  # of the dropout that is not used
    if path == "flash":
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        packed = cu_seqlens is not None
        tensors = [x[0] if packed else x for x in (dout, q, k, v, out, lse)]
        found = _aten._flash_attention_backward(
            *tensors, cu_seqlens, cu_seqlens, T, S, 0.0, causal, rng, seed, scale=scale, **_window(window)
        )
        dq, dk, dv = (x.unsqueeze(0) if packed else x for x in found)
    elif path == "cudnn":
        dq, dk, dv = _heads_first(
            *_aten._scaled_dot_product_cudnn_attention_backward(
                *_heads_first(dout, q, k, v, out), lse.unsqueeze(-1), seed, offset, None, None, None, T, S, 0.0, causal,
                scale=scale,
            )
        )  # fmt: skip
    elif path == "efficient":
        lse = torch.nn.functional.pad(lse, (0, -T % 32), value=torch.inf)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            dout, q, _expand(k, H), _expand(v, H), None, out, None, None, T, S, lse, 0.0, seed, offset,
            _FROM_BOTTOM_RIGHT if causal else 0, False, scale=scale, window_size=window or None,
        )  # fmt: skip
    else:
        mask = _cpu_mask(q, k, causal, window)
        dq, dk, dv = _heads_first(
            *_aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(dout, q, _expand(k, H), _expand(v, H), out), lse, 0.0, causal and mask is None,
                attn_mask=mask, scale=scale,
            )
        )  # fmt: skip
    return dq.contiguous(), _gather(dk, G).contiguous(), _gather(dv, G).contiguous()
