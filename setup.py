"""Builds the native libraries with CMake. Where they cannot, the package installs all the same, on plain PyTorch.

What counts as "cannot": no C++ compiler, or no Python headers. `llama-fast info` names what is missing. A compiler that
is there and fails is an error. MAX_JOBS bounds the parallel compilations, CXX chooses the compiler; `CXX=none` installs
without the native libraries.

The CUDA library is built where nvcc is found. CUDACXX names another nvcc, `CUDACXX=none` leaves the CUDA part out;
CUDA_ARCHS, in CMake's words and separated by spaces or semicolons, replaces "80-real 90a-real 100" ("90a" is 90a-real).
A build in place has the CUDA kernels compiled for the emulator as well, which tests run.
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
FOLDER = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"  # CMake's; a free-threaded Python has its own
COMPILERS = ("c++", "g++", "clang++")  # in CMake's order
# packages that stand beside llama_fast/ in the source tree
FOLDERS = {"llama_fast.benchmarks": "benchmarks", "llama_fast.kernels": "kernels"}


def obstacle() -> str | None:
    """What stands in the way of a native build, or None."""
    if sys.platform == "win32":
        return "it is for Linux and macOS: use WSL"
    chosen = os.environ.get("CXX", "").split()
    if chosen == ["none"]:
        return "CXX=none"
    if not any(shutil.which(c) for c in (chosen[:1] or COMPILERS)):
        return f"no C++ compiler ({chosen[0] if chosen else ', '.join(COMPILERS)}) was found: install g++"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return f"no Python headers ({include}/Python.h): install python3-dev"
    return None


def cuda_settings(emulated: bool) -> list[str]:
    """What the environment asks of the CUDA part, for CMake."""
    names = os.environ.get("CUDA_ARCHS", "80-real 90a-real 100").replace(";", " ").split()
    names = [f"{name}-real" if name.endswith("a") else name for name in names]
    wanted = os.environ.get("CUDACXX") != "none"
    return [
        f"-DLLAMA_FAST_CUDA={'ON' if wanted else 'OFF'}",
        f"-DLLAMA_FAST_EMULATED={'ON' if wanted and emulated else 'OFF'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(names)}",
    ]


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts the libraries where setuptools expects `_native`."""

    in_place = False

    def run(self) -> None:
        self.in_place = bool(self.inplace)  # setuptools builds elsewhere and copies
        super().run()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        package = ROOT / "llama_fast"
        for old in package.glob("_native_cuda*"):
            old.unlink()
        for folder in (Path(self.build_lib, "llama_fast"), FOLDER):
            for library in folder.glob("_native_cuda*.so"):
                shutil.copy2(library, package)

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in (target.parent, FOLDER):
            for old in folder.glob("_native_cuda*.so"):
                old.unlink()  # perhaps not to be built this time
        settings = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *cuda_settings(emulated=self.in_place),
        ]
        cmake, ninja = tool("cmake", "CMAKE_BIN_DIR"), tool("ninja", "BIN_DIR")
        if cmake is None:
            raise CompileError("cmake was not found: pip install cmake")
        if ninja is not None:  # named each time: the one of an earlier, isolated build is gone
            settings += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure = [cmake, f"-S{ROOT}", f"-B{FOLDER}", *settings]
        done = run_quietly(configure)
        if done.returncode:  # a folder left by another place of the tree, generator or compiler: once more from nothing
            shutil.rmtree(FOLDER, ignore_errors=True)
            done = run_quietly(configure)
        if done.returncode:
            raise CompileError(f"CMake could not configure the native library:\n{done.stdout}\n{HELP}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())  # make, without a number, starts all files at once
        if subprocess.run([cmake, "--build", str(FOLDER), "--parallel", jobs], check=False).returncode:
            raise CompileError(f"the native library did not compile; the compiler's messages stand above.\n{HELP}")


HELP = (
    "llama_fast needs a C++17 compiler: g++ 11, clang++ 14, or newer. MAX_JOBS=1 uses least memory, CXX names another "
    "compiler,\nand CXX=none installs without the native library: every op then runs on plain PyTorch. CUDACXX=none "
    "leaves out the CUDA\nlibrary alone."
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
    include_package_data=False,  # MANIFEST.in is for source distributions: no results, no log of the benchmarks
    package_data={"": ["*.toml", "*.json", "*.css"]},
    ext_modules=[] if reason else [Extension("llama_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
