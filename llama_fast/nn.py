"""Drop-in layers: RMSNorm, SwiGLU, Attention and the whole TransformerBlock. Parameter names are Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama_fast.block import BlockOptions, Cache, Weights, transformer_block
from llama_fast.block_attention import AnyCache, append, check_cache
from llama_fast.low_rank import LINEAR, LowRank, tensors
from llama_fast.ops.attention import attention
from llama_fast.ops.dispatch import NotSupported, autocast_dtype, recorded
from llama_fast.ops.linear import linear
from llama_fast.ops.rms_norm import rms_norm
from llama_fast.ops.rope import rope
from llama_fast.ops.swiglu import swiglu
from llama_fast.ops.table import check_flag, check_number
from llama_fast.parallel import Single
from llama_fast.projections import adapters_objection, addition, is_lora, projection_objection


def watched(module: nn.Module, kind: type, bias: bool = False) -> str | None:
    """What makes a call of the module another thing than the forward of `kind`; None if nothing.

    bias: the module may have one.
    """
    own = vars(module)
    if type(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__name__}"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has a hook"
    if not bias and own["_parameters"].get("bias") is not None:
        return "has a bias"
    return "has a forward of its own" if "forward" in own else None


def _lora_objection(module: Any, bias: bool) -> str | None:
    """Why a projection with adapters of PEFT's does not take part in a block, or None; bias: it may have one."""
    found = projection_objection(module, Linear)
    return "has a bias" if found is None and not bias and module.base_layer.bias is not None else found


class Linear(nn.Linear):
    """nn.Linear through the product that is fastest here (ops/linear.py), without bias where none is asked for.

    Args:
        in_features, out_features: of W [out, in].
        bias: whether a vector [out] is added, in a rounding of its own.
        device, dtype: of the parameters.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **like: Any) -> None:
        super().__init__(in_features, out_features, bias, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """`llama_fast.rms_norm` with a gain of its own.

    Args:
        dim: C.
        eps: added to the mean square.
        device, dtype: of the gain.
    """

    def __init__(self, dim: int, eps: float = 1e-5, **like: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class SwiGLU(nn.Module):
    """LLaMA's feed-forward layer: down(silu(gate(x)) * up(x)).

    Args:
        dim: C.
        ffn_dim: F.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is no positive integer.
    """

    def __init__(self, dim: int, ffn_dim: int, **like: Any) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("ffn_dim", ffn_dim)):
            check_number("SwiGLU", name, value, "a positive integer", 1, whole=True)
        self.gate_proj = Linear(dim, ffn_dim, **like)
        self.up_proj = Linear(dim, ffn_dim, **like)
        self.down_proj = Linear(ffn_dim, dim, **like)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    """LLaMA's causal self-attention with grouped heads and rotary embedding, and Mistral's, Qwen2's and Qwen3's.

    Args:
        dim: C.
        n_heads: H.
        n_kv_heads: G, divides H; None for H.
        head_dim: D; None for C / H.
        window: sliding window, None for none.
        qkv_bias: the projections of q, k and v have biases.
        qk_norm: each head's q and k have an RMSNorm before rotary.
        eps: of these norms.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is no positive integer, or does not divide what it must.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-5,
        **like: Any,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "window": window}
        for name, value in sizes.items():
            if value is not None:
                check_number("Attention", name, value, "a positive integer", 1, whole=True)
        for name, flag in (("qkv_bias", qkv_bias), ("qk_norm", qk_norm)):
            check_flag("Attention", name, flag)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads is {n_kv_heads}, expected a divisor of n_heads = {n_heads}")
        if head_dim is None and dim % n_heads:
            raise ValueError(f"n_heads is {n_heads}, expected a divisor of dim = {dim}")
        self.head_dim = dim // n_heads if head_dim is None else head_dim
        self.window, self.qkv_bias, self.qk_norm = window, qkv_bias, qk_norm
        self.q_proj = Linear(dim, n_heads * self.head_dim, qkv_bias, **like)
        self.k_proj = Linear(dim, n_kv_heads * self.head_dim, qkv_bias, **like)
        self.v_proj = Linear(dim, n_kv_heads * self.head_dim, qkv_bias, **like)
        self.o_proj = Linear(n_heads * self.head_dim, dim, **like)
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps, **like)
            self.k_norm = RMSNorm(self.head_dim, eps, **like)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: AnyCache | None = None,
    ) -> Tensor:
        """x [B, T, C], cos and sin [T, D/2] or [B, T, D/2] float32 -> [B, T, C]; see `transformer_block`."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, cos, sin)
        starts = None
        if isinstance(cache, Cache):
            check_cache(cache, x, k.shape[2], self.head_dim, k.dtype)
            starts = cache.starts
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("Attention: cu_seqlens is given beside a cache, expected one of the two")
            k, v = append(cache, k, v)
        if cu_seqlens is not None:
            if x.shape[0] != 1:
                raise ValueError(f"Attention: x has B = {x.shape[0]}, expected 1 with cu_seqlens")
            packed = (t.squeeze(0) for t in (q, k, v))
            out = attention(*packed, window=self.window, cu_seqlens=cu_seqlens).unsqueeze(0)
        elif starts is not None:
            rows = ((q[b : b + 1], k[b : b + 1, i:], v[b : b + 1, i:]) for b, i in enumerate(starts))
            out = torch.cat([attention(*row, window=self.window) for row in rows])
        else:
            out = attention(q, k, v, window=self.window)
        return self.o_proj(out.flatten(2))


class TransformerBlock(nn.Module):
    """A LLaMA block: norm, attention, norm, SwiGLU, as one function with a hand-written backward (block.py).

    Where a module within it has been replaced, changed or hooked, they are called one by one; LoRA adapters of PEFT's
    take part in the block (docs/hf.md, "LoRA").

    Args:
        dim: C.
        n_heads: H.
        ffn_dim: F.
        n_kv_heads: G, divides H; None for H.
        head_dim: D; None for C / H.
        eps: of all norms.
        policy: what is kept for the backward: "save", "recompute-cheap", "recompute-linear" or "recompute-all".
        qkv_bias, qk_norm, window: of the attention, see `Attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is no positive integer or does not divide what it must, or there is no such policy.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        ffn_dim: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        policy: str = "recompute-cheap",
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window: int | None = None,
        **like: Any,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps, **like)
        self.self_attn = Attention(
            dim, n_heads, n_kv_heads, head_dim, window, qkv_bias=qkv_bias, qk_norm=qk_norm, eps=eps, **like
        )
        self.post_attention_layernorm = RMSNorm(dim, eps, **like)
        self.mlp = SwiGLU(dim, ffn_dim, **like)
        self.options = BlockOptions(self.self_attn.head_dim, eps, policy, window or 0)
        self._window = window  # of the attention as it is built

    def weights(self) -> Weights:
        """The parameters in the order of the block function."""
        a, m = self.self_attn, self.mlp
        norms = (a.q_norm.weight, a.k_norm.weight) if a.qk_norm else (None, None)
        return Weights(
            self.input_layernorm.weight,
            a.q_proj.weight,
            a.k_proj.weight,
            a.v_proj.weight,
            a.o_proj.weight,
            self.post_attention_layernorm.weight,
            m.gate_proj.weight,
            m.up_proj.weight,
            m.down_proj.weight,
            a.q_proj.bias,
            a.k_proj.bias,
            a.v_proj.bias,
            *norms,
        )

    def added(self) -> dict[str, LowRank]:
        """What LoRA adapters of PEFT's add to the products, by the weight's name."""
        a, m = self.self_attn, self.mlp
        found = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        of = [(name, addition(p)) for name, p in zip(LINEAR, found, strict=True) if type(p) is not Linear]
        return {name: added for name, added in of if added is not None}

    def built(self) -> dict[str, tuple[str, str, type]]:
        """The modules within: path -> owner, name, class; an owner stands before what it owns."""
        return _NORMED if vars(self._modules["self_attn"]).get("qk_norm") else BUILT

    def change(self) -> str | None:
        """What within the block is not as it was built, so that its modules are called one by one; None if nothing."""
        attn = vars(self._modules["self_attn"])
        for path, (owner, name, kind) in self.built().items():
            module: Any = (vars(self._modules[owner]) if owner else vars(self))["_modules"][name]
            bias = path in BIASED and attn["qkv_bias"]
            lora = kind is Linear and is_lora(module)
            if text := _lora_objection(module, bias) if lora else watched(module, kind, bias):
                return f"{path} {text}"
            if kind is RMSNorm and vars(module)["eps"] != self.options.eps:
                return f"{path} has an eps of its own"  # not which: a compiler may hold it for variable
        return None if attn["window"] in (self._window, self.options.window) else "self_attn has a window of its own"

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: AnyCache | None = None,
    ) -> Tensor:
        """x [B, T, C], cos and sin [T, D/2] or [B, T, D/2] float32 -> [B, T, C]; see `transformer_block`."""
        o, change = self.options, self.change()
        if change is None:
            w, added = self.weights(), self.added()
            if not added or not (change := adapters_objection(added, x, recorded(x, *w, *tensors(added)))):
                return transformer_block(x, w, cos, sin, o, cu_seqlens=cu_seqlens, cache=cache, low_rank=added)
        window = o.window and o.window != getattr(self.self_attn, "window", None)  # which its attention has not
        if window or o.interleaved or o.keep_residual or type(o.collectives) is not Single:
            raise NotSupported(f"block: {change}, and modules called one by one know none of {o}")
        context: dict[str, Any] = {}
        if cu_seqlens is not None:
            context["cu_seqlens"] = cu_seqlens
        if cache is not None:
            if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
                raise ValueError("block: cache is given while gradients are recorded, expected torch.no_grad()")
            context["cache"] = cache
        dtype = autocast_dtype(x)
        x = x if dtype is None or x.dtype == torch.float64 else x.to(dtype)  # as in the block
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, **context)
        return h + self.mlp(self.post_attention_layernorm(h))


# of a plain LLaMA's block, see TransformerBlock.built
BUILT: dict[str, tuple[str, str, type]] = {
    "input_layernorm": ("", "input_layernorm", RMSNorm),
    "self_attn": ("", "self_attn", Attention),
    "self_attn.q_proj": ("self_attn", "q_proj", Linear),
    "self_attn.k_proj": ("self_attn", "k_proj", Linear),
    "self_attn.v_proj": ("self_attn", "v_proj", Linear),
    "self_attn.o_proj": ("self_attn", "o_proj", Linear),
    "post_attention_layernorm": ("", "post_attention_layernorm", RMSNorm),
    "mlp": ("", "mlp", SwiGLU),
    "mlp.gate_proj": ("mlp", "gate_proj", Linear),
    "mlp.up_proj": ("mlp", "up_proj", Linear),
    "mlp.down_proj": ("mlp", "down_proj", Linear),
}
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # where the block is built with biases
_NORMED = BUILT | {path: ("self_attn", path.rpartition(".")[2], RMSNorm) for path in HEAD_NORMS}
