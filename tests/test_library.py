"""A native library of another version is reported when llama_fast is imported, and not used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fast.ops import library

ROOT = Path(__file__).parents[1]


def test_python_and_csrc_carry_the_same_number() -> None:
    found = re.search(r"constexpr int kInterface = (\d+);", (ROOT / "csrc" / "ops.h").read_text())
    assert found
    assert int(found[1]) == library.INTERFACE


@pytest.mark.parametrize("name", ["_native", "_native_cuda", "_native_cuda_emulated"])
def test_a_library_that_is_built_carries_it(name: str) -> None:
    module, reason = library.load(name)
    if module is None:
        assert reason is not None
        assert "is not built" in reason or "is not used" in reason, reason
        pytest.skip(reason)
    assert module.interface == library.INTERFACE
    assert reason is None


@pytest.mark.parametrize("number", [None, library.INTERFACE + 1])
@pytest.mark.parametrize("name", ["_native", "_native_cuda", "_native_cuda_emulated"])
def test_one_of_another_version_is_reported_at_import_and_not_used(name: str, number: int | None) -> None:
    code = f"""
import sys, types
sys.modules["llama_fast.{name}"] = stale = types.ModuleType("stale")
if {number} is not None:
    stale.interface = {number}
import torch
import llama_fast as lf
from llama_fast import info
from llama_fast.ops import cuda, native
x = torch.randn(3, 8)
torch.testing.assert_close(lf.rms_norm(x, torch.ones(8)), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
print((native if "{name}" == "_native" else cuda).unavailable())
print(dict(info.machine())["native library" if "{name}" == "_native" else "CUDA library"])
"""
    environment = {**os.environ, "LLAMA_FAST_EMULATE": str(int(name == "_native_cuda_emulated"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    expected = f"is of another version: run make build (its interface is {number or 0}, expected {library.INTERFACE})"
    reported, described = done.stdout.splitlines()
    assert expected in reported
    assert expected in described
    assert done.stderr.count(expected) == 1


@pytest.mark.parametrize("name", ["_native", "_native_cuda"])
def test_an_installed_one_that_the_source_tree_hides_is_reported(name: str, tmp_path: Path) -> None:
    """`pip install .`, then Python in the clone: llama_fast is the source tree, where nothing is built."""
    for folder in ("llama_fast", "llama_fast-0.1.0.dist-info"):
        (tmp_path / folder).mkdir()
    (tmp_path / "llama_fast" / f"{name}.so").touch()
    (tmp_path / "llama_fast-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_fast\n")
    code = f"""
import sys
sys.modules["llama_fast.{name}"] = None
from llama_fast import info
from llama_fast.ops import cuda, native
print((native if "{name}" == "_native" else cuda).unavailable())
print(dict(info.machine())["native library" if "{name}" == "_native" else "CUDA library"])
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    expected = f"in {tmp_path / 'llama_fast'} is not used: Python found the source tree {ROOT} before it"
    assert all(expected in line for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count(expected) == 1


@pytest.mark.parametrize("name", ["_native", "_native_cuda"])
def test_one_that_cannot_be_loaded_is_reported_at_import(name: str) -> None:
    code = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "llama_fast.{name}":
            raise ImportError("undefined symbol: planted")
sys.meta_path.insert(0, Broken())
import torch
import llama_fast as lf
from llama_fast.ops import cuda, native
lf.rms_norm(torch.ones(3, 8), torch.ones(8))
print((native if "{name}" == "_native" else cuda).unavailable())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded (undefined symbol: planted)" in done.stdout
    assert done.stderr.count("cannot be loaded (undefined symbol: planted)") == 1


def test_torchs_number_of_threads_holds_in_another_thread() -> None:
    code = """
import ctypes, threading, torch
import llama_fast as lf
from llama_fast.ops import native
torch.set_num_threads(2)
def run():
    lf.rms_norm(torch.ones(3, 8), torch.ones(8))
    print(ctypes.CDLL(None).omp_get_max_threads() if native.isas() else 2)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.stdout == "2\n", done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a library finds what the process has loaded")
def test_the_openmp_runtime_is_torchs_where_torch_keeps_it_to_itself() -> None:
    """As in torch's wheels for ARM64, whose libtorch_global_deps.so does not name the runtime."""
    if library.load("_native")[0] is None:
        pytest.skip("the native library is not built")
    code = """
import ctypes
whole, ctypes.RTLD_GLOBAL = ctypes.RTLD_GLOBAL, ctypes.RTLD_LOCAL
import torch
ctypes.RTLD_GLOBAL = whole
print(hasattr(ctypes.CDLL(None), "GOMP_parallel"))
from llama_fast.ops import native
print(native.unavailable())
import re
print(len({line.split()[-1] for line in open("/proc/self/maps") if re.search("lib(g|i)?omp[^/]*[.]so", line)}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False", "None", "1"]
