"""Checkpoints of a training run: written whole or not at all, checked before they are read.

    run_dir/step_0000100/   model.safetensors   weights, a tied one once
                            config.json         of the model, where it has one
                            state.pt            optimizer, generators, data position; loads with weights_only=True
                            manifest.json       size and SHA-256 of each file above

A checkpoint is written into a hidden sibling, every file and then the folder is fsynced, then one rename makes it
visible: killed at any moment, a run keeps its last good one. Leftovers of a killed save are removed by the next. A run
directory belongs to one process at a time.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from llama_fast.config import LlamaConfig
from llama_fast.files import read_json, sync, write_json

WEIGHTS, CONFIG, STATE, MANIFEST = "model.safetensors", "config.json", "state.pt", "manifest.json"
_SPARE_BYTES = 1 << 20  # beside the tensors: JSON, pickled scalars, headers
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and checked: `weights` by parameter name, `state` as it was given to `save`."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save(run_dir: Path | str, step: int, model: nn.Module, state: dict[str, Any], *, keep: int = 3) -> Path:
    """Write checkpoint `step` atomically, then remove all but the `keep` newest.

    Args:
        run_dir: created where it is missing.
        step: 0 or more. A good checkpoint of this step is left as it is; a damaged one is replaced.
        model: its state_dict is written, and its `config` where that is a LlamaConfig.
        state: tensors, numbers, strings, lists, tuples and dictionaries of these; anything else would not load back.
        keep: 1 or more.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: `step` or `keep` is no integer or out of range, or `state` is no dictionary or holds another type.
        OSError: the disk is full or fails. What was half written is removed and earlier checkpoints are untouched.
    """
    if type(step) is not int or type(keep) is not int or step < 0 or keep < 1:  # NumPy's are no JSON
        raise ValueError(f"step = {step!r}, keep = {keep!r}: expected an integer of 0 or more, and one of 1 or more")
    if type(state) not in (dict, OrderedDict):
        raise ValueError(f"state is a {type(state).__name__}: expected a dictionary")
    run_dir = Path(run_dir)
    final = run_dir / f"step_{step:07d}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for leftover in run_dir.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        if final.exists():
            with suppress(ValueError):
                verify(final)
                return final
            _remove(final)
        weights = unique_tensors(model)
        _expect_space(run_dir, weights, state)
        temp = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=run_dir))
        try:
            _write_files(temp, step, model, weights, state)
            temp.rename(final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        sync(run_dir)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch and safetensors raise their own types for a failed write
        code = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OSError(code, f"checkpoint {final} not written: {reason}; earlier checkpoints are untouched") from error
    for old in checkpoints(run_dir)[:-keep]:
        _remove(old)
    return final


def checkpoints(run_dir: Path | str) -> list[Path]:
    """The checkpoint folders in `run_dir`, oldest first, damaged ones included; empty where there is no such folder."""
    run_dir = Path(run_dir)
    found = [p for p in run_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if run_dir.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[len("step_") :]))


def expect_none(run_dir: Path | str) -> None:
    """Raises ValueError where `run_dir` holds checkpoints, with which no new run starts."""
    if found := checkpoints(run_dir):
        raise ValueError(
            f"run_dir = {run_dir} holds {found[-1].name}: expected resume=True (--resume) or an unused folder"
        )


def latest(run_dir: Path | str, on_skip: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint in `run_dir` whose every file has the size and SHA-256 of its manifest, or None.

    Args:
        run_dir: of the run.
        on_skip: called with the path of each newer, damaged checkpoint and what is wrong with it.
    """
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
        except ValueError as error:
            on_skip(path, str(error))
        else:
            return path
    return None


def verify(path: Path | str) -> None:
    """Compare every file of the checkpoint folder `path` with its manifest.

    Raises:
        ValueError: a file is missing, truncated or changed; names it and what was expected.
    """
    path = Path(path)
    for name, expected in _read_manifest(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; expected {expected['size']} bytes")
        if file.stat().st_size != expected["size"]:
            raise ValueError(f"{file}: {file.stat().st_size} bytes; expected {expected['size']}")
        if (found := _sha256(file)) != expected["sha256"]:
            raise ValueError(f"{file}: SHA-256 {found}; expected {expected['sha256']}")


def load(path: Path | str) -> Checkpoint:
    """Read the checkpoint folder `path` onto the CPU, after `verify`.

    Raises:
        ValueError: a file is missing, truncated or changed.
    """
    path = Path(path)
    verify(path)
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(path, _read_manifest(path)["step"], load_model_weights(path), state)


def load_model_weights(path: Path | str) -> dict[str, Tensor]:
    """Weights by parameter name, on the CPU, from a checkpoint folder or a .safetensors file.

    Raises:
        ValueError: the file is missing, truncated or no safetensors file.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: missing; expected a safetensors file")
    try:
        with suppress(UnicodeEncodeError):
            str(file).encode()
            return safetensors.torch.load_file(file)
        return safetensors.torch.load(file.read_bytes())  # the package maps no file whose path is not UTF-8
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {error}; expected a whole safetensors file") from None


def load_config(path: Path | str) -> LlamaConfig:
    """The LlamaConfig of the checkpoint folder `path`.

    Raises:
        ValueError: config.json is missing, no JSON, or no LlamaConfig.
    """
    file = Path(path) / CONFIG
    return LlamaConfig.from_dict(read_json(file))


def load_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy `weights`, as `load_model_weights` gives them, into `model`, in place.

    Raises:
        ValueError: names or shapes differ; nothing was copied.
    """
    own = unique_tensors(model)
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"weights do not fit the model: missing {_few(missing)}; unknown {_few(unknown)}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}: expected {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of `model`, a tensor that stands under several names (a tied embedding) under its first only."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in tensors.items() if first.setdefault(id(t), name) == name}


def state_bytes(value: Any, where: str) -> int:
    """Bytes of the tensors in `value`, which is called `where` in errors.

    Raises:
        ValueError: a part of it is of a type that would not load back with weights_only=True; names the part.
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if type(value) in (dict, OrderedDict):
        for key in value:
            state_bytes(key, f"key {key!r} of {where}")
        return sum(state_bytes(v, f"{where}[{k!r}]") for k, v in value.items())
    if type(value) in (list, tuple):
        return sum(state_bytes(v, f"{where}[{i}]") for i, v in enumerate(value))
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"{where} is a {type(value).__name__}: expected tensors, plain numbers, strings or containers")
    return 0


def _write_files(folder: Path, step: int, model: nn.Module, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    safetensors.torch.save_file({k: t.contiguous() for k, t in weights.items()}, folder / WEIGHTS)
    with open(folder / STATE, "wb") as file:
        torch.save(state, file)
    config = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):
        write_json(folder / CONFIG, config.to_dict())
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"format": 1, "step": step, "files": files})
    for path in (*sorted(folder.iterdir()), folder):
        sync(path)


def _expect_space(run_dir: Path, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    needed = state_bytes(weights, "weights") + state_bytes(state, "state") + _SPARE_BYTES
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes needed, {free:,} free in {run_dir}")


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves no folder that looks like one."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(manifest.get("step"), int) or not isinstance(files, dict):
        raise ValueError(f"{path / MANIFEST}: expected format 1 with a step and a table of files")
    if not {WEIGHTS, STATE} <= files.keys():
        raise ValueError(f"{path / MANIFEST}: lists {sorted(files)}; expected {WEIGHTS} and {STATE} among them")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"{path / MANIFEST}: {name}: expected a size and a SHA-256")
    return manifest
