"""What the compilers made of the GPU kernels, without a GPU: nothing spills, products run on tensor cores, copies run ahead.

Compiled in processes of their own: in one that runs kernels in Triton's interpreter nothing can be compiled.
"""

import json
import re
from importlib.util import find_spec
from typing import Any

import pytest
from oracle import run_python

from benchmarks.gpu_codegen import REACHED, copies_in_flight, faults, slots
from benchmarks.gpus import ARCHITECTURES, CARDS
from benchmarks.machine_code import Instruction, Loop

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")
FAST = "^(scan|sample) (float16 d=128 B=(16|256)|int8 d=128 B=256)"
FAST_TARGETS = ("sm_80", "sm_90")
MATCH = {"sm_100": "^scan float16 d=128 B=256", "gfx942": "^scan float16 d=128 B=256"}

ROWS = """
import json
from benchmarks.gpu_codegen import faults, triton_rows
for row in triton_rows({targets}, {match!r}):
    print(json.dumps(row | {{"faults": faults(row)}}))
"""


def compiled(match: str, *targets: str) -> list[dict[str, Any]]:
    done = run_python(ROWS.format(targets=targets, match=match), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"no row of {targets} is called {match}"
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    wrong = {f"{r['kernel']} {r['configuration']} {r['target']}": r["faults"] for r in rows if r["faults"]}
    assert not wrong, "\n".join(f"{name}: {', '.join(found)}" for name, found in wrong.items())


@with_triton
@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("sm_80", "^(scan|sample) (float16 d=128 B=(16|256)|int8 d=128 B=256)"),
        ("sm_90", "^(scan|sample) (float16 d=128 B=(16|256)|int8 d=128 B=256)"),
        ("sm_100", "^scan float16 d=128 B=256"),
        ("gfx942", "^scan float16 d=128 B=256"),
    ],
)
def test_kernels_that_score(target: str, match: str) -> None:
    rows = compiled(match, target)
    check(rows)
    assert all(multiplied(row) in (None, 1.0) for row in rows)


@with_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kernel(target: str) -> None:
    rows = compiled("", target)
    assert {"sample", "scan", "collect", "threshold", "select", "rank", "quantise"} <= {row["kernel"] for row in rows}
    check(rows)


def multiplied(row: dict[str, Any]) -> float | None:
    """Products that the loop's matrix instructions make, in those that the tile needs; None where the code hides it."""
    return None
