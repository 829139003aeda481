"""Compiles template kernels to PTX with nvcc, if it is installed."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "ptx_emulation"
HEADERS = sorted([*CUDA.glob("*.cuh"), *CUDA.glob("*.h")])
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(["/usr/local/cuda/bin", "/opt/cuda/bin"]))
MISSING = None if NVCC else "nvcc is not installed"


@cache
def ptx_of(header: str, *instantiations: str) -> str:
    """PTX for sm_80 of `template __global__ void grank::cuda::<instantiation>;`, from a header of csrc/cuda."""
    source = f'#include "{header}"\nnamespace grank::cuda {{\n'
    source += "".join(f"template __global__ void {each};\n" for each in instantiations) + "}\n"
    return compile_ptx(source, HEADERS)


def compile_ptx(source: str, headers: Sequence[Path] = ()) -> str:
    """PTX of a source, cached under build/ by the content of the sources and the version of nvcc."""
    parts = [source, _version(), *(path.read_text() for path in headers)]
    target = CACHE / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.ptx"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        given, made = (target.with_suffix(f".{os.getpid()}.{suffix}") for suffix in ("cu", "tmp"))
        given.write_text(source)
        command = [
            str(NVCC),
            "-std=c++17",
            "-arch=sm_80",
            "-lineinfo",
            "-ptx",
            f"-I{CUDA}",
            str(given),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        given.unlink()
        made.rename(target)
    return target.read_text()


@cache
def _version() -> str:
    return subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
