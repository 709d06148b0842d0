"""A file that `torch.load(weights_only=True)` reads, written one tensor at a time.

`torch.save` wants all tensors at once, which for a split of every matrix is a second copy of the model. The file is a
zip archive of stored entries: `data/KEY` the numbers of a storage, `data.pkl` the dictionary, in which a tensor is a
call of `torch._utils._rebuild_tensor_v2` on the persistent id ("storage", type, KEY, "cpu", length). Data begin at
multiples of 64 bytes, so that they can be mapped.

Source: torch/serialization.py, `_save`, and "Serialization semantics" of PyTorch's documentation.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast.weights.safetensors_file import as_bytes

_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA, _PADDING_ID = 30, 20, 0x4246  # PyTorch's own id of a padding field
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class _Storage:
    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.id = ("storage", _STORAGES[dtype], key, "cpu", numel)


class _Rebuild:
    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        strides = tuple(torch.empty(shape, device="meta").stride())
        self.call: tuple[Any, ...] = (
            torch._utils._rebuild_tensor_v2,
            (storage, 0, shape, strides, False, OrderedDict()),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.id if isinstance(value, _Storage) else None


class TorchFileWriter:
    """Collects tensors into the file `path`; `close` completes it.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._root = path.stem
        self._raw = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._zip = zipfile.ZipFile(self._raw, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._tensors: dict[str, _Rebuild] = {}

    def add(self, name: str, t: Tensor) -> None:
        """Writes one tensor, of a floating-point dtype of 16 bits or more, from any device."""
        t = t.to("cpu").contiguous()
        key = str(len(self._tensors))
        self._entry(f"data/{key}", as_bytes(t))
        self._tensors[name] = _Rebuild(_Storage(t.dtype, key, t.numel()), tuple(t.shape))

    def close(self) -> None:
        """Writes the dictionary and the archive's directory."""
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(self._tensors)
        self._entry("data.pkl", buffer.getbuffer())
        self._entry("byteorder", memoryview(b"little"))
        self._entry("version", memoryview(b"3\n"))
        self._zip.close()
        self._raw.close()

    def abandon(self) -> None:
        """Closes an incomplete file, which is then of no use."""
        with suppress(OSError, ValueError):
            self._zip.close()
        with suppress(OSError):
            self._raw.close()

    def _entry(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")  # its date is 1980-01-01: equal tensors give equal files
        begin = self._raw.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
        padding = -begin % _ALIGNMENT
        info.extra = _PADDING_ID.to_bytes(2, "little") + padding.to_bytes(2, "little") + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=True) as file:
            file.write(data)
