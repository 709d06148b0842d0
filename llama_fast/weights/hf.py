"""Hugging Face folders: `config.json` and one or several .safetensors files with their index.

Of the model types llama, mistral, qwen2 and qwen3, whose configs differ in what a missing key means.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_fast.config import LinearRopeScaling, Llama3RopeScaling, LlamaConfig, RopeScaling
from llama_fast.files import read_json, write_json
from llama_fast.weights.safetensors_file import Entry, read_header, read_tensor, write_file
from llama_fast.weights.source import (
    EMBEDDING,
    HEAD,
    Progress,
    Source,
    check_dtype,
    check_tensors,
    main_dtype,
    read_config,
    tensor_shapes,
)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Values of config.json that these architectures have by definition; another one is another architecture.
_FIXED = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
_PIECE = 1 << 20  # numbers
_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "explicit_head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
# Saved by old versions; it follows from the config.
_BUFFER = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class _Kind(NamedTuple):
    """A model type of transformers.

    Args:
        architecture: the class that has the weights.
        missing: the values of keys that a config lacks, where they are not None.
        attention_bias: whether its config has a key of this name, for biases of q, k, v and o.
        qkv_bias, qk_norm: as LlamaConfig's.
    """

    architecture: str
    missing: dict[str, Any]
    attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_KINDS = {
    "llama": _Kind("LlamaForCausalLM", {}, attention_bias=True),
    "mistral": _Kind("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Kind("Qwen2ForCausalLM", _QWEN, qkv_bias=True),
    "qwen3": _Kind("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, attention_bias=True, qk_norm=True),
}


def config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """The LlamaConfig of a Hugging Face `config.json`, with `rope_scaling` (transformers 4) or `rope_parameters` (5).

    Raises:
        ValueError: another model type, a missing size, or an option that this architecture does not have; named.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"model_type = {name!r}: expected one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    values = {**kind.missing, **values}
    fixed = {**_FIXED, "attention_bias": False} if kind.attention_bias else _FIXED
    for name, expected in fixed.items():
        if (value := values.get(name)) is not None and value != expected:
            raise ValueError(f"{name} = {value!r}: expected {expected!r}")
    if values.get("quantization_config"):
        raise ValueError("quantization_config is set: expected weights that are not quantised")
    try:
        dim, heads = values["hidden_size"], values["num_attention_heads"]
        theta, scaling = _rope_from_hf(values)
        head_dim = values.get("head_dim")
        config = LlamaConfig(
            dim=dim,
            n_layers=values["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=values.get("num_key_value_heads") or heads,
            ffn_dim=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            max_seq_len=values["max_position_embeddings"],
            norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=values.get("tie_word_embeddings", False),
            explicit_head_dim=None if head_dim is None or head_dim * heads == dim else head_dim,
            qkv_bias=kind.qkv_bias,
            qk_norm=kind.qk_norm,
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    return replace(config, window=_window_from_hf(values, config.n_layers))


def _window_from_hf(values: Mapping[str, Any], n_layers: int) -> int | None:
    """The sliding window of all layers; None where none has one."""
    kind, window, types = values["model_type"], values.get("sliding_window"), values.get("layer_types")
    first = values.get("max_window_layers")
    if kind == "llama" or window is None or (kind != "mistral" and not values.get("use_sliding_window")):
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"sliding_window = {window!r}: expected null or an integer of 1 or more")
    if types is not None:
        name, value = "layer_types", types
        slide = {t == "sliding_attention" for t in types} if isinstance(types, list) else set()
    elif kind == "mistral":
        return window
    else:
        name, value = "max_window_layers", first
        slide = {first <= 0, first < n_layers} if isinstance(first, int) else set()
    if len(slide) != 1 or (kind == "mistral" and slide == {False}):  # which looks at no layer_types
        raise ValueError(f"{name} = {value!r}: expected a sliding window in all layers or in none")
    return window if slide == {True} else None


def _rope_from_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} = {rope!r}: expected an object")
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(f"{name} has {', '.join(nested)}: expected one rotary embedding for all layers")
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor = {rope['partial_rotary_factor']}: expected 1.0")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(rope["factor"])
    if kind == "llama3":
        return theta, Llama3RopeScaling(
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    raise ValueError(f"rope_type = {kind!r}: expected default, linear or llama3")


def config_to_hf(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of the model type that has what `config` has, in the form that transformers 4 and 5 both read.

    Raises:
        ValueError: no model type has it.
    """
    if config.qkv_bias and config.qk_norm:
        raise ValueError("qkv_bias = True, qk_norm = True: expected one of them at most, no model type has both")
    name = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "mistral" if config.window else "llama"
    kind = _KINDS[name]
    only: dict[str, Any] = {}
    if kind.attention_bias:
        only["attention_bias"] = False
    if name == "llama":
        only["mlp_bias"] = False
    else:
        only["sliding_window"] = config.window
    if name in ("qwen2", "qwen3"):
        only["use_sliding_window"] = config.window is not None
        only["max_window_layers"] = config.n_layers if config.window is None else 0
    scaling: dict[str, Any] | None = None
    if isinstance(config.rope_scaling, LinearRopeScaling):
        scaling = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif isinstance(config.rope_scaling, Llama3RopeScaling):
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    return {
        "architectures": [kind.architecture],
        "model_type": name,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        **only,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def hf_name(name: str) -> str:
    """Llama's name of a tensor to transformers'."""
    return name if name == HEAD else f"model.{name}"


class HFSource(Source):
    """The folder `path`, of Hugging Face or of this library's trainer, whose names lack `model.` and whose config.json
    is a LlamaConfig's.

    Raises:
        FileNotFoundError: a file of weights is missing.
        ValueError: the config is of another architecture, a file is truncated, or the tensors are not those of the
            config.
    """

    def __init__(self, path: Path) -> None:
        values = read_json(path / CONFIG)
        own = "model_type" not in values and "n_layers" in values
        build = LlamaConfig.from_dict if own else config_from_hf
        config = read_config(path / CONFIG, values, {} if own else _NAMES, lambda: build(values))
        self._entries: dict[str, tuple[Path, str, Entry]] = {}
        for file in _files(path):
            for stored, entry in read_header(file).items():
                name = stored.removeprefix("model.")
                if _BUFFER.fullmatch(name):
                    continue
                if name in self._entries:
                    raise ValueError(f"{file}: tensor {stored} is also in {self._entries[name][0].name}")
                self._entries[name] = (file, stored, entry)
        shapes = {name: entry.shape for name, (_, _, entry) in self._entries.items()}
        head = shapes.pop(HEAD, None) if config.tie_embeddings else None
        known = tensor_shapes(config)
        unknown = [self._entries[name][1] for name in shapes if name not in known]
        found = {name: shape for name, shape in shapes.items() if name in known}
        check_tensors(path, config, found, unknown, str if own else hf_name)
        if head is not None and not (head == found[EMBEDDING] and self._equal(HEAD, EMBEDDING)):
            raise ValueError(f"{path}: tie_word_embeddings = True, and lm_head.weight differs from the embedding")
        sizes = []
        for name, shape in found.items():
            file, stored, entry = self._entries[name]
            sizes.append((check_dtype(file, stored, entry.dtype), math.prod(shape)))
        super().__init__(path, config, main_dtype(sizes))

    def _equal(self, *names: str) -> bool:
        """Whether matrices of one shape hold the same numbers; reads a few megabytes of each at a time."""
        V, C = self._entries[names[0]][2].shape
        step = max(1, _PIECE // C)
        for begin in range(0, V, step):
            rows = []
            for file, stored, entry in (self._entries[name] for name in names):
                dtype = check_dtype(file, stored, entry.dtype)
                shape, row = (min(step, V - begin), C), C * dtype.itemsize
                rows.append(torch.empty(shape, dtype=dtype, device="cpu"))
                part = Entry(dtype, shape, entry.begin + begin * row, shape[0] * row)
                read_tensor(file, stored, part, rows[-1])
            if not torch.equal(*(t.double() for t in rows)):
                return False
        return True

    def read_into(self, name: str, out: Tensor) -> None:
        file, stored, entry = self._entries[name]
        read_tensor(file, stored, entry, out)


def _files(path: Path) -> list[Path]:
    """The .safetensors files of a folder: those of its index where there is one."""
    if not (path / INDEX).is_file():
        if (path / WEIGHTS).is_file():
            return [path / WEIGHTS]
        found = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise FileNotFoundError(f"{path}: expected {WEIGHTS} or {INDEX}, found {found}")
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(f, str) and "/" not in f for f in index.values()):
        raise ValueError(f"{path / INDEX}: expected a weight_map from tensors to files")
    files = [path / name for name in sorted(set(index.values()))]
    for file in files:
        if not file.is_file():
            lost = [name for name, f in index.items() if f == file.name]
            raise FileNotFoundError(f"{file}: missing; it holds {len(lost)} tensors, {lost[0]} among them")
        absent = sorted({name for name, f in index.items() if f == file.name} - read_header(file).keys())
        if absent:
            raise ValueError(f"{file}: missing: {', '.join(absent[:8])}, which {INDEX} puts there")
    return files


def write_hf(source: Source, folder: Path, dtype: torch.dtype, shards: int, progress: Progress | None) -> None:
    """Writes `source` into the existing folder, its weights in `shards` files of about equal size.

    Raises:
        ValueError: more shards than tensors, or fewer than one; or no model type has what the config has.
    """
    settings = config_to_hf(source.config, dtype)
    shapes = tensor_shapes(source.config)
    parts = split_evenly(shapes, shards)
    total = dtype.itemsize * sum(math.prod(s) for s in shapes.values())
    done = 0

    def read(stored: str) -> Tensor:
        nonlocal done
        t = source.read(stored.removeprefix("model."))
        done += dtype.itemsize * t.numel()
        if progress is not None:
            progress(stored, done, total)
        return t

    index: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = WEIGHTS if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        stored = {hf_name(n): shapes[n] for n in part}
        write_file(folder / name, stored, dtype, read)
        index |= dict.fromkeys(stored, name)
    if shards > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    write_json(folder / CONFIG, settings)


def split_evenly(shapes: Mapping[str, tuple[int, ...]], parts: int) -> list[list[str]]:
    """The names in order, cut into `parts` runs of about equal size, none empty.

    Raises:
        ValueError: `parts` is below 1 or above the number of names.
    """
    if not 1 <= parts <= len(shapes):
        raise ValueError(f"shards = {parts}: expected 1 to {len(shapes)}, the number of tensors")
    total = sum(math.prod(s) for s in shapes.values())
    runs: list[list[str]] = [[]]
    done = 0
    for i, (name, shape) in enumerate(shapes.items()):
        left = len(shapes) - i
        full = done + math.prod(shape) / 2 > total * len(runs) / parts and len(runs) < parts
        if runs[-1] and (full or left == parts - len(runs)):
            runs.append([])
        runs[-1].append(name)
        done += math.prod(shape)
    return runs
