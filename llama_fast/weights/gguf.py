"""GGUF files of architecture llama, qwen2 and qwen3, read through PyPI's `gguf` (the extra `gguf`), their weights
dequantised.

llama.cpp keeps the rows of a LLaMA's query and key projections in Meta's rotary order, rounds numbers of the config to
float32, and writes Llama 3.1's rotary scaling as a tensor, `rope_freqs.weight`: by what each frequency is divided.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_fast.config import LinearRopeScaling, Llama3RopeScaling, LlamaConfig, RopeScaling
from llama_fast.weights.source import (
    EMBEDDING,
    HEAD,
    Source,
    check_tensors,
    copy_pairs_to_halves,
    main_dtype,
    read_config,
)

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_TOP = {EMBEDDING: "token_embd.weight", "norm.weight": "output_norm.weight", HEAD: "output.weight"}
_OURS = {v: k for k, v in (_LAYER | _TOP).items()}
_ROPE = "rope_freqs.weight"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 1024  # of a matrix that are dequantised at a time
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "explicit_head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}  # behind the architecture's name and a dot
_LLAMA3_SCALING = (1.0, 4.0, 8192)  # what the converter assumes where the config names nothing else


def gguf_name(name: str) -> str:
    """Llama's name of a tensor to GGUF's."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def _our_name(stored: str) -> str | None:
    if stored in _OURS:
        return _OURS[stored]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", stored)
    return f"layers.{match[1]}.{_OURS[match[2]]}.{match[3]}" if match and match[2] in _OURS else None


def read_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key: numbers, strings and lists of these.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: no GGUF file, or a truncated one; names the tensors that are cut off.
    """
    return _fields(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _fields(path: Path, changed: int) -> dict[str, Any]:
    return {name: field.contents() for name, field in _reader(path, changed).fields.items()}


@functools.lru_cache(maxsize=1)  # its metadata take seconds: the weights and the tokenizer share one reading
def _reader(path: Path, changed: int) -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError(f"{path}: reading GGUF needs the package gguf: pip install 'llama_fast[gguf]'") from None

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            cut = []
            for field in fields:
                _, name, _, dims, kind, offset = field.parts
                per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
                nbytes = math.prod(int(n) for n in dims) // per_block * block_bytes
                if start_offs + int(offset[0]) + nbytes > len(self.data):
                    cut.append(bytes(name).decode())
            if cut:
                raise ValueError(f"truncated, tensors cut off: {', '.join(cut[:8])}")
            super()._build_tensors(start_offs, fields)

    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path}: begins with {magic!r}: expected a whole GGUF file")
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        said = str(error) if "tensors cut off" in str(error) else f"damaged, or cut off at {path.stat().st_size} bytes"
        raise ValueError(f"{path}: {said}: expected a whole GGUF file") from None


def config_from_gguf(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_divisors: Tensor | None = None
) -> LlamaConfig:
    """The LlamaConfig of a file's metadata.

    Args:
        fields: as `read_fields` gives them.
        shapes: of its tensors by Llama's name; the vocabulary and whether the output projection is tied stand there.
        rope_divisors: [D/2], the tensor `rope_freqs.weight`.

    Raises:
        ValueError: another architecture, a missing size, or an option that this architecture does not have.
    """
    arch = fields.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise ValueError(f"general.architecture = {arch!r}: expected one of {', '.join(_ARCHITECTURES)}")
    if fields.get(f"{arch}.expert_count", 0):
        raise ValueError(f"{arch}.expert_count = {fields[f'{arch}.expert_count']}: expected 0, no mixture of experts")
    if fields.get("split.count", 1) > 1:
        raise ValueError(
            f"split.count = {fields['split.count']}: expected one file; llama.cpp's gguf-split merges them"
        )
    try:
        dim, heads = fields[f"{arch}.embedding_length"], fields[f"{arch}.attention.head_count"]
        head_dim = fields.get(f"{arch}.attention.key_length", fields.get(f"{arch}.rope.dimension_count", dim // heads))
        theta = _as_written(fields.get(f"{arch}.rope.freq_base", 10000.0))
        config = LlamaConfig(
            dim=dim,
            n_layers=fields[f"{arch}.block_count"],
            n_heads=heads,
            n_kv_heads=fields.get(f"{arch}.attention.head_count_kv", heads),
            ffn_dim=fields[f"{arch}.feed_forward_length"],
            vocab_size=shapes.get(EMBEDDING, (fields.get(f"{arch}.vocab_size", 0),))[0],
            max_seq_len=fields[f"{arch}.context_length"],
            norm_eps=_as_written(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
            rope_theta=theta,
            rope_scaling=_scaling(fields, head_dim, theta, rope_divisors),
            tie_embeddings=HEAD not in shapes,
            explicit_head_dim=None if head_dim * heads == dim else head_dim,
            qkv_bias=arch == "qwen2",
            qk_norm=arch == "qwen3",
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    turned = fields.get(f"{arch}.rope.dimension_count", config.head_dim)
    if turned != config.head_dim:
        raise ValueError(f"{arch}.rope.dimension_count = {turned}: expected head_dim = {config.head_dim}")
    return config


def _as_written(value: float) -> float:
    """The shortest number that rounds to the float32 `value`: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(fields: Mapping[str, Any], head_dim: int, theta: float, divisors: Tensor | None) -> RopeScaling | None:
    arch = fields["general.architecture"]
    factor = fields.get(f"{arch}.rope.scaling.factor", fields.get(f"{arch}.rope.scale_linear"))  # the latter of 2023
    kind = fields.get(f"{arch}.rope.scaling.type", "linear" if factor else "none")  # as llama.cpp reads them
    if divisors is not None:
        scaling = Llama3RopeScaling(_as_written(divisors.max().item()), *_LLAMA3_SCALING)
        freqs = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        expected = freqs / scaling.scale(freqs)
        if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-4):
            raise ValueError(f"{_ROPE} holds {divisors.tolist()}: expected those of Llama 3.1's scaling")
        return scaling
    if kind == "linear":
        if factor is None:
            raise KeyError(f"{arch}.rope.scaling.factor")
        return LinearRopeScaling(_as_written(factor))
    if kind != "none":
        raise ValueError(f"{arch}.rope.scaling.type = {kind!r}: expected none or linear")
    return None


class GGUFSource(Source):
    """The file `path`. It is mapped: only the tensor that is being read takes memory of the process.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the file is damaged, of another architecture, or its tensors are not those of its config.
    """

    def __init__(self, path: Path) -> None:
        fields = read_fields(path)
        stored = {t.name: t for t in _reader(path, path.stat().st_mtime_ns).tensors}
        divisors = stored.pop(_ROPE, None)
        self._tensors = {ours: t for name, t in stored.items() if (ours := _our_name(name)) is not None}
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        freqs = None if divisors is None else torch.from_numpy(divisors.data.astype(np.float64))
        arch = fields.get("general.architecture")
        names = {name: f"{arch}.{key}" for name, key in _NAMES.items()}
        config = read_config(path, fields, names, lambda: config_from_gguf(fields, shapes, freqs))
        unknown = [name for name in stored if _our_name(name) is None]
        check_tensors(path, config, shapes, unknown, gguf_name)
        self._config = config
        self._pairs = arch == "llama"  # others keep the rows of queries and keys in Hugging Face's order
        sizes = [(_FLOATS.get(t.tensor_type.name, torch.float32), int(t.n_elements)) for t in self._tensors.values()]
        super().__init__(path, config, main_dtype(sizes))

    def read_into(self, name: str, out: Tensor) -> None:
        stored = self._tensors[name]
        data = np.asarray(stored.data)
        # whole heads at a time: gguf's dequantisation takes twice the memory of its result
        rows = self._config.head_dim * max(1, _ROWS // self._config.head_dim) if data.ndim > 1 else len(data)
        for at in range(0, len(data), rows):
            piece = out[at : at + rows] if data.ndim > 1 else out
            t = torch.from_numpy(self._numbers(stored, data[at : at + rows])).view(piece.shape)
            if self._pairs and name.endswith(("q_proj.weight", "k_proj.weight")):
                copy_pairs_to_halves(piece, t, self._config.head_dim)
            else:
                piece.copy_(t)

    def _numbers(self, stored: Any, data: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        kind = stored.tensor_type.name
        try:
            numbers = data if kind == "F64" else dequantize(data, stored.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {stored.name} is {kind}: expected a type that gguf dequantises"
            ) from None
        return numbers if numbers.flags.writeable else numbers.copy()
