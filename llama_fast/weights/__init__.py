"""Checkpoints that other programs write and read: Hugging Face's, Meta's, GGUF.

    source.py             what every format gives, and the check of its tensors against its config
    hf.py  meta.py        folders, read and written
    gguf.py               files, read
    safetensors_file.py  torch_file.py  the files inside, one tensor at a time

Peak memory of a load is the model and one tensor; of a conversion, one tensor. `llama_fast.checkpoint` is for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama_fast.files import new_folder
from llama_fast.weights.gguf import GGUFSource
from llama_fast.weights.hf import CONFIG, HFSource, write_hf
from llama_fast.weights.meta import PARAMS, MetaSource, write_meta
from llama_fast.weights.source import FLOATS, ModelSource, Progress, Source, check_float, tensor_shapes

if TYPE_CHECKING:
    from llama_fast.model import Llama

FORMATS = {"hf": write_hf, "meta": write_meta}


def open_checkpoint(path: Path | str, max_seq_len: int | None = None) -> Source:
    """The checkpoint at `path`, its config and every tensor's shape checked, no tensor read.

    Args:
        path: a Hugging Face folder (or a checkpoint of `llama-fast train`), a Meta folder, or a .gguf file.
        max_seq_len: the context, in place of the one that the checkpoint names; a Meta folder names none.

    Raises:
        FileNotFoundError: nothing is there, or a file of it is missing.
        ImportError: a .gguf file needs the extra `gguf`.
        ValueError: it is none of these, damaged, or not a LLaMA; the message names the file and the tensors.
    """
    source = _open(Path(path))
    if max_seq_len is not None:
        source.config = replace(source.config, max_seq_len=max_seq_len)
    return source


def _open(path: Path) -> Source:
    if path.is_file():
        return GGUFSource(path)
    if not path.is_dir():
        kinds = "a folder of Hugging Face or Meta, or a GGUF file, on this machine"
        raise FileNotFoundError(f"{path}: no such folder or file, expected {kinds}")
    if (path / CONFIG).is_file():
        return HFSource(path)
    if (path / PARAMS).is_file():
        return MetaSource(path)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"{path}: expected {CONFIG} or {PARAMS}, found {found}")


def load_model(
    source: Source,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Llama:
    """A Llama with the weights of `source`; see `Llama.from_pretrained`."""
    from llama_fast.model import Llama

    check_float(dtype)
    dtype = dtype or source.dtype
    model = Llama(source.config, device="meta", dtype=dtype, **options)
    model.to_empty(device=torch.get_default_device() if device is None else device)
    parameters = dict(model.named_parameters())
    shapes = tensor_shapes(source.config)
    total = dtype.itemsize * sum(math.prod(s) for s in shapes.values())
    done = 0
    with torch.no_grad():
        for name in shapes:
            source.read_into(name, parameters[name])
            done += dtype.itemsize * parameters[name].numel()
            if progress is not None:
                progress(name, done, total)
    return model.eval()


def write(
    source: Source,
    path: Path | str,
    format: str = "hf",
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    beside: Callable[[Path], object] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes `source` into the new folder `path`, one tensor at a time, whole or not at all.

    Args:
        source: a checkpoint, or `ModelSource(model)`.
        path: a folder that is not there yet, or empty.
        format: "hf" or "meta".
        shards: files of weights; for Meta, model-parallel ranks.
        dtype: of the weights; None for the source's.
        beside: called with the folder that the weights are in, to write more files there.
        progress: called after each tensor.

    Raises:
        FileExistsError: `path` is not empty.
        ValueError: an argument is out of its range, or the format has no such model; nothing is left behind.
        OSError: the disk is full or fails; nothing is left behind.
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    check_float(dtype)
    dtype = dtype or source.dtype
    numbers = sum(math.prod(s) for s in tensor_shapes(source.config).values())
    if format == "meta" and source.config.tie_embeddings:
        numbers += source.config.vocab_size * source.config.dim
    with new_folder(Path(path), numbers * dtype.itemsize) as folder:
        FORMATS[format](source, folder, dtype, shards, progress)
        if beside is not None:
            beside(folder)


__all__ = [
    "CONFIG",
    "FLOATS",
    "FORMATS",
    "PARAMS",
    "ModelSource",
    "Progress",
    "Source",
    "load_model",
    "open_checkpoint",
    "write",
]
