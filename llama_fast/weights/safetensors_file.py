"""One .safetensors file, read and written a tensor at a time, by plain reads and writes.

The safetensors package maps a file into memory, so that all of it counts as the process's, and does not say which
tensor a truncated file has lost; reading straight into a parameter needs no second copy. Format: 8 bytes, the length N
of the header, little-endian; N bytes of JSON, {name: {"dtype", "shape", "data_offsets": [begin, end]},
"__metadata__": {...}}, offsets from the end of the header; the data, row-major, little-endian, without gaps.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the package's own limit


class Entry(NamedTuple):
    """Where one tensor lies: `dtype` is a string where torch's name for it is of no use here."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of the file `path`, each checked to lie inside it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or is truncated; names the tensors that are cut off.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: {size} bytes, and no header: expected a whole safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(value, 8 + length) for name, value in header.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error!r} in its header: expected a safetensors file") from None
    cut = [name for name, e in entries.items() if e.begin + e.nbytes > size]
    if cut:
        end = max(e.begin + e.nbytes for e in entries.values())
        raise ValueError(f"{path}: truncated, {size} of {end} bytes: tensors cut off: {', '.join(cut[:8])}")
    return entries


def _entry(value: dict[str, Any], start: int) -> Entry:
    begin, end = map(int, value["data_offsets"])
    shape = tuple(map(int, value["shape"]))
    dtype = _DTYPES.get(str(value["dtype"]), str(value["dtype"]))
    if isinstance(dtype, torch.dtype) and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {shape} of {value['dtype']}")
    if begin < 0 or end < begin:
        raise ValueError(f"data_offsets {begin}, {end}")
    return Entry(dtype, shape, start + begin, end - begin)


def read_tensor(path: Path, name: str, entry: Entry, out: Tensor) -> None:
    """Fills `out`, of the entry's shape, with its numbers; without a copy where `out` is contiguous, on the CPU, and of
    the entry's dtype.

    Raises:
        ValueError: the file has become shorter.
    """
    assert isinstance(entry.dtype, torch.dtype)
    direct = out.device.type == "cpu" and out.dtype == entry.dtype and out.is_contiguous() and sys.byteorder == "little"
    target = out if direct else torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.begin)
        view = memoryview(as_bytes(target))
        done = 0
        while done < entry.nbytes and (count := file.readinto(view[done:])):  # at most 2 GB a call on Linux
            done += count
    if done < entry.nbytes:
        raise ValueError(f"{path}: truncated: tensor {name} has {done} of {entry.nbytes} bytes")
    if not direct:
        out.copy_(target)


def as_bytes(t: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(t.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]
) -> None:
    """Writes the tensors of `shapes`, all of `dtype`, asking `read(name)` for one at a time.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            t = read(name).to(device="cpu", dtype=dtype).contiguous()
            assert tuple(t.shape) == shape, (name, t.shape, shape)
            file.write(as_bytes(t))
