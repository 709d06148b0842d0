"""Meta's folders: `params.json` and `consolidated.NN.pth`, one file for each of N model-parallel ranks.

A rank holds rows of wq, wk, wv, w1, w3 and output, columns of wo and w2, all of the norms, and of the embedding
columns (LLaMA 1 and 2) or rows (Llama 3). With more ranks than key/value heads each of these stands in N / G ranks.
Rotary turns pairs (2i, 2i+1), so the rows of wq and wk are in another order than Hugging Face's.

Source: meta-llama/llama, meta-llama/llama3 and meta-llama/llama-models, model.py; fairscale's ColumnParallelLinear,
RowParallelLinear, ParallelEmbedding and VocabParallelEmbedding.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast.config import PRESETS, Llama3RopeScaling, LlamaConfig
from llama_fast.files import read_json, write_json
from llama_fast.weights.source import (
    EMBEDDING,
    HEAD,
    Progress,
    Source,
    check_dtype,
    check_tensors,
    copy_pairs_to_halves,
    halves_to_pairs,
    main_dtype,
    read_config,
    tensor_shapes,
)
from llama_fast.weights.torch_file import TorchFileWriter

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_TOP = {EMBEDDING: "tok_embeddings.weight", "norm.weight": "norm.weight", HEAD: "output.weight"}
_OURS = {v: k for k, v in (_LAYER | _TOP).items()}
_AXIS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_BUFFER = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")  # follows from the params
_NUMBERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta")
_LLAMA3_VOCAB = 128256
_LLAMA3_SCALING = (1.0, 4.0, 8192)  # constants of apply_scaling in meta-llama/llama-models


def meta_name(name: str) -> str:
    """Llama's name of a tensor to Meta's."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"layers.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def _our_name(stored: str) -> str | None:
    if stored in _OURS:
        return _OURS[stored]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", stored)
    return f"layers.{match[1]}.{_OURS[match[2]]}.weight" if match and match[2] in _OURS else None


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """F as Meta's FeedForward computes it from `params.json`."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def config_from_meta(params: Mapping[str, Any], vocab_size: int) -> LlamaConfig:
    """The LlamaConfig of a `params.json`.

    It names neither the context nor Llama 3.2's scaling factor: both are those of the published model of the same sizes
    where there is one; else the context is Llama 1's 2048 (norm_eps 1e-6), Llama 2's 4096 or Llama 3's 8192 (131072
    with use_scaled_rope), and the factor Llama 3.1's 8.

    Args:
        params: the file's contents; null is as good as a missing key.
        vocab_size: V, used where the file has -1.

    Raises:
        ValueError: a size is missing, or the vocabulary is not that of the weights.
    """
    params = {name: value for name, value in params.items() if value is not None}
    try:
        dim, heads = params["dim"], params["n_heads"]
        stated = params.get("vocab_size", -1)
        theta = params.get("rope_theta", 10000.0)
        scaled = bool(params.get("use_scaled_rope", False))
        context = 2048 if params["norm_eps"] < 1e-5 else 4096
        if stated == _LLAMA3_VOCAB or theta >= 500000.0:
            context = 131072 if scaled else 8192
        config = LlamaConfig(
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=heads,
            n_kv_heads=params.get("n_kv_heads") or heads,
            ffn_dim=ffn_dim(dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
            vocab_size=vocab_size if stated == -1 else stated,
            max_seq_len=context,
            norm_eps=params["norm_eps"],
            rope_theta=theta,
            rope_scaling=Llama3RopeScaling(8.0, *_LLAMA3_SCALING) if scaled else None,
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    for preset in PRESETS.values():
        like: dict[str, Any] = {"max_seq_len": preset.max_seq_len, "tie_embeddings": preset.tie_embeddings}
        if scaled and preset.rope_scaling is not None:
            like["rope_scaling"] = preset.rope_scaling
        if replace(config, **like) == preset:
            config = replace(preset, tie_embeddings=False)
    return config


def params_to_meta(config: LlamaConfig) -> dict[str, Any]:
    """The `params.json` of a config, with the keys that Meta's ModelArgs has and no other.

    Raises:
        ValueError: Meta's code has no such rotary scaling or head dim, or no biases, norms of heads or window.
    """
    for name, plain in (("qkv_bias", False), ("qk_norm", False), ("window", None)):
        if (value := getattr(config, name)) != plain:
            raise ValueError(f"{name} = {value}: Meta's format expects {plain}")
    scaling = config.rope_scaling
    if scaling is not None:
        fixed = Llama3RopeScaling(scaling.factor, *_LLAMA3_SCALING)
        back = {"use_scaled_rope": True, **_sizes(config)}
        if scaling != fixed or config_from_meta(back, config.vocab_size).rope_scaling != scaling:
            raise ValueError(f"rope_scaling = {scaling}: Meta's format expects None or Llama 3.1's")
    if config.head_dim * config.n_heads != config.dim:
        raise ValueError(f"head_dim = {config.head_dim}: Meta's format expects dim / n_heads")
    params = _sizes(config)
    if scaling is not None:
        params["use_scaled_rope"] = True
    return params


def _sizes(config: LlamaConfig) -> dict[str, Any]:
    F = config.ffn_dim
    multiple_of = math.gcd(F, 256)
    sizes: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    if ffn_dim(config.dim, multiple_of, None) != F:
        sizes["ffn_dim_multiplier"] = (F + 0.5) / int(2 * (4 * config.dim) / 3)  # which is rounded down
    assert ffn_dim(config.dim, multiple_of, sizes.get("ffn_dim_multiplier")) == F
    return sizes


def _axis(name: str, embedding_axis: int) -> int | None:
    """The dimension along which the ranks share a tensor, None for one that each has whole."""
    stored = meta_name(name)
    return embedding_axis if name == EMBEDDING else _AXIS.get(stored.split(".")[-2])


class MetaSource(Source):
    """The folder `path`. Its files are mapped, not read, so that only what is being copied takes memory of the process.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no whole weights_only file, or the tensors are not those of the params.
    """

    def __init__(self, path: Path) -> None:
        params = read_json(path / PARAMS)
        params = params.get("model", params)
        self._files = files = shard_files(path)
        self._shards = [_load(file) for file in files]
        names = list(self._shards[0])
        for file, shard in zip(files, self._shards, strict=True):
            if shard.keys() != self._shards[0].keys():
                odd = sorted(shard.keys() ^ self._shards[0].keys())
                raise ValueError(f"{file}: its tensors differ from those of {files[0].name}: {', '.join(odd[:8])}")
        unknown = [n for n in names if _our_name(n) is None and not _BUFFER.fullmatch(n)]
        ours = [name for name in map(_our_name, names) if name is not None]
        for name in ours:
            for file, shard in zip(files, self._shards, strict=True):
                check_dtype(file, meta_name(name), shard[meta_name(name)].dtype)
        config = read_config(
            path / PARAMS,
            params,
            {name: name for name in _NUMBERS},
            lambda: config_from_meta(params, self._vocab_size(params)),
        )
        self._config = config
        # by the width of its rows; with one shard either axis is right
        embedding = self._shards[0].get(meta_name(EMBEDDING))
        self._embedding_axis = 0 if embedding is not None and embedding.shape[-1] == config.dim else 1
        shapes = {name: self._shape(name) for name in ours}
        if HEAD not in shapes or self._is_tied():
            config = replace(config, tie_embeddings=True)
            shapes.pop(HEAD, None)
        check_tensors(path, config, shapes, unknown, meta_name)
        sizes = [(self._shards[0][meta_name(name)].dtype, math.prod(shapes[name])) for name in shapes]
        super().__init__(path, config, main_dtype(sizes))

    def _vocab_size(self, params: Mapping[str, Any]) -> int:
        """V by the rows of the output projection, which the ranks always share by rows."""
        stated = params.get("vocab_size", -1)
        if stated != -1:
            return stated
        for name, parts in ((HEAD, len(self._shards)), (EMBEDDING, 1)):
            if (t := self._shards[0].get(meta_name(name))) is not None:
                return t.shape[0] * parts
        raise ValueError("vocab_size = -1, and the weights have neither output.weight nor tok_embeddings.weight")

    def _parts(self, name: str) -> list[Tensor]:
        """What the ranks have of a tensor, each piece once."""
        parts = [shard[meta_name(name)] for shard in self._shards]
        if _axis(name, self._embedding_axis) is None:
            return parts[:1]
        repeats = len(parts) // self._config.n_kv_heads
        if repeats > 1 and name.endswith(("k_proj.weight", "v_proj.weight")):
            return parts[::repeats]
        return parts

    def _shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        axis = _axis(name, self._embedding_axis)
        shape = list(parts[0].shape)
        for file, shard in zip(self._files, self._shards, strict=True):
            part = shard[meta_name(name)]
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{file}: tensor {meta_name(name)} is {tuple(part.shape)}, expected {tuple(parts[0].shape)} as in "
                    f"{self._files[0].name}"
                )
        if axis is not None and axis < len(shape):
            shape[axis] = sum(part.shape[axis] for part in parts)
        return tuple(shape)

    def _is_tied(self) -> bool:
        """Whether the output projection is the embedding, bit for bit: Meta's format always has both."""
        if self._shape(HEAD) != self._shape(EMBEDDING):
            return False
        heads, columns = self._parts(HEAD), self._parts(EMBEDDING)
        if self._embedding_axis == 0:
            return all(torch.equal(a, b) for a, b in zip(heads, columns, strict=True))
        rows, width = heads[0].shape[0], columns[0].shape[1]
        return all(
            torch.equal(a[:, j * width : (j + 1) * width], b[i * rows : (i + 1) * rows])
            for i, a in enumerate(heads)
            for j, b in enumerate(columns)
        )

    def read_into(self, name: str, out: Tensor) -> None:
        parts = self._parts(name)
        axis = _axis(name, self._embedding_axis) or 0
        for part, piece in zip(parts, out.chunk(len(parts), dim=axis), strict=True):
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                copy_pairs_to_halves(piece, part, self._config.head_dim)
            else:
                piece.copy_(part)


def shard_files(path: Path) -> list[Path]:
    """The folder's `consolidated.NN.pth`, in order.

    Raises:
        FileNotFoundError: there is none, or one between 00 and the last is missing.
    """
    files = sorted(p for p in path.iterdir() if _SHARD.fullmatch(p.name))
    expected = [path / f"consolidated.{i:02d}.pth" for i in range(max(1, len(files)))]
    if files != expected:
        found = ", ".join(p.name for p in files) or "none"
        raise FileNotFoundError(f"{path}: expected consolidated.00.pth and on without a gap, found {found}")
    return files


def _load(file: Path) -> dict[str, Tensor]:
    expected = "expected a whole file of tensors, as torch.save writes"
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: {file.stat().st_size} bytes that end in no zip archive's directory: {expected}")
    try:
        shard = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            line = f"calls {called[1]} when it is read, which is refused"
        raise ValueError(f"{file}: {line}: {expected}") from None
    if not isinstance(shard, dict) or not all(isinstance(t, Tensor) for t in shard.values()):
        raise ValueError(f"{file}: holds a {type(shard).__name__}: expected a dictionary of tensors")
    return shard


def write_meta(source: Source, folder: Path, dtype: torch.dtype, shards: int, progress: Progress | None) -> None:
    """Writes `source` into the existing folder for `shards` model-parallel ranks.

    The embedding is shared by rows, as Llama 3's code wants it, where the vocabulary is Llama 3's or larger, else by
    columns. A tied output projection is written out, as Meta's code expects one.

    Raises:
        ValueError: `shards` does not divide what it has to, or Meta's format has no such model; nothing was written.
    """
    config = source.config
    params = params_to_meta(config)
    embedding_axis = 0 if config.vocab_size >= _LLAMA3_VOCAB else 1
    split = {"n_heads": config.n_heads, "ffn_dim": config.ffn_dim, "vocab_size": config.vocab_size, "dim": config.dim}
    for what, size in split.items():
        if shards < 1 or size % shards:
            raise ValueError(f"shards = {shards}: expected a divisor of {what} = {size}")
    G = config.n_kv_heads
    if G % shards and shards % G:
        raise ValueError(f"shards = {shards}: expected a divisor or a multiple of n_kv_heads = {G}")
    shapes = tensor_shapes(config) | {HEAD: (config.vocab_size, config.dim)}
    total = dtype.itemsize * sum(math.prod(s) for s in shapes.values())
    done = 0
    writers = [TorchFileWriter(folder / f"consolidated.{i:02d}.pth") for i in range(shards)]
    try:
        for name in shapes:
            t = source.read(EMBEDDING if name == HEAD and config.tie_embeddings else name).to(dtype)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                t = halves_to_pairs(t, config.head_dim)
            axis = _axis(name, embedding_axis)
            heads = name.endswith(("k_proj.weight", "v_proj.weight"))
            parts = min(shards, G) if heads else shards
            for rank, writer in enumerate(writers):
                part = t if axis is None else t.chunk(parts, dim=axis)[rank * parts // shards]
                writer.add(meta_name(name), part)
            done += dtype.itemsize * t.numel()
            if progress is not None:
                progress(meta_name(name), done, total)
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    write_json(folder / PARAMS, params)
