"""Builds the native library with CMake. Where it cannot be built the package installs all the same, on `reference`.

What counts as "cannot": no C++ compiler, or no Python headers. `llama-fast info` names what is missing. A compiler that
is there and fails is an error. MAX_JOBS bounds the parallel compilations, CXX chooses the compiler; `CXX=none` installs
without the native library.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
COMPILERS = ("c++", "g++", "clang++")  # in CMake's order
# packages that stand beside llama_fast/ in the source tree
FOLDERS = {"llama_fast.benchmarks": "benchmarks", "llama_fast.kernels": "kernels"}


def obstacle() -> str | None:
    """What stands in the way of a native build, or None."""
    chosen = os.environ.get("CXX", "").split()
    if not any(shutil.which(c) for c in (chosen[:1] or COMPILERS)):
        return f"no C++ compiler ({chosen[0] if chosen else ', '.join(COMPILERS)}) was found: install g++"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"no Python headers ({include}/Python.h): install python3-dev"
    return None


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts `_native` where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        settings = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if cmake is None:
            raise CompileError("cmake was not found: pip install cmake")
        if ninja is not None:  # named each time: the one of an earlier, isolated build is gone
            settings += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure = [cmake, f"-S{ROOT}", f"-B{folder}", *settings]
        done = run_quietly(configure)
        if done.returncode:  # a folder left by another place of the tree, generator or compiler: once more from nothing
            shutil.rmtree(folder, ignore_errors=True)
            done = run_quietly(configure)
        if done.returncode:
            raise CompileError(f"CMake could not configure the native library:\n{done.stdout}\n{HELP}")
        jobs = ["--parallel", *filter(None, [os.environ.get("MAX_JOBS")])]
        if subprocess.run([cmake, "--build", str(folder), *jobs], check=False).returncode:
            raise CompileError(f"the native library did not compile; the compiler's messages stand above.\n{HELP}")


HELP = (
    "llama_fast needs a C++17 compiler with OpenMP (g++ 9 or newer). MAX_JOBS=1 uses least memory, CXX names another "
    "compiler,\nand CXX=none installs without the native library: every op then runs on plain PyTorch."
)


def tool(module: str, folder: str) -> str | None:
    """Path of a program of the build requirements, else of the system, which may be too old."""
    try:
        bin_dir = str(getattr(importlib.import_module(module), folder))
    except (ImportError, AttributeError):
        bin_dir = None
    return shutil.which(module, path=bin_dir) or shutil.which(module)


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


reason = obstacle()
if reason is not None:
    print(f"llama_fast: the native library is not built: {reason}", file=sys.stderr)

setup(
    packages=[*find_packages(include=["llama_fast", "llama_fast.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={"": ["*.toml", "*.json", "*.css"]},
    ext_modules=[] if reason else [Extension("llama_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
