"""Compiles kernels with the host's compiler, together with the emulator, into a shared library.

Objects and libraries are cached in build/cuda_emulation under a hash of compiler, flags and sources, and built under a
file lock: the processes of a test run and later runs share them.
"""

import fcntl
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "cuda_emulation"
RUNTIME = [HERE / f"{part}.cpp" for part in ("scheduler", "warp", "checker", "traffic")]

COMPILER = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}"]
RUNTIME_FLAGS = ["-O3"]
# -O1 compiles in half the time of -O2 and runs as fast, because the emulator takes most of the run time.
# Without sibling calls the emulator finds the source line of every access by its return address.
KERNEL_FLAGS = ["-O1", "-DGRANK_EMULATE_CUDA", "-fno-optimize-sibling-calls", "-Wno-unknown-pragmas"]
KERNEL_FLAGS += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
# Makes the compiler call the checker at every memory access; ThreadSanitizer's runtime is not linked.
CHECKED_FLAGS = ["-fsanitize=thread"]


def build(name: str, sources: Sequence[Path], *, checked: bool) -> Path:
    """The library `name` of the kernels and entry points in `sources` (.cu or .cpp)."""
    flags = KERNEL_FLAGS + (CHECKED_FLAGS if checked else [])
    objects = [_object(source, RUNTIME_FLAGS) for source in RUNTIME]
    objects += [_object(source, flags) for source in sources]
    target = CACHE / f"{name}-{_digest(*(path.name for path in objects))}.so"
    command = [*COMPILER, "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *map(str, objects)]
    return _made_once(target, command)


def _object(source: Path, flags: list[str]) -> Path:
    headers = sorted(
        [*HERE.glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    )
    contents = [path.read_text() for path in [source, *headers]]
    target = CACHE / f"{source.stem}-{_digest(_compiler_version(), *FLAGS, *flags, *contents)}.o"
    return _made_once(target, [*COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(source)])


def _made_once(target: Path, command: list[str]) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(target.suffix + ".lock")):
        if not target.exists():
            unfinished = target.with_suffix(".tmp")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
            unfinished.rename(target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _compiler_version() -> str:
    return subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
