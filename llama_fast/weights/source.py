"""What every checkpoint format gives: a config, the shapes of its tensors, and one tensor at a time.

Inside, tensors have the names and the layout of `llama_fast.Llama`: Hugging Face's without `model.`, rotary by halves.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_fast.config import LlamaConfig

if TYPE_CHECKING:
    from llama_fast.model import Llama

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
Progress = Callable[[str, int, int], object]  # (tensor's name, bytes done, bytes in all)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Llama by name, in order of the forward pass; a tied output projection is left out."""
    C, F = config.dim, config.ffn_dim
    HD, GD = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, C)}
    attention: dict[str, tuple[int, ...]]
    attention = {"q_proj.weight": (HD, C), "k_proj.weight": (GD, C), "v_proj.weight": (GD, C)}
    if config.qkv_bias:
        attention |= {"q_proj.bias": (HD,), "k_proj.bias": (GD,), "v_proj.bias": (GD,)}
    if config.qk_norm:
        attention |= {"q_norm.weight": (config.head_dim,), "k_norm.weight": (config.head_dim,)}
    layer = {
        "input_layernorm.weight": (C,),
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "self_attn.o_proj.weight": (C, HD),
        "post_attention_layernorm.weight": (C,),
        "mlp.gate_proj.weight": (F, C),
        "mlp.up_proj.weight": (F, C),
        "mlp.down_proj.weight": (C, F),
    }
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (C,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, C)
    return shapes


def read_config(
    file: Path, fields: Mapping[str, Any], names: Mapping[str, str], build: Callable[[], LlamaConfig]
) -> LlamaConfig:
    """The config that `build` makes of the fields of a file.

    Args:
        file: for messages.
        fields: by the file's own names.
        names: LlamaConfig's names of numbers above 0 to the file's.
        build: makes the config.

    Raises:
        ValueError: a field is no such number, or `build` raises; names the file, and the fields as the file does.
    """
    for stored in names.values():
        value = fields.get(stored)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{file}: {stored} = {value!r}: expected a number above 0")
    try:
        return build()
    except ValueError as error:
        said = re.sub(r"[a-z_]+", lambda match: names.get(match[0], match[0]), str(error))
        raise ValueError(f"{file}: {said}") from None


class Source(ABC):
    """A checkpoint that is read one tensor at a time.

    Args:
        path: the folder or file, for messages.
        config: its sizes.
        dtype: of most of its numbers.
    """

    def __init__(self, path: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
        self.path, self.config, self.dtype = path, config, dtype

    @abstractmethod
    def read_into(self, name: str, out: Tensor) -> None:
        """Fills `out` with the tensor of Llama's name `name`, cast to its dtype."""

    def read(self, name: str) -> Tensor:
        """The tensor `name` in the checkpoint's dtype, on the CPU unless it belongs to a model."""
        out = torch.empty(tensor_shapes(self.config)[name], dtype=self.dtype, device="cpu")
        self.read_into(name, out)
        return out


def check_tensors(
    path: Path,
    config: LlamaConfig,
    found: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
    stored_name: Callable[[str], str],
) -> None:
    """Raises unless `found` (shapes by Llama's name) are the tensors of `config`.

    Args:
        path: of the checkpoint.
        config: says what is expected.
        found: shape of each tensor whose name was understood.
        unknown: names, as stored, of the others.
        stored_name: Llama's name to the format's.

    Raises:
        ValueError: names tensors that are missing, extra or misshapen, up to eight of a kind, as the checkpoint does.
    """
    expected = tensor_shapes(config)
    missing = [stored_name(name) for name in expected if name not in found]
    extra = sorted([*unknown, *(stored_name(name) for name in found if name not in expected)])
    misshapen = [
        f"{stored_name(name)} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    said = [
        f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for kind, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if said:
        raise ValueError(f"{path}: tensors do not fit its config: {'; '.join(said)}")


def check_dtype(path: Path, name: str, dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of a tensor. Raises ValueError where it is not of floating-point numbers of 16 bits or more."""
    if isinstance(dtype, str) or dtype not in FLOATS:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise ValueError(f"{path}: tensor {name} has dtype {str(dtype).removeprefix('torch.')}, expected {kinds}")
    return dtype


def check_float(dtype: torch.dtype | None) -> None:
    """Raises ValueError unless a dtype is None or one that weights can have."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype = {dtype!r}: expected one of {', '.join(map(str, FLOATS))}")


def main_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype that most numbers have, of (dtype, numbers) of each tensor."""
    totals: dict[torch.dtype, int] = {}
    for dtype, count in sizes:
        totals[dtype] = totals.get(dtype, 0) + count
    return max(totals, key=lambda d: totals[d])


class ModelSource(Source):
    """A model in memory as a checkpoint to be written.

    Raises:
        ValueError: its parameters are not those of its config: one would be lost, or missed.
    """

    def __init__(self, model: Llama) -> None:
        self._parameters = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        head, embedding = (self._parameters.get(name) for name in (HEAD, EMBEDDING))
        if model.config.tie_embeddings and head is not None and embedding is not None:
            if not torch.equal(head, embedding):
                raise ValueError("model: tie_embeddings = True, and lm_head.weight differs from the embedding")
            shapes.pop(HEAD)
        check_tensors(Path("model"), model.config, shapes, (), str)
        dtype = main_dtype((p.dtype, p.numel()) for p in self._parameters.values())
        super().__init__(Path("model"), model.config, dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name))

    def read(self, name: str) -> Tensor:
        return self._parameters[name].detach()


def halves_to_pairs(w: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection [n D, C] from Hugging Face's rotary layout, i and i + D/2, to Meta's pairs."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def copy_pairs_to_halves(out: Tensor, w: Tensor, head_dim: int) -> None:
    """Fills `out` with the rows of `w` [n D, C] taken from Meta's layout to Hugging Face's, without another copy."""
    out.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).copy_(w.unflatten(0, (-1, head_dim // 2, 2)))
