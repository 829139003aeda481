"""Calls CMake, which owns the list of native sources; everything else stands in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Builds every extension module by one CMake run, into the place setuptools asks for."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("grank_kernels._cpu")).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}", *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in Path(self.build_lib, "grank_kernels").glob("_c*.so")]


setup(ext_modules=[Extension("grank_kernels._cpu", [])], cmdclass={"build_ext": CMakeBuild})
