"""The same LLaMA in plain PyTorch and autograd: the yardstick of the tests, the demo and the benchmarks.

Every line is what one writes without this library: F.linear, F.rms_norm, F.scaled_dot_product_attention, F.silu,
F.cross_entropy. Any dtype, float64 included. Parameter names are those of Hugging Face's LlamaModel without the leading
`model.`, and those of `llama_fast.Llama`, so that state_dicts are exchangeable; rotary turns Hugging Face's halves.

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.ops.dispatch import readable

INIT_STD = 0.02
_RESIDUAL = ("o_proj.weight", "down_proj.weight")  # the projections that write into the residual stream


def init_weights_(model: nn.Module, n_layers: int, seed: int = 0) -> None:
    """Fill the parameters of a LLaMA in place: gains one, biases zero, matrices normal.

    Standard deviation 0.02, and 0.02 / sqrt(2 * n_layers) for the two projections that write into the residual stream
    (GPT-2's rule). Drawn in float32 on the CPU from a generator of its own, in order of parameter name, then rounded to
    the parameter's dtype: two models of equal parameter names get equal weights, whatever their device.

    Args:
        model: a module whose one-dimensional parameters are norm gains, or biases and called so.
        n_layers: its number of blocks.
        seed: of the generator; torch's global generator is not touched.

    Raises:
        ValueError: a parameter is still on the meta device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device: expected storage; call to_empty(device=...) first")
        with torch.no_grad():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = INIT_STD / (2 * n_layers) ** 0.5 if name.endswith(_RESIDUAL) else INIT_STD
            p.copy_(torch.empty(p.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator))


def check_tokens(config: LlamaConfig, tokens: Tensor) -> None:
    """Raise unless `tokens` is [B, T] int64 with T <= max_seq_len and, where looking is free (the CPU), ids below V.

    Raises:
        ValueError: names what differs.
    """
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens is a {type(tokens).__name__}: expected a torch.Tensor")
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is {tuple(tokens.shape)} {tokens.dtype}: expected [B, T] torch.int64")
    if tokens.shape[1] > config.max_seq_len:
        raise ValueError(f"tokens has T = {tokens.shape[1]}: expected at most max_seq_len = {config.max_seq_len}")
    if readable(tokens) and tokens.numel():
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"tokens holds ids {low} .. {high}: expected 0 .. {config.vocab_size - 1}")


def check_targets(config: LlamaConfig, tokens: Tensor, targets: Tensor, ignore_index: int = -100) -> None:
    """Raise unless `targets` has the shape of `tokens`, int64 and, on the CPU, ids below V or `ignore_index`.

    Raises:
        ValueError: names what differs.
    """
    for name, x in (("tokens", tokens), ("targets", targets)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a torch.Tensor")
    if targets.shape != tokens.shape or targets.dtype != torch.int64:
        expected = f"{tuple(tokens.shape)} torch.int64, as tokens"
        raise ValueError(f"targets is {tuple(targets.shape)} {targets.dtype}: expected {expected}")
    if readable(targets):
        bad = targets[((targets < 0) | (targets >= config.vocab_size)) & (targets != ignore_index)]
        if bad.numel():
            expected = f"0 .. {config.vocab_size - 1} or {ignore_index}"
            raise ValueError(f"targets holds the id {int(bad[0])}: expected {expected}")


class PlainLlama(nn.Module):
    """A LLaMA in plain PyTorch.

    Args:
        config: its sizes.
        device: of the parameters; "meta" costs no memory and draws no weights.
        dtype: of the parameters; the default is torch's.

    Weights are drawn by `reset_parameters(0)`. `lm_head.weight` is `embed_tokens.weight` when the config ties them.
    """

    def __init__(
        self, config: LlamaConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_tokens = _Embedding(config.vocab_size, config.dim, **like)
        self.layers = nn.ModuleList(_Block(config, like) for _ in range(config.n_layers))
        self.norm = _RMSNorm(config.dim, config, like)
        self.lm_head = _Linear(config.dim, config.vocab_size, bias=False, **like)
        self._tie()
        if not self.embed_tokens.weight.is_meta:
            self.reset_parameters(0)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PlainLlama:
        super()._apply(fn, recurse)
        self._tie()  # to_empty gives each name a storage of its own
        return self

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw new weights, see `init_weights_`."""
        init_weights_(self, self.config.n_layers, seed)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normalised last hidden states [B, T, C] of `tokens` [B, T] int64."""
        check_tokens(self.config, tokens)
        x = self.embed_tokens(tokens)
        cos, sin = rope_cos_sin(self.config, tokens.shape[1], tokens.device)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V], in the dtype of the parameters, of `tokens` [B, T] int64.

        Raises:
            ValueError: shape, dtype, length or (on the CPU) ids of `tokens`.
        """
        return self.lm_head(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -100; the softmax in float32 or wider.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64, the next token at each place, or -100 to leave it out.

        Returns:
            A scalar, float32 (float64 for a float64 model).

        Raises:
            ValueError: shape, dtype, length or (on the CPU) ids of `tokens` or `targets`.
        """
        check_targets(self.config, tokens, targets)
        logits = self(tokens).flatten(0, 1)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: the model draws all weights at once."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: the model draws all weights at once."""


class _RMSNorm(nn.Module):
    def __init__(self, dim: int, config: LlamaConfig, like: dict[str, Any]) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(dim, **like))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig, like: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.window = config.window
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = _Linear(config.dim, q_dim, bias=config.qkv_bias, **like)
        self.k_proj = _Linear(config.dim, kv_dim, bias=config.qkv_bias, **like)
        self.v_proj = _Linear(config.dim, kv_dim, bias=config.qkv_bias, **like)
        self.o_proj = _Linear(q_dim, config.dim, bias=False, **like)
        self.q_norm = _RMSNorm(config.head_dim, config, like) if config.qk_norm else None
        self.k_norm = _RMSNorm(config.head_dim, config, like) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mask: dict[str, Any] = {"is_causal": True}
        if self.window is not None:  # query i sees the keys j with i - window < j <= i
            T = x.shape[1]
            seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
            mask = {"attn_mask": seen}
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig, like: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj = _Linear(config.dim, config.ffn_dim, bias=False, **like)
        self.up_proj = _Linear(config.dim, config.ffn_dim, bias=False, **like)
        self.down_proj = _Linear(config.ffn_dim, config.dim, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig, like: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = _RMSNorm(config.dim, config, like)
        self.self_attn = _Attention(config, like)
        self.post_attention_layernorm = _RMSNorm(config.dim, config, like)
        self.mlp = _MLP(config, like)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, H, T, D] turned by the angles [T, D/2]: the pair of channel i is i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
