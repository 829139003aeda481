"""Calls CMake, which has the list of native sources; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds all extension modules by one CMake run, into the folder that setuptools asks for."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("grank_kernels._cpu")).resolve().parent
        root = Path(__file__).resolve().parent
        # An editable installation and later in-place builds share one folder: a change compiles what depends on it.
        kept = root / "build" / f"native-{sys.implementation.cache_tag}"
        build = kept if self.inplace or self.editable_mode else Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(root), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "grank_kernels").glob("_c*.so")]


setup(ext_modules=[Extension("grank_kernels._cpu", [])], cmdclass={"build_ext": CMakeBuild})
