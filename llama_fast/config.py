"""The shape of a LLaMA: its sizes, the published presets, its parameter and flop counts, its rotary tables.

Legend: B batch, T tokens, C dim, F ffn_dim, H n_heads, G n_kv_heads, D head_dim, V vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearRopeScaling:
    """Position interpolation: every rotary frequency divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive("rope_scaling.factor", self.factor)

    def scale(self, freqs: Tensor) -> Tensor:
        """Scaled frequencies of `freqs` [D/2] float64, in radians a token."""
        return freqs / self.factor


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between.

    A wavelength is long above `original_max_seq_len / low_freq_factor` and short below
    `original_max_seq_len / high_freq_factor`. Source: Meta's `apply_scaling` in llama_models, Llama 3.1.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _check_positive("rope_scaling.factor", self.factor)
        _check_positive("rope_scaling.low_freq_factor", self.low_freq_factor)
        _check_count("rope_scaling.original_max_seq_len", self.original_max_seq_len)
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor = {self.high_freq_factor}: expected more than "
                f"low_freq_factor = {self.low_freq_factor}"
            )

    def scale(self, freqs: Tensor) -> Tensor:
        """Scaled frequencies of `freqs` [D/2] float64, in radians a token."""
        turns = self.original_max_seq_len * freqs / (2 * math.pi)  # full turns within the original context
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return keep * freqs + (1 - keep) * freqs / self.factor


RopeScaling = LinearRopeScaling | Llama3RopeScaling
_SCALINGS: dict[str, type[LinearRopeScaling] | type[Llama3RopeScaling]] = {
    "linear": LinearRopeScaling,
    "llama3": Llama3RopeScaling,
}


_MOST_LAYERS = 100_000  # a damaged file's number: the names of so many layers' tensors alone would not end


@dataclass(frozen=True)
class LlamaConfig:
    """All sizes of one LLaMA, or of a Mistral, Qwen2 or Qwen3; immutable, checked when built.

    Args:
        dim: C, the width of the residual stream.
        n_layers: transformer blocks.
        n_heads: H, query heads; divides dim unless explicit_head_dim is given.
        n_kv_heads: G, key/value heads; divides n_heads.
        ffn_dim: F, the width of the SwiGLU.
        vocab_size: V.
        max_seq_len: the longest sequence that the model takes.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: None, `LinearRopeScaling` or `Llama3RopeScaling`.
        tie_embeddings: the output projection is the embedding.
        explicit_head_dim: D where it is not dim / n_heads.
        qkv_bias: the projections of q, k and v have biases, as Qwen2's.
        qk_norm: each head's q and k have an RMSNorm before rotary, with norm_eps, as Qwen3's.
        window: a token sees this many of the last tokens, itself among them, as a Mistral's; None for all.

    Use `dataclasses.replace(config, vocab_size=...)` for a variant.

    Raises:
        ValueError: names the field, its value and what was expected.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    explicit_head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_seq_len"):
            _check_count(name, getattr(self, name))
        if self.n_layers > _MOST_LAYERS:
            raise ValueError(f"n_layers = {self.n_layers}: expected at most {_MOST_LAYERS}")
        _check_positive("norm_eps", self.norm_eps)
        _check_positive("rope_theta", self.rope_theta)
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, LinearRopeScaling | Llama3RopeScaling):
            raise ValueError(
                f"rope_scaling = {self.rope_scaling!r}: expected None, LinearRopeScaling or Llama3RopeScaling"
            )
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected True or False")
        for name in ("explicit_head_dim", "window"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.explicit_head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads}: expected a divisor of dim = {self.dim}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads = {self.n_kv_heads}: expected a divisor of n_heads = {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: expected an even number, rotary turns pairs")

    @property
    def head_dim(self) -> int:
        """D: dim / n_heads, or explicit_head_dim."""
        return self.explicit_head_dim or self.dim // self.n_heads

    @property
    def n_params(self) -> int:
        """Parameters; a tied embedding counts once."""
        norms = (2 * self.n_layers + 1) * self.dim
        biases = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim if self.qkv_bias else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.dim
        return self.n_matmul_params + norms + self.n_layers * (biases + head_norms) + embedding

    @property
    def n_matmul_params(self) -> int:
        """Parameters that multiply every token: all matrices and the output projection, not the embedding or norms."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        ffn = 3 * self.dim * self.ffn_dim
        return self.n_layers * (attention + ffn) + self.vocab_size * self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """Model flops of forward and backward for one token of a sequence of `seq_len`.

            6 * n_matmul_params + 12 * n_layers * n_heads * head_dim * seq_len

        The second term is QK^T and PV over all T keys, three times (forward, and twice in the backward): by PaLM's
        convention the masked half counts, and recomputation does not, so that figures compare across papers. Of a
        window it is the window's keys that count.
        Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
        """
        keys = min(seq_len, self.window or seq_len)
        return 6 * self.n_matmul_params + 12 * self.n_layers * self.n_heads * self.head_dim * keys

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The preset of exactly this name; `PRESETS` lists them all.

        Raises:
            ValueError: no such name; the message gives them all.
        """
        if name in PRESETS:
            return PRESETS[name]
        raise ValueError(f"preset {name!r}: no such name; expected one of {', '.join(PRESETS)}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` gives the same config back."""
        out = asdict(self)
        for name, scaling in _SCALINGS.items():
            if isinstance(self.rope_scaling, scaling):
                out["rope_scaling"] = {"type": name, **asdict(self.rope_scaling)}
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """The config that `to_dict` wrote.

        Raises:
            ValueError: an unknown or missing field, or a value that does not pass; named in the message.
        """
        values = dict(values)
        scaling = values.get("rope_scaling")
        if isinstance(scaling, dict):
            scaling = dict(scaling)
            kind = scaling.pop("type", None)
            if kind not in _SCALINGS:
                raise ValueError(f"rope_scaling.type = {kind!r}: expected one of {', '.join(_SCALINGS)}")
            values["rope_scaling"] = _build(_SCALINGS[kind], scaling, "rope_scaling")
        return _build(cls, values, "config")


def rope_cos_sin(
    config: LlamaConfig, positions: int | Tensor, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, computed in float64 and rounded once.

    Args:
        config: gives head_dim, rope_theta and rope_scaling.
        positions: T for 0 .. T-1, or an integer tensor [T] or [B, T].
        device: where the tables go; the default is that of `positions`, or the CPU.

    Returns:
        cos, sin: [T, D/2] or [B, T, D/2] float32.

    Raises:
        ValueError: `positions` is negative or not of an integer dtype.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if isinstance(positions, int):
        if positions < 0:
            raise ValueError(f"positions = {positions}: expected 0 or more")
        positions = torch.arange(positions, device="cpu" if device is None else device)
    elif positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions of dtype {positions.dtype}: expected an integer dtype")
    device = positions.device if device is None else device
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    freqs = float(config.rope_theta) ** -exponent  # torch takes no integer beyond 64 bits
    if config.rope_scaling is not None:
        freqs = config.rope_scaling.scale(freqs)
    angles = positions.to(device=device, dtype=torch.float64)[..., None] * freqs
    return angles.cos().float(), angles.sin().float()


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected an integer of 1 or more")


def _check_positive(name: str, value: object) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not ok:
        raise ValueError(f"{name} = {value!r}: expected a finite number above 0")


def _build(cls: Any, values: dict[str, Any], what: str) -> Any:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{what}: unknown field {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None


def _llama1(dim: int, n_layers: int, n_heads: int, ffn_dim: int, norm_eps: float = 1e-6) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_heads, ffn_dim, 32000, 2048, norm_eps)


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, ffn_dim, 32000, 4096)


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, factor: float | None = None, tied: bool = False
) -> LlamaConfig:
    scaling = None if factor is None else Llama3RopeScaling(factor, 1.0, 4.0, 8192)
    seq_len = 8192 if factor is None else 131072
    return LlamaConfig(dim, n_layers, n_heads, 8, ffn_dim, 128256, seq_len, 1e-5, 500000.0, scaling, tied)


def _qwen3(dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, tied: bool = False) -> LlamaConfig:
    head_dim = None if 128 * n_heads == dim else 128
    return LlamaConfig(
        dim, n_layers, n_heads, 8, ffn_dim, 151936, 40960, 1e-6, 1e6, None, tied, head_dim, qk_norm=True
    )  # fmt: skip


# LLaMA 1: table 2 of arXiv:2302.13971 and the released params.json (its 65B has the larger epsilon).
# Llama 2: arXiv:2307.09288. Llama 3, 3.1, 3.2: arXiv:2407.21783 and the released configurations.
# Mistral 7B v0.1: arXiv:2310.06825. Qwen2.5: arXiv:2412.15115. Qwen3: arXiv:2505.09388. And their configurations.
# tiny is for tests; demo trains in minutes on a laptop's CPU.
PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(64, 2, 4, 2, 176, 256, 128),
    "demo": LlamaConfig(256, 6, 4, 4, 688, 4096, 512),
    "llama-7b": _llama1(4096, 32, 32, 11008),
    "llama-13b": _llama1(5120, 40, 40, 13824),
    "llama-33b": _llama1(6656, 60, 52, 17920),
    "llama-65b": _llama1(8192, 80, 64, 22016, norm_eps=1e-5),
    "llama-2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama-3-8b": _llama3(4096, 32, 32, 14336),
    "llama-3-70b": _llama3(8192, 80, 64, 28672),
    "llama-3.1-8b": _llama3(4096, 32, 32, 14336, factor=8.0),
    "llama-3.1-70b": _llama3(8192, 80, 64, 28672, factor=8.0),
    "llama-3.1-405b": _llama3(16384, 126, 128, 53248, factor=8.0),
    "llama-3.2-1b": _llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8192, factor=32.0, tied=True),
    "mistral-7b": LlamaConfig(4096, 32, 32, 8, 14336, 32000, 32768, window=4096),
    "qwen2.5-0.5b": LlamaConfig(896, 24, 14, 2, 4864, 151936, 32768, 1e-6, 1e6, None, True, qkv_bias=True),
    "qwen2.5-7b": LlamaConfig(3584, 28, 28, 4, 18944, 152064, 131072, 1e-6, 1e6, qkv_bias=True),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
}
