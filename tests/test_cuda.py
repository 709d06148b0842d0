"""The CUDA library: as built, and its kernels in the emulator: tests/cuda_<what>.py, each in a process of its own.

LLAMA_FAST_EMULATE must be set before llama_fast is imported and changes the whole process, so those files are not
collected with the others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import subprocesses
import torch

import llama_fast as lf
from llama_fast import info
from llama_fast.ops import cuda, dispatch, proven, table

FILES = sorted(Path(__file__).parent.glob("cuda_*.py"))

needs_library = pytest.mark.skipif(not cuda.architectures(), reason=f"{cuda.unavailable()}")
needs_emulated = pytest.mark.skipif(
    importlib.util.find_spec("llama_fast._native_cuda_emulated") is None,
    reason="the CUDA kernels are not compiled for the emulator: python setup.py build_ext --inplace does it",
)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The files, at the same time."""
    started = {path.stem: subprocesses.start([path], LLAMA_FAST_EMULATE="1") for path in FILES}
    yield started
    for process in started.values():
        process.kill()


@needs_emulated
@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_in_the_emulator(processes: dict[str, subprocess.Popen[str]], name: str) -> None:
    out, _ = processes[name].communicate()
    assert processes[name].returncode == 0, out[-20000:]
    assert re.search(r"[1-9]\d* passed", out)


@needs_library
def test_the_library_needs_no_driver_and_no_shared_runtime() -> None:
    from llama_fast import _native_cuda

    needed = subprocess.run(["readelf", "-d", _native_cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert not re.search(r"lib(cuda|cudart|torch|c10)", needed)


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_backend_says_so() -> None:
    x = torch.randn(2, 8)
    assert "torch sees no CUDA device" in cuda.unavailable()
    assert "torch sees no CUDA device" in dict(info.machine())["CUDA library"]
    with pytest.raises(lf.NotSupported, match="runs on cuda, the tensors are on cpu"), lf.backend("cuda"):
        lf.rms_norm(x, x[0])


def test_on_amd_gpus_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", object())
    monkeypatch.setattr(torch.version, "hip", "7.1")  # a torch that calls them cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (11, 0))  # gfx1100
    assert cuda.unavailable() == "the CUDA library runs on NVIDIA GPUs, and this torch is built for AMD's"


def test_without_the_library_the_backend_says_so(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['llama_fast._native_cuda'] = None\n"  # what Python raises ImportError for
        "from llama_fast import info\n"
        "from llama_fast.ops import cuda\n"
        "assert cuda.architectures() == []\n"
        "print(dict(info.machine())['CUDA library'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "the CUDA library is not built" in done.stdout
    assert "nvcc" in done.stdout


@pytest.mark.parametrize(
    ("built", "capability", "told"),
    [
        ("80-real 90a-real 100", (9, 0), False),
        ("80", (9, 0), True),
        ("80 90-real", (9, 0), True),
        ("80", (8, 0), False),
    ],
)
def test_a_build_without_the_kernels_that_were_timed_is_not_taken_by_default(
    monkeypatch: pytest.MonkeyPatch, built: str, capability: tuple[int, int], told: bool
) -> None:
    monkeypatch.setattr(cuda, "architectures", built.split)
    monkeypatch.setattr(dispatch, "unavailable", lambda module: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(proven, "device_class", lambda _: "sm_90")
    backend = table.ATTENTION.backends[0]
    assert backend.name == "cuda"
    dims = {"B": 1, "T": 128, "S": 128, "H": 2, "G": 2, "D": 64}
    text = dispatch._unproven(backend, "attention_fwd", dims, torch.bfloat16, torch.device("cuda"))
    assert (text is not None) == told
    if told:
        expected = f'not timed where the library is built for {built}, without 90a-real: lf.backend("cuda")'
        assert str(text).startswith(expected)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("100", (10, 0), True),
        ("100", (10, 3), True),
        ("100", (12, 0), True),  # its PTX
        ("100", (9, 0), False),
        ("100-real", (12, 0), False),
        ("80-real 100-virtual", (12, 0), True),
    ],
)
def test_which_devices_a_build_serves(
    monkeypatch: pytest.MonkeyPatch, built: str, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(cuda, "architectures", built.split)
    monkeypatch.setattr(cuda, "_library", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    reason = cuda.unavailable()
    assert (reason is None) == runs, reason
    if not runs:
        assert f"built for {built}, this machine has sm_" in str(reason)
