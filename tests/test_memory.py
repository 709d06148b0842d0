"""keep_host_memory, each time in a process of its own: what it says, and that pages are no longer faulted in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"

FAULTS = """
import resource, torch
import llama_fast as lf

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(64 << 18)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{call}
for _ in range(4):
    faults()  # the heap grows until a tensor finds a place that one before has left: after 1 to 10 tensors
print(faults())
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_memory_is_reused() -> None:
    default, kept = (int(_run(FAULTS.format(call=call))) for call in ("", "lf.keep_host_memory()"))
    # 8 x 64 MB are 131072 pages of 4 kB, or 256 of 2 MB where the system uses huge pages of its own accord
    assert kept < 128 < default, (kept, default)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_report_and_second_call() -> None:
    code = "import llama_fast as lf; a = lf.keep_host_memory(); assert a is lf.keep_host_memory() and a.kept; print(a)"
    said = _run(code)
    assert "kept (M_MMAP_MAX = 0, M_TRIM_THRESHOLD = -1, M_TOP_PAD = " in said


@pytest.mark.parametrize(
    ("pretend", "reason"),
    [
        ("sys.platform = 'darwin'", "darwin has no mallopt"),
        ("ctypes.CDLL = lambda _: object()", "the C library is not glibc"),
        (
            "memory._library_of = lambda _, symbol: f'lib{symbol}.so'; memory._glibc_serves = lambda _: False",
            "malloc is that of libmalloc.so",
        ),
    ],
)
def test_says_why_it_does_nothing(pretend: str, reason: str) -> None:
    code = f"import ctypes, sys; import llama_fast.memory as memory; {pretend}; print(memory.keep_host_memory())"
    if sys.platform != "linux" and "darwin" not in pretend:
        pytest.skip("asks glibc, which stands on Linux only")
    assert _run(code) == f"host memory: as the system's default: {reason}"


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize(("malloc", "serves"), [("process.malloc", True), ("lambda _: None", False)])
def test_whether_glibc_serves_is_asked_of_its_counts(malloc: str, serves: bool) -> None:
    """Where malloc's address says nothing: an executable at a fixed address, such as Debian's python3."""
    code = (
        "import ctypes, types; from llama_fast import memory; process = ctypes.CDLL(None)\n"
        f"class Pretend:\n    mallinfo2, free = process.mallinfo2, process.free\n"
        f"class Malloc:\n    restype = None\n    def __call__(self, size):\n"
        f"        process.malloc.restype = ctypes.c_void_p\n        return ({malloc})(size)\n"
        "Pretend.malloc = Malloc(); print(memory._glibc_serves(Pretend))"
    )
    assert _run(code) == str(serves)


def test_import_leaves_the_allocator_alone() -> None:
    code = "import llama_fast, llama_fast.memory as m; print(m.keep_host_memory.cache_info().misses)"
    assert _run(code) == "0"
