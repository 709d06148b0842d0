"""Which kernels of ours have been shown to be right and not slower than the vendor's, by device class.

`proven.json` is written by `python -m benchmarks.gpu prove` and committed: {device class: {backend: {primitive: [dtype
class]}}}. On a GPU the dispatch takes a kernel of ours by default only where it is listed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("proven.json")


@functools.cache
def device_class(device: torch.device) -> str:
    """ "sm_90", "gfx942" of a GPU; "cpu" of anything else (Triton's interpreter)."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dtype_class(dtype: torch.dtype) -> str:
    """ "half" of float16 and bfloat16, else the name of the dtype."""
    return "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")


@functools.cache
def listed() -> dict[str, dict[str, dict[str, list[str]]]]:
    """What the committed file lists."""
    return json.loads(FILE.read_text())


def objection(
    backend: str, primitive: str, dtype: torch.dtype, device: torch.device, untimed: str | None = None
) -> str | None:
    """Why `backend` is not chosen for `primitive` unless it is asked for by name, or None.

    `untimed` says which of the sizes lies outside those that were timed, if one does.
    """
    place, kind = device_class(device), dtype_class(dtype)
    proven = kind in listed().get(place, {}).get(backend, {}).get(primitive, ())
    if proven and untimed is None:
        return None
    why = f"not timed where {untimed}" if proven else f"unproven on {place} in {kind}"
    return f'{why}: lf.backend("{backend}") or LLAMA_FAST_BACKEND={backend} runs it'
