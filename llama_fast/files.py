"""Writes that survive a crash: a reader finds the old file or the whole new one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SPARE_BYTES = 1 << 20  # beside the tensors: headers, JSON


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash at any moment, finds the old file or the whole new one.

    Raises:
        OSError: the folder is missing, not writable or full; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write that fails knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's contents, or the renames in a folder, durable. Raises OSError if it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, expected_bytes: int) -> Iterator[Path]:
    """A folder that appears at `path` whole, at the end of the block, or not at all.

    The block writes into a hidden sibling, which is removed if it raises; what a killed process left is removed by the
    next. Every file is made durable before one rename.

    Args:
        path: where it will be, a symbolic link's target; its parent is created where that is missing.
        expected_bytes: of all files; more than are free is an error before anything is written.

    Raises:
        FileExistsError: `path` is there, and no empty folder; or one that a rename cannot replace: a mount point, the
            current folder.
        OSError: the disk is full or fails.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists: expected a new or an empty folder")
    if path.is_mount() or path == Path.cwd():
        what = "a mount point" if path.is_mount() else "the current folder"
        raise FileExistsError(f"{path} is {what}, which nothing can take the place of: expected a folder in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if expected_bytes + _SPARE_BYTES > free:
        raise OSError(errno.ENOSPC, f"{expected_bytes + _SPARE_BYTES:,} bytes needed, {free:,} free in {path.parent}")
    leftover = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # mkdtemp's; not those of "m.1"
    for left in path.parent.iterdir():
        if leftover.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in (*sorted(temporary.iterdir()), temporary):
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError where the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; expected JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented, straight to `path`."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
