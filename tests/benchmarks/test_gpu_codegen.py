"""Compiled GPU kernels: no spills, tensor cores, loads of 16 bytes, asynchronous copies.

Kernels are compiled in child processes, because nothing compiles under TRITON_INTERPRET=1.
"""

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from oracle import run_python

from benchmarks import gpu_codegen
from benchmarks.compiled_code import Tile, copies_in_flight, tile_path
from benchmarks.gpu_codegen import REACHED, budget, cuda_row, cuda_rows, faults, slots
from benchmarks.gpus import ARCHITECTURES
from benchmarks.machine_code import MATRIX, Function, Instruction, Loop

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")

ROWS = """
import json
from benchmarks.gpu_codegen import faults, triton_row, triton_rows
for row in triton_rows({targets}, {match!r}):
    print(json.dumps(row | {{"faults": faults(row)}}))
"""


def compiled(match: str, *targets: str, code: str = ROWS) -> list[dict[str, Any]]:
    done = run_python(code.format(targets=targets, match=match), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"no row of {targets} is called {match}"
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    wrong = {f"{r['kernel']} {r['configuration']} {r['target']}": r["faults"] for r in rows if r["faults"]}
    assert not wrong, "\n".join(f"{name}: {', '.join(found)}" for name, found in wrong.items())


@needs_triton
@pytest.mark.parametrize(
    ("target", "match", "kernels"),
    [
        ("sm_90", "^(scan float16 d=128 B=256|rescore float16 certified)", 2),
        pytest.param("sm_80", "^scan (float16|int8) d=128 B=256", 2, marks=pytest.mark.slow),
        pytest.param("sm_90", "^scan int8 d=128 B=256", 1, marks=pytest.mark.slow),
        pytest.param("gfx942", "^scan float16 d=128 B=256", 1, marks=pytest.mark.slow),
    ],
)
def test_kernels_that_score(target: str, match: str, kernels: int) -> None:
    rows = compiled(match, target)
    assert len(rows) == kernels
    check(rows)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kernel(target: str) -> None:
    rows = compiled("", target)
    assert {"sample", "scan", "collect", "threshold", "select", "rank", "quantise"} <= {row["kernel"] for row in rows}
    check(rows)


def test_report_without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report gives the reason for missing kernels."""
    monkeypatch.setattr(gpu_codegen, "find_spec", lambda name: None)
    made = gpu_codegen.report(("sm_80",), "")
    assert made["rows"] == []
    assert made["triton"] == "Triton is not installed: its kernels are left out"
    assert made["cuda"] == "the CUDA module is not built (that needs nvcc): its kernels are left out"


# The compiled module must contain every kernel, if it was built from this folder.
CUDA_MODULE = find_spec("grank_kernels._cuda")
needs_cuda_module = pytest.mark.skipif(
    CUDA_MODULE is None or not (Path(__file__).parents[2] / "csrc/cuda/score_candidates.cu").exists(),
    reason="the CUDA module is not built (that needs nvcc)",
)


@needs_cuda_module
@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_cuda_kernels(target: str) -> None:
    """Every instantiation: two types; widths; softmax and silu; the two sides of the backward."""
    assert CUDA_MODULE is not None
    assert CUDA_MODULE.origin is not None
    rows = list(cuda_rows((target,), "", Path(CUDA_MODULE.origin)))
    assert Counter(row["kernel"] for row in rows) == {
        "score_candidates": 2 * 4 * 4,
        "candidate_cross_attention": 2 * 4 * 2,
        "candidate_cross_attention_backward": 2 * 4 * 2 * 2,
        "candidate_cross_attention_delta": 2 * 4,
    }
    check([row | {"faults": faults(row)} for row in rows])
    assert all(row["matrix"] == "mma" or row["kernel"].endswith("delta") for row in rows)


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("23score_candidates_kernelINS0_7float16ELi128ELi64EEEvNS0_15ScoreCandidatesE", "float16 128 64"),
        ("32candidate_cross_attention_kernelINS0_8bfloat16ELi64ENS0_11SiluWeightsEEEv", "bfloat16 64 SiluWeights"),
        ("41candidate_cross_attention_backward_kernelINS0_7float16ELi16ELNS0_5OwnedE1ELb0EEEv", "float16 16 1 0"),
        ("38candidate_cross_attention_delta_kernelINS0_7float16ELi32EEEvPKvS4_Pfl", "float16 32"),
    ],
)
def test_names_of_cuda_kernels(name: str, configuration: str) -> None:
    nothing_to_do = Function(f"_ZN5grank4cuda{name}", [Instruction("EXIT")], {}, {0})
    facts = {"registers": 32, "spilled_bytes": 0}
    if "delta" in name or "backward" in name:
        row = cuda_row("sm_80", nothing_to_do, facts)
        assert row is not None
        assert (row["kernel"] in name, row["configuration"]) == (True, configuration)
    else:  # a kernel without a loop that multiplies is an error
        with pytest.raises(ValueError, match="no loop with mma"):
            cuda_row("sm_80", nothing_to_do, facts)
    other = Function("_ZN5grank4cuda15runtime_versionEv", [Instruction("EXIT")], {}, {0})
    assert cuda_row("sm_80", other, facts) is None


PLANTED = """
import json
from dataclasses import replace
from benchmarks.gpu_codegen import faults, triton_row
from grank_kernels.backends.triton import compile_plan as plan

(row,) = (r for r in plan.compile_plan({targets}) if r.code.name == "scan" and r.label.startswith({match!r}))
options = plan.options
for name, planted, more in [
    ("as it is", row, {{}}),
    ("one stage", replace(row, code=replace(row.code, stages=1)), {{}}),
    ("few registers", row, {{"maxnreg": 64}}),
    ("addresses of unknown alignment", replace(row, code=replace(row.code, attributes={{}})), {{}}),
]:
    plan.options = lambda amd: options(amd) | more
    facts = triton_row(planted, planted.code.compile())
    print(json.dumps(facts | {{"planted": name, "faults": faults(facts)}}))
"""


@needs_triton
@pytest.mark.parametrize(
    "name", ["triton.runtime.jit.create_function_from_signature", "triton.runtime.jit.JITFunction._pack_args"]
)
def test_a_triton_without_the_functions_of_3_6_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from grank_kernels.backends.triton.compile_plan import compile_plan

    next(compile_plan(("sm_80",)))
    monkeypatch.delattr(name)
    with pytest.raises(RuntimeError, match=r"triton must be 3.6 or 3.7 to compile without a GPU, got 3\."):
        next(compile_plan(("sm_80",)))


@needs_triton
def test_planted_faults_are_found() -> None:
    """`scan`, compiled with options that cause each fault."""
    as_it_is, one_stage, few_registers, unaligned = compiled("float16 d=128 B=16", "sm_80", code=PLANTED)
    assert as_it_is["faults"] == []
    assert one_stage["faults"][-1] == "no copies in flight while a tile is multiplied"
    assert few_registers["registers"] <= 64
    assert "bytes spilled" in few_registers["faults"][0]
    assert any(fault.startswith("0 of 32768 bytes of rows by loads of 16 bytes") for fault in unaligned["faults"])


GOOD = {
    "backend": "triton",
    "kernel": "scan",
    "target": "sm_90",
    "dtype": "float16",
    "matrix": "wgmma",
    "spilled_bytes": 0,
    "blocks_per_sm": 1,
    "loop_bytes_by_16": 32768,
    "tile_bytes": 32768,
    "loop_copies_in_flight": 2,
    "matrix_per_score": 0.125,
    "other_per_score": 4.0,
    "slots_per_score": 8.0,
    "issue_share": 1.0,
    "one_tile": False,
}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"spilled_bytes": 8}, "8 bytes spilled"),
        ({"blocks_per_sm": 0}, "not one block fits"),
        ({"matrix": "mma"}, "matrix instructions: mma, not wgmma"),
        ({"matrix": "none"}, "matrix instructions: none, not wgmma"),
        ({"matrix": "none", "dtype": "float32"}, None),
        ({"loop_bytes_by_16": 16384}, "16384 of 32768 bytes of rows by loads of 16 bytes"),
        ({"loop_copies_in_flight": 0}, "no copies in flight while a tile is multiplied"),
        ({"other_per_score": 19.87}, None),  # 8 / 0.4 - 0.125 = 19.875
        ({"other_per_score": 19.88}, "19.88 instructions per score beside the products, 19.88 allowed"),
        ({"other_per_score": 19.9, "dtype": "int8"}, None),
        ({"other_per_score": 24.9, "dtype": "int8"}, "24.87 allowed"),
        ({"other_per_score": 319.0, "kernel": "sample"}, None),
        ({"other_per_score": 320.0, "kernel": "sample"}, "319.8"),
        ({"other_per_score": 999.0, "kernel": "collect"}, None),
        ({"other_per_score": 20.0, "kernel": "collect", "one_tile": True}, "19.8"),
        ({"target": "sm_100", "dtype": "int8", "matrix": "mma", "other_per_score": 99.0}, None),
        ({"target": "gfx942", "matrix": "mfma", "loop_copies_in_flight": 0, "other_per_score": 99.0}, None),
        ({"backend": "cuda", "matrix": "mma", "other_per_score": 99.0}, None),
        ({"backend": "cuda", "matrix": "none"}, "matrix instructions: none, not mma"),
    ],
    ids=str,
)
def test_faults(changed: dict[str, Any], fault: str | None) -> None:
    row = GOOD | changed
    found = faults(row | {"budget_other_per_score": None if row["backend"] == "cuda" else budget(row)})
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_slots() -> None:
    """128 lanes per clock over 1024, 2048 and 4096 products per clock; more if few queries make memory the bound."""
    assert [slots(target, "float16", 128, 128, False) for target in ("sm_80", "sm_90", "sm_100")] == [16, 8, 4]
    assert slots("sm_90", "int8", 128, 128, False) == slots("sm_90", "bfloat16", 64, 128, False) == 4
    assert slots("sm_80", "float32", 128, 64, False) == 256
    # H200, the fastest memory of sm_90: 4.8e12 / 132 / 1.83e9 = 19.9 bytes per clock; 256 bytes per row, 16 queries
    assert slots("sm_90", "float16", 128, 16, True) == pytest.approx(128 * 256 / 16 / 19.9, rel=0.01)
    assert slots("sm_90", "float16", 128, 1024, True) == 8
    assert set(REACHED) == {"sm_80", "sm_90", "sm_100"}


def loop(*opcodes: str) -> Loop:
    path = [Instruction(*opcode.split(" ", 1)) for opcode in opcodes]
    return Loop(frozenset(range(len(path))), path, path, {sum(i.kind == "async copy" for i in path): path})


@pytest.mark.parametrize(
    ("opcodes", "in_flight"),
    [
        (("DEPBAR.LE SB0, 0x1", "HMMA.16816.F32", "LDGSTS.E.BYPASS.128"), 2),
        (("LDGSTS.E.BYPASS.128", "DEPBAR.LE SB0, 0x2", "HMMA.16816.F32"), 2),
        (("LDGSTS.E.BYPASS.128", "DEPBAR.LE SB0, 0x0", "HMMA.16816.F32"), 0),
        (("DEPBAR.LE SB0, 0x0", "HMMA.16816.F32", "LDGSTS.E.BYPASS.128"), 1),
        (("LDG.E.128", "HMMA.16816.F32"), 0),
        (("LDGSTS.E", "DEPBAR.LE SB0, 0x2", "FFMA", "LDGSTS.E", "LDGSTS.E", "FFMA", "DEPBAR.LE SB0, 0x0", "FFMA"), 3),
        (("DEPBAR.LE SB1, 0x36", "LDGSTS.E.BYPASS.128"), 0),
    ],
)
def test_copies_in_flight(opcodes: tuple[str, ...], in_flight: int) -> None:
    assert copies_in_flight(loop(*opcodes)) == in_flight


@pytest.mark.parametrize(
    ("opcode", "dtype", "lanes", "products"),
    [
        ("HMMA.16816.F32", "float16", 32, 4 * 16 * 8 * 16),
        ("HMMA.1688.F32", "float16", 32, 4 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", "int8", 32, 4 * 16 * 8 * 32),
        ("HGMMA.64x128x16.F32", "float16", 32, 64 * 128 * 16),
        ("UTCHMMA", "float16", 32, 128 * 64 * 16),
        ("v_mfma_f32_32x32x8_f16", "float16", 64, 4 * 32 * 32 * 8),
        ("FFMA", "float32", 32, 4 * 32),
        ("FFMA2", "float32", 32, 4 * 64),
    ],
)
def test_products_of_an_instruction(opcode: str, dtype: str, lanes: int, products: int) -> None:
    assert Tile(128, 64, 128, dtype, 4, lanes).multiply_adds(Instruction(opcode)) == products


def test_path_of_a_tile() -> None:
    """The inner loop is repeated until the products of a tile are complete; a mismatch is an error."""
    tile = Tile(items=64, queries=32, depth=16, dtype="float16", warps=4, lanes=32)  # 4 HMMA per warp for 16 columns
    inner = loop("LDSM.16.M88.4", *["HMMA.16816.F32"] * 4)
    outer = inner._replace(blocks=inner.blocks | {99}, path=[*inner.path, Instruction("FSETP.GE.AND")])
    path, over_tiles = tile_path("scan", inner, [inner, outer], MATRIX, tile, d=48)
    assert over_tiles is outer
    assert [sum(i.opcode.startswith(name) for i in path) for name in ("HMMA", "LDSM", "FSETP")] == [12, 3, 1]
    path, over_tiles = tile_path("scan", inner, [inner, outer], MATRIX, tile, d=16)
    assert over_tiles is inner
    assert len(path) == 5
    few = loop(*["HMMA.16816.F32"] * 3)
    with pytest.raises(ValueError, match="scan: loops of 24576 and 24576 products for a tile of 32768"):
        tile_path("scan", few, [few], MATRIX, tile, d=16)
    with pytest.raises(ValueError, match="matrix instruction of unknown shape"):
        tile.multiply_adds(Instruction("HMMA.F32"))
