"""Every op in plain PyTorch: the truth of the tests in float64, and the backend that runs everywhere.

The functions named as the ops are differentiable and say what an op means, with no thought of speed; half precision is
computed in float32 and rounded once. The `reference` backend's primitives are made of them; a backward is written out,
since autograd does not record within a registered op.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable() -> str | None:
    """None: the reference runs wherever torch does."""
    return None


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- rms_norm, add_rms_norm -----------------------------------------------------------------------------------------
def _rstd(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., C], weight [C] -> x (mean_c x^2 + eps)^(-1/2) weight, in the dtype of x."""
    x_up = _up(x)
    return (x_up * _rstd(x_up, eps) * _up(weight)).to(x.dtype)


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, eps), _rstd(_up(x), eps).squeeze(-1)


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dy_up, x_hat = _up(dy), _up(x) * rstd.unsqueeze(-1)
    dx_hat = dy_up * _up(weight)
    dx = (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return dx.to(x.dtype), (dy_up * x_hat).sum(0).to(weight.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x, residual [..., C], weight [C] -> rms_norm(x + residual), x + residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + residual
    y, rstd = rms_norm_fwd(total, weight, eps)
    return y, total, rstd


def add_rms_norm_bwd(dy: Tensor, dsum: Tensor, sum: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = rms_norm_bwd(_up(dy), _up(sum), weight, rstd)
    return (dx + dsum).to(sum.dtype), dweight


# ---- swiglu ---------------------------------------------------------------------------------------------------------
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return (torch.nn.functional.silu(_up(gate)) * _up(up)).to(gate.dtype)


def swiglu_fwd(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (swiglu(gate, up),)


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    dy, g, u = _up(dy), _up(gate), _up(up)
    s = torch.sigmoid(g)
    return (dy * u * s * (1 + g * (1 - s))).to(gate.dtype), (dy * g * s).to(up.dtype)


# ---- rope -----------------------------------------------------------------------------------------------------------
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x_up = _up(x)
    a, b = (x_up[..., 0::2], x_up[..., 1::2]) if interleaved else x_up.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return turned.to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Turns each pair of q [B,T,H,D] and k [B,T,G,D] by the angle whose cos, sin are [T,D/2] or [B,T,D/2]."""
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin, interleaved=interleaved)


def rope_bwd(dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return rope(dq_out, dk_out, cos, -sin, interleaved=interleaved)  # a rotation's transpose turns back


# ---- attention ------------------------------------------------------------------------------------------------------
def attention_mask(
    T: int, S: int, *, causal: bool, window: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """[T, S] bool, True where query i sees key j."""
    i = torch.arange(T, device=device).unsqueeze(1) + (S - T)  # aligned bottom right
    j = torch.arange(S, device=device).unsqueeze(0)
    mask = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        mask &= j <= i
    if window > 0:
        mask &= (j <= i) & (j > i - window)
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(T, device=device), cu_seqlens[1:], right=True)
        mask &= sequence.unsqueeze(1) == sequence.unsqueeze(0)
    return mask


def _by_head(x: Tensor, H: int) -> Tensor:
    """[B, T, G, D] -> [B, H, T, D], each head G for the H/G that share it."""
    # float32 inputs in float64: rounded scores of 4 and more would move the weights by several units in the last place
    wide = torch.float64 if x.dtype in (torch.float32, torch.float64) else torch.float32
    return x.to(wide).transpose(1, 2).repeat_interleave(H // max(x.shape[2], 1), dim=1)


def _weights(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, T, S] and log-sum-exp [B, H, T] of the scores."""
    q_BHTD, k_BHSD = (_by_head(x, q.shape[2]) for x in (q, k))
    mask = attention_mask(q.shape[1], k.shape[1], causal=causal, window=window, cu_seqlens=cu_seqlens, device=q.device)
    scores = (q_BHTD @ k_BHSD.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    sees = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~sees, 0.0)
    weights = torch.where(mask, scores.softmax(-1), 0.0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True) if k.shape[1] else scores.sum(-1, True)
    return weights, torch.where(sees, lse, -torch.inf).squeeze(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The public attention with the whole [T, S] matrix; packed inputs [R, H, D] too."""
    packed = q.ndim == 3
    if packed:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = attention_fwd(q, k, v, cu_seqlens, scale, causal, window or 0)
    return out.squeeze(0) if packed else out


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    weights, lse = _weights(q, k, cu_seqlens, scale, causal, window)
    out = (weights @ _by_head(v, q.shape[2])).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse if q.dtype == torch.float64 else lse.float()


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
    H = q.shape[2]
    p, _ = _weights(q, k, cu_seqlens, scale, causal, window)
    q_BHTD, k_BHSD, v_BHSD, dout_BHTD = (_by_head(x, H) for x in (q, k, v, dout))
    dp = dout_BHTD @ v_BHSD.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale

    def summed(dx_BHSD: Tensor, x: Tensor) -> Tensor:
        """Over the heads that share one of x, in its shape and dtype."""
        B, S, G, D = x.shape
        return dx_BHSD.view(B, G, H // max(G, 1), S, D).sum(2).transpose(1, 2).to(x.dtype).contiguous()

    return (
        summed(ds @ k_BHSD, q),
        summed(ds.transpose(-1, -2) @ q_BHTD, k),
        summed(p.transpose(-1, -2) @ dout_BHTD, v),
    )


# ---- linear_cross_entropy -------------------------------------------------------------------------------------------
def _cross_entropy_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits = _up(hidden) @ _up(weight).T
    lse = torch.logsumexp(logits, dim=-1)
    counts = targets != ignore_index
    true = logits.gather(1, targets.where(counts, 0).unsqueeze(1)).squeeze(1)
    loss = lse - (1.0 - label_smoothing) * true
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    return torch.where(counts, loss + z_loss * lse.square(), 0.0), lse


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden weight^T, targets) with all logits: hidden [..., C], weight [V, C], targets [...] int64."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    loss, _ = _cross_entropy_rows(rows, weight, flat, ignore_index, label_smoothing, z_loss)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() / (flat != ignore_index).sum() if reduction == "mean" else loss.sum()


def linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wants_dhidden: bool,
    wants_dweight: bool,
) -> tuple[Tensor, ...]:
    loss, lse = _cross_entropy_rows(hidden, weight, targets, ignore_index, label_smoothing, z_loss)
    if row_scale is None:
        return loss, lse, hidden.new_empty(0), weight.new_empty(0)
    options = (ignore_index, label_smoothing, z_loss, wants_dhidden, wants_dweight)
    return loss, lse, *linear_cross_entropy_bwd(row_scale, hidden, weight, targets, *options)


def linear_cross_entropy_bwd(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wants_dhidden: bool,
    wants_dweight: bool,
) -> tuple[Tensor, ...]:
    h, w, V = _up(hidden), _up(weight), weight.shape[0]
    logits, counts = h @ w.T, targets != ignore_index
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    # not exp(logits - lse): lse rounded to float32 makes a whole row's probabilities err alike, by up to |lse| 2^-24
    dlogits = logits.softmax(dim=-1) * (1.0 + 2.0 * z_loss * lse) - label_smoothing / max(V, 1)
    true = targets.where(counts, 0).unsqueeze(1)
    dlogits = dlogits.scatter_add(1, true, dlogits.new_full(true.shape, label_smoothing - 1.0))
    dlogits = torch.where(counts.unsqueeze(1), dlogits * _up(dloss).unsqueeze(1), 0.0)
    dhidden = (dlogits @ w).to(hidden.dtype) if wants_dhidden else hidden.new_empty(0)
    return dhidden, (dlogits.T @ h).to(weight.dtype) if wants_dweight else weight.new_empty(0)
