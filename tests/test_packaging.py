"""Wheels and source distributions, with and without a compiler, without torch while building; what importing costs.

A compiler wrapper that adds -O0, and no CUDA, keep the native builds of this file short.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("pybind11", "cmake", "setuptools", "pip")),
    reason="the build requirements are not installed here",
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def _run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "LD_PRELOAD")}
    environment |= {"CUDACXX": "none"} | env
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a checkout has them."""
    target = tmp_path_factory.mktemp("checkout") / "llama_fast"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "build*", "dist", "demo", "runs", "*.egg-info", "__pycache__", "*.so"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which `import torch` fails, as in a build environment."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('there is no torch in a build environment')\n")
    return str(folder)


@pytest.fixture(scope="module")
def quick_cxx(tmp_path_factory: pytest.TempPathFactory) -> str:
    script = tmp_path_factory.mktemp("cxx") / "c++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def _wheel(tree: Path, out: Path, **env: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree)]
    done = _run(command, tree.parent, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def _install(wheel: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    done = _run(command, target.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory, no_torch: str, quick_cxx: str) -> Path:
    """Built without torch, by the compiler that CXX names."""
    return _wheel(tree, tmp_path_factory.mktemp("wheel"), PYTHONPATH=no_torch, CXX=quick_cxx)


@needs_tools
@needs_compiler
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"llama_fast", wheel.name.split("-")[0] + "-0.1.0.dist-info"}
    assert any(n.startswith("llama_fast/_native.") for n in names)
    assert "llama_fast/benchmarks/harness.py" in names
    assert "llama_fast/kernels/launch.py" in names
    assert "llama_fast/ops/proven.json" in names
    for source in (ROOT / "llama_fast").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names
    assert not any("test" in n or "/results/" in n or n.endswith("/LOG.md") for n in names)


@needs_tools
@needs_compiler
def test_installed_wheel_runs_native(wheel: Path, tmp_path: Path) -> None:
    _install(wheel, tmp_path / "site")
    code = (
        "import torch, llama_fast as lf, llama_fast.benchmarks.suite as suite\n"
        "from llama_fast.ops import native\n"
        f"assert suite.__file__.startswith({str(tmp_path)!r}), suite.__file__\n"
        "assert native.isas()[-1] == 'portable'\n"
        "import llama_fast.kernels\n"
        f"assert llama_fast.kernels.__path__ == [{str(tmp_path / 'site' / 'llama_fast' / 'kernels')!r}]\n"
        "x = torch.randn(3, 8)\n"
        "torch.testing.assert_close(lf.rms_norm(x, torch.ones(8)), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))\n"
        "print(lf.explain('rms_norm', x, torch.ones(8)))"
    )
    done = _run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert "cpu: runs" in done.stdout


@needs_tools
@needs_compiler
def test_second_build_compiles_nothing(tree: Path, wheel: Path, quick_cxx: str) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    assert _run(command, tree, CXX=quick_cxx).returncode == 0  # links into the source tree
    done = _run(command, tree, CXX=quick_cxx)
    assert "no work to do" in done.stdout + done.stderr
    assert "Building CXX" not in done.stdout


@needs_tools
@needs_compiler
def test_a_library_that_is_no_longer_built_is_not_installed(tree: Path, wheel: Path, quick_cxx: str) -> None:
    (folder,) = (tree / "build").glob("native-*")
    for place in (folder, tree / "llama_fast"):
        (place / "_native_cuda_emulated.of-yesterday.so").touch()
    done = _run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, CXX=quick_cxx)  # with CUDACXX=none
    assert done.returncode == 0, done.stderr
    assert not [*(tree / "llama_fast").glob("_native_cuda*")]


@needs_tools
@pytest.mark.parametrize("compiler", ["g++-11", "clang++"])
def test_oldest_compiler_and_another_makers(compiler: str, tree: Path, tmp_path: Path, no_torch: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which(compiler)} "$@" -O0 -Werror\n')
    script.chmod(0o755)
    spaced = tmp_path / "a path with spaces"
    shutil.copytree(tree, spaced, ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info"))
    _install(_wheel(spaced, tmp_path / "wheel", PYTHONPATH=no_torch, CXX=str(script)), tmp_path / "site")
    code = (
        "import torch, llama_fast as lf\n"
        "from llama_fast.ops import native\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(64, 2048)\n"
        "for isa in native.isas():\n"
        "    native.set_isa(isa)\n"
        "    with lf.backend('cpu'):\n"
        "        y = lf.rms_norm(x, torch.ones(2048))\n"
        "    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (2048,), eps=1e-6))\n"
        "print(lf.__path__)"
    )
    done = _run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


@needs_tools
@needs_compiler
def test_compile_error_fails_and_says_what_to_do(tree: Path, wheel: Path, quick_cxx: str) -> None:
    broken = tree / "csrc" / "cpu" / "broken.cpp"
    broken.write_text("#error planted by the test\n")
    try:
        done = _run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, CXX=quick_cxx)
    finally:
        broken.unlink()
    assert done.returncode != 0
    assert "planted by the test" in done.stdout + done.stderr
    assert "CXX=none installs without the native library" in done.stderr


@needs_tools
def test_without_a_compiler_it_installs_on_reference(tree: Path, tmp_path: Path, no_torch: str) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    (tree / "llama_fast").joinpath("_native.so").unlink(missing_ok=True)
    clean = tmp_path / "checkout"
    shutil.copytree(tree, clean, ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info"))
    wheel = _wheel(clean, tmp_path / "wheel", PATH=str(empty), PYTHONPATH=no_torch)
    assert wheel.name.endswith("py3-none-any.whl")
    _install(wheel, tmp_path / "site")
    # an editable install in the same environment would lend its _native to the package without one
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
    )
    code = (
        "import torch, llama_fast as lf\n"
        "x = torch.ones(2, 4)\n"
        "print(lf.explain('rms_norm', x, x[0]), lf.rms_norm(x, x[0]))"
    )
    done = _run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert "reference: runs" in done.stdout
    command = [sys.executable, "-m", "llama_fast.cli", "info"]
    done = _run(command, tmp_path, PATH=str(empty), PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
    assert "apt install g++" in done.stdout


@needs_tools
def test_source_distribution_is_complete(tree: Path, tmp_path: Path, no_torch: str) -> None:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = _run([sys.executable, "-c", code], tree, PYTHONPATH=no_torch)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    for folder, suffix in (("csrc", "*.[ch]*"), ("llama_fast", "*.py"), ("benchmarks", "*.py"), ("tests", "*.py")):
        for source in (ROOT / folder).rglob(suffix):
            assert source.relative_to(ROOT).as_posix() in names
    for folder in ("docs", "benchmarks/results", "results", ".ci"):  # which tests read, and README.md links to
        for file in (ROOT / folder).rglob("*"):
            assert file.is_dir() or file.relative_to(ROOT).as_posix() in names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", ".clang-format"} <= names
    assert not any(n.endswith(".so") for n in names)


def test_torch_has_both_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.10,<2.15"' in text
    makefile = (ROOT / "Makefile").read_text()
    assert "\nTORCH  := torch>=2.10,<2.14\n" in makefile  # what the tests run on
    assert "--editable '.[dev]' '$(TORCH)'\n" in makefile  # in the command that installs the project
    assert "torch" not in text.split("[project]")[0].replace("# No torch here", "").split("requires =")[1]


def test_import_is_light_and_probes_no_device() -> None:
    """Under 50 ms beyond torch: the best of nine processes, as other work on the machine only ever adds."""
    code = (
        "import time, torch\n"
        "def probe(*_): raise AssertionError('a device was probed')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_capability', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, probe)\n"
        "start = time.perf_counter()\n"
        "import llama_fast\n"
        "print(time.perf_counter() - start)"
    )
    seconds = []
    for _ in range(9):
        done = _run([sys.executable, "-c", code], ROOT)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if seconds[-1] < 0.05:
            break
    assert min(seconds) < 0.05, seconds


def test_version_is_one() -> None:
    import llama_fast

    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{llama_fast.__version__}"' in text
    try:
        assert importlib.metadata.version("llama_fast") == llama_fast.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llama_fast is not installed here")
