"""Settings of the host allocator: freed memory stays with the process, for the next tensor."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

# Parameter numbers of glibc's malloc.h and what each is set to; mallopt(3) documents them.
_SETTINGS = {
    "M_MMAP_MAX": (-4, 0),  # no allocation, however large, is mapped and unmapped on its own
    "M_TRIM_THRESHOLD": (-1, -1),  # never give the top of the heap back
    "M_TOP_PAD": (-2, 512 << 20),  # grow the heap by this much more than asked for; untouched, it takes no memory
}


@dataclass(frozen=True)
class HostMemory:
    """What `keep_host_memory` did.

    Args:
        kept: whether freed memory now stays with the process.
        settings: mallopt parameter -> value, of those that the allocator accepted.
        reason: why nothing, or not all, was done; else "".
    """

    kept: bool
    settings: dict[str, int]
    reason: str

    def __str__(self) -> str:
        done = ", ".join(f"{name} = {value}" for name, value in self.settings.items())
        said = f"host memory: freed memory is kept ({done})" if self.kept else "host memory: as the system's default"
        return f"{said}: {self.reason}" if self.reason else said


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _library_of(process: ctypes.CDLL, symbol: str) -> str:
    """File of the library in which a symbol of this process is defined; "" if unknown."""
    info = _DlInfo()
    address = ctypes.cast(getattr(process, symbol), ctypes.c_void_p)
    found = process.dladdr(address, ctypes.byref(info))
    return (info.dli_fname or b"").decode(errors="replace") if found else ""


class _MallInfo2(ctypes.Structure):
    _fields_ = (
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),  # bytes in mappings of their own
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),  # bytes in use elsewhere
        ("after", ctypes.c_size_t * 2),
    )


def _glibc_serves(process: ctypes.CDLL) -> bool:
    """Whether glibc's own counts see an allocation. In an executable at a fixed address, as Debian's python3 is, the
    address of malloc is in the executable, whoever is behind it."""
    if not hasattr(process, "mallinfo2"):
        return False
    process.mallinfo2.restype, process.malloc.restype = _MallInfo2, ctypes.c_void_p
    size = 1 << 26

    def used() -> int:
        info = process.mallinfo2()
        return int(info.hblkhd + info.uordblks)

    before = used()
    block = process.malloc(ctypes.c_size_t(size))
    served = used() - before >= size
    process.free(ctypes.c_void_p(block))
    return served


@functools.cache
def keep_host_memory() -> HostMemory:
    """Keep freed host memory in the process, so that the next large tensor need not be faulted in page by page.

    By default glibc maps each large tensor anew and unmaps it when it is freed, and the system hands over every page
    zeroed, at its first touch: for the memory-bound ops that costs several times what the op itself does. This turns it
    off for the whole process, with three documented mallopt settings. The process then never becomes smaller, and can
    become larger than its tensors ever were together: docs/memory.md has figures. Meant for programs, early in their
    run; the library never calls it on import.

    Returns:
        What was done; print it. Where the C library is not glibc (musl, macOS, Windows) or malloc is another library's
        (jemalloc, tcmalloc), nothing is done and `reason` says so. A second call does nothing and returns the same.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return HostMemory(False, {}, f"{sys.platform} has no mallopt")
    process = ctypes.CDLL(None)
    if not hasattr(process, "gnu_get_libc_version") or not hasattr(process, "mallopt"):
        return HostMemory(False, {}, "the C library is not glibc")
    ours, theirs = _library_of(process, "mallopt"), _library_of(process, "malloc")
    if ours != theirs and not _glibc_serves(process):
        return HostMemory(False, {}, f"malloc is that of {theirs}")
    accepted = {name: value for name, (number, value) in _SETTINGS.items() if process.mallopt(number, value) == 1}
    refused = [name for name in _SETTINGS if name not in accepted]
    kept = "M_MMAP_MAX" in accepted and "M_TRIM_THRESHOLD" in accepted
    return HostMemory(kept, accepted, f"glibc refused {', '.join(refused)}" if refused else "")
