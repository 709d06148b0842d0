"""Builds the native library with CMake. Without a C++ compiler the package installs all the same, on `reference`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def missing_tool() -> str | None:
    """What stands in the way of a native build, or None."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler was found (install g++, or set CXX)"
    return None


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts `_native` where setuptools expects it."""

    def run(self) -> None:
        reason = missing_tool()
        if reason is not None:
            print(f"llama_fast: the native library is not built: {reason}", file=sys.stderr)
            self.extensions = []
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cmake = ["-m", "cmake"]
        configure = [
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        subprocess.run([sys.executable, *cmake, *configure], check=True)
        subprocess.run([sys.executable, *cmake, "--build", str(build_dir)], check=True)


setup(
    packages=["llama_fast", "llama_fast.ops", "llama_fast.train"],
    ext_modules=[Extension("llama_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
