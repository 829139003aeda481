"""tests/csrc/coverage_fuzzer.cpp finds a bug that needs coverage guidance. `make sanitize` runs it on the search."""

import shutil
import subprocess
from pathlib import Path

import pytest
from oracle import TESTS

TARGET = """
#include <cstddef>
#include <cstdint>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  volatile int depth = 0;
  if (size > 3 && data[0] == 'g') {
    depth = 1;
    if (data[1] == 'r') {
      depth = 2;
      if (data[2] == 'a') {
        depth = 3;
        if (data[3] == 'n') __builtin_trap();
      }
    }
  }
  return depth < 0;
}
"""
RUNS = "1000000"  # without guidance it takes 2^32 on average


@pytest.mark.skipif(shutil.which("g++") is None, reason="the fuzzer is for GCC, which is not here")
def test_the_fuzzer_finds_a_planted_bug(tmp_path: Path) -> None:
    (tmp_path / "target.cpp").write_text(TARGET)
    driver = str(TESTS / "csrc" / "coverage_fuzzer.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", "-c", driver, "-o", tmp_path / "driver.o"], check=True)
    ended = {}
    for flag in ("-fsanitize-coverage=trace-pc", "-g"):
        subprocess.run(["g++", "-O1", flag, "target.cpp", "driver.o", "-o", "fuzzer"], cwd=tmp_path, check=True)
        ended[flag] = subprocess.run(["./fuzzer", RUNS, "7"], cwd=tmp_path, capture_output=True, text=True)
        if flag != "-g":
            assert (tmp_path / "crash-7").read_bytes()[:4] == b"gran"
            assert subprocess.run(["./fuzzer", "crash-7"], cwd=tmp_path).returncode < 0
            assert "found: crash-7" in ended[flag].stdout
    assert ended["-fsanitize-coverage=trace-pc"].returncode < 0
    assert ended["-g"].returncode == 0  # without coverage as many inputs find nothing
    assert "nothing found" in ended["-g"].stdout
