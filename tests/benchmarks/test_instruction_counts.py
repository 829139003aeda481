"""The CPU kernels stay within their instruction budget, and an excess is detected."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from benchmarks import instruction_counts
from benchmarks.instruction_counts import Budget, Counter, UncountableError
from grank_kernels.backends import cpu

ISAS = instruction_counts.instruction_sets() if cpu.unavailable() is None else []
LOOP = """
extern "C" void spin(long n) {
  asm volatile("1: dec %0\\n jnz 1b" : "+r"(n) : : "cc");
}
"""


@cache
def counted(isa: str) -> dict[str, int]:
    try:
        return instruction_counts.count(isa)
    except UncountableError as reason:
        pytest.skip(f"instructions cannot be counted here: {reason}")


def budget() -> Budget:
    found = Budget.read()
    if found.compiler != instruction_counts.compiler():
        pytest.skip(f"the budget is of {found.compiler}, the native module of {instruction_counts.compiler()}")
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_counter_counts_a_known_loop(tmp_path: Path) -> None:
    (tmp_path / "loop.cpp").write_text(LOOP)
    library = tmp_path / "loop.so"
    subprocess.run(["g++", "-O2", "-shared", "-fPIC", "loop.cpp", "-o", library], cwd=tmp_path, check=True)
    spin = ctypes.CDLL(str(library)).spin
    spin(1)  # resolves the symbol
    try:
        counter = Counter()
        short, long = (counter(str(library), spin, turns) for turns in (100, 350))
    except UncountableError as reason:
        pytest.skip(f"instructions cannot be counted here: {reason}")
    assert long - short == 2 * 250
    assert 200 < short < 220
    with pytest.raises(RuntimeError, match=r"nowhere\.so is not loaded"):
        counter("nowhere.so", spin, 1)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_keep_to_their_budget(isa: str) -> None:
    allowed = budget()
    assert counted(isa).keys() == allowed.counts.keys()
    assert not allowed.exceeded(isa, counted(isa))


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in ISAS, reason="one instruction set here")
def test_the_same_call_executes_the_same_instructions() -> None:
    assert instruction_counts.count("avx2") == counted("avx2")


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in ISAS, reason="one instruction set here")
def test_half_the_vector_width_is_over_the_budget() -> None:
    """A planted regression: the kernels of `baseline` instead of `avx2`."""
    allowed = budget()
    faults = allowed.exceeded("avx2", counted("baseline"))
    slower = {line.split(",")[0] for line in faults}
    assert slower >= {f"mips_topk {dtype} B=16" for dtype in ("float32", "float16", "bfloat16", "int8")}
    assert slower >= {"score_candidates float32", "candidate_cross_attention float32 gradient"}


def test_a_few_percent_are_over_the_budget() -> None:
    allowed = Budget("GCC", 0.03, {"search": {"avx2": 1000, "baseline": 3000}})
    assert allowed.exceeded("avx2", {"search": 1030}) == []
    assert allowed.exceeded("avx2", {"search": 1031}) == ["search, avx2: 1_031 instructions, +3.1% on 1_000"]
    assert allowed.exceeded("amx", {"search": 1}) == ["search, amx: no budget for it"]
    assert allowed.exceeded("avx2", {"other": 1}) == ["other, avx2: no budget for it"]


def test_a_budget_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Budget("GCC: (Debian) 12.2.0", 0.03, {"a B=1": {"avx2": 10}, "b": {"avx2": 1, "amx": 2}})
    written.write(tmp_path / "budget.json")
    assert Budget.read(tmp_path / "budget.json") == written
