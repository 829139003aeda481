"""Instruction counts of the CPU kernels for small fixed calls: a reproducible measure of speed.

python -m benchmarks.instruction_counts            # counts now, beside the budget
python -m benchmarks.instruction_counts --write    # new budget for this processor's instruction sets

Counts the instructions in the native module on one thread, by single-stepping (tests/csrc/instruction_counter.cpp).
Compilers differ, so a budget names its compiler and holds for modules of that compiler only.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "csrc" / "instruction_counter.cpp"
BUDGET = Path(__file__).with_name("instruction_budget.json")
MARGIN = 0.03  # a kernel further over its budget has become slower
Counts = dict[str, dict[str, int]]  # by call, then instruction set


class Budget(NamedTuple):
    compiler: str
    margin: float
    counts: Counts

    @classmethod
    def read(cls, path: Path = BUDGET) -> "Budget":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path = BUDGET) -> None:
        lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(by_isa)}" for name, by_isa in self.counts.items())
        facts = f'"compiler": {json.dumps(self.compiler)},\n "margin": {self.margin}'
        path.write_text(f'{{{facts},\n "counts": {{\n  {lines}\n}}}}\n')

    def exceeded(self, isa: str, counted: dict[str, int]) -> list[str]:
        """One line per call that is over its budget or has none."""
        faults = []
        for name, count in counted.items():
            budget = self.counts.get(name, {}).get(isa)
            if budget is None:
                faults.append(f"{name}, {isa}: no budget for it")
            elif count > budget * (1 + self.margin):
                faults.append(f"{name}, {isa}: {count:_} instructions, {count / budget - 1:+.1%} on {budget:_}")
        return faults


class UncountableError(Exception):
    """Instructions cannot be counted on this machine; the message says why."""


class Counter:
    """Counts the instructions of calls into the native module of this process."""

    def __init__(self) -> None:
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            raise UncountableError(f"needs Linux on x86-64, this is {platform.system()} on {platform.machine()}")
        if shutil.which("g++") is None:
            raise UncountableError("needs g++ to compile tests/csrc/instruction_counter.cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "counter.so"
            command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
            subprocess.run(command, check=True)
            self._count = ctypes.PyDLL(str(library)).count_instructions
        self._count.argtypes = [ctypes.c_char_p, ctypes.py_object, ctypes.py_object]
        self._count.restype = ctypes.c_int64

    def __call__(self, library: str, function: Callable[..., object], *arguments: object) -> int:
        """Instructions of `function(*arguments)` executed in the library at a path."""
        count = self._count(os.fsencode(library), function, arguments)
        if count == -2:
            raise UncountableError("the trap flag has no effect on this machine")
        if count < 0:
            raise RuntimeError(f"{library} is not loaded" if count == -1 else f"{function} raised")
        return int(count)


class CountingModule:
    """Replaces the native module in the launchers, and adds up the instructions of calls to it."""

    def __init__(self, module: ModuleType, counter: Counter) -> None:
        self.module, self.counter, self.count = module, counter, 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        def counted(*arguments: object) -> None:
            self.count += self.counter(str(self.module.__file__), getattr(self.module, name), *arguments)

        return counted


def count_here() -> dict[str, int]:
    """Counts every call under this process's instruction set, on its second run, when all memory is allocated."""
    import torch

    from benchmarks.kernel_cases import counted_cases
    from grank_kernels.backends import cpu

    torch.set_num_threads(1)
    counter, native, found = Counter(), cpu._cpu, {}
    for name, call in counted_cases().items():
        call()
        cpu._cpu = module = CountingModule(native, counter)  # type: ignore[assignment]
        call()
        cpu._cpu = native
        found[name] = module.count
    return found


def count(isa: str) -> dict[str, int]:
    """Counts in a new process under an instruction set, which is fixed per process.

    Raises:
        UncountableError: nothing can be counted on this machine.
        RuntimeError: the process failed otherwise.
    """
    command = [sys.executable, "-m", "benchmarks.instruction_counts", "--here"]
    environment = {**os.environ, "GRANK_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise UncountableError(answer)
    return dict(answer)


def compiler() -> str:
    """Compiler of the native module, as recorded in it."""
    from grank_kernels import _cpu

    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(_cpu.__file__).read_bytes())
    return found[0].decode() if found else "unknown"


def instruction_sets() -> list[str]:
    """Instruction sets of this processor, weakest first."""
    from grank_kernels.backends import cpu

    return [isa for isa, here in cpu.isas().items() if here]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="save the counts as the budget")
    parser.add_argument("--here", action="store_true", help="print JSON of this process's instruction set only")
    options = parser.parse_args()
    if options.here:
        try:
            print(json.dumps(count_here()))
        except UncountableError as reason:
            print(json.dumps(str(reason)))
        return
    budget = Budget.read()
    counts: Counts = budget.counts if options.write and budget.compiler == compiler() else {}
    for isa in instruction_sets():
        for name, number in count(isa).items():
            counts.setdefault(name, {})[isa] = number
    if options.write:
        Budget(compiler(), MARGIN, counts).write()
        return
    for name, by_isa in counts.items():
        for isa, number in by_isa.items():
            print(f"{name:45}{isa:>12}{number:>9_} of {budget.counts.get(name, {}).get(isa, 0):_}")


if __name__ == "__main__":
    main()
