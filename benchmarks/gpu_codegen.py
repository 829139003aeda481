"""Static analysis of the compiled GPU kernels: `python -m benchmarks.gpu_codegen --json FILE [--check]`; needs no GPU.

One row per kernel, configuration and target: registers, spills, shared memory, occupancy, the kind of matrix
instruction, the widest load, the copies in flight, and the instructions per score in the hot loop beside the issue
slots per score. Registers, spills and instructions are read from the compiled code; occupancy and issue slots are
derived from the figures in gpus.py. Nothing is measured.

Issue slots. A multiprocessor issues one instruction to `lanes` lanes per clock (128 on NVIDIA: four schedulers, one
warp of 32 each) and makes `fma` multiply-adds per clock. The d multiply-adds of a score take d / fma clocks, in which

    lanes * d / fma

instructions can be issued: 16, 8 and 4 on sm_80, sm_90 and sm_100 for float16 at d = 128, half as many for int8 or
for d = 64. An instruction that every lane executes once for each of its scores counts 1. If one tile holds all queries
of a batch, every tile of rows is read from memory, which takes d * itemsize / (queries * bytes per clock) clocks per
score; the slots are counted in the longer of the two times.

A kernel with more instructions than slots is bound by issue; `issue_share` is the share of the roofline it can still
reach. A kernel must be able to reach `REACHED` of it (times 0.8 for int8, which has half the slots); short loops over
d, barriers and the last wave take the rest. So it may execute slots / REACHED instructions per score: its matrix
instructions and a budget of others. There is no budget for AMD. All this holds for tiles without a hit;
`with_hit_per_score` counts the whole loop, every branch entered, and gpu_cost_model has the hits per tile.

`faults` lists the requirements that a row fails: the budget, no spills, products on tensor cores, rows read by loads
of 16 bytes, copies in flight while a tile is multiplied.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.compiled_code import (
    ITEMSIZE,
    Facts,
    Tile,
    amdgcn_facts,
    code_facts,
    cubin_facts,
    loop_facts,
    occupancy,
    tool,
)
from benchmarks.gpus import ARCHITECTURES, CARDS
from benchmarks.machine_code import MATRIX, Function

# Least share of the roofline that a kernel must be able to reach.
REACHED = {"sm_80": 0.6, "sm_90": 0.4, "sm_100": 0.3}
REACHED_BY_INT8 = 0.8  # factor for int8

MATRIX_OF = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def slots(target: str, dtype: str, d: int, queries: int, one_tile: bool, exponentials: int = 0) -> float:
    """Issue slots per score at the roofline; derivation in the module's docstring."""
    architecture = ARCHITECTURES[target]
    clocks = max(architecture.clocks_per_score(dtype, d), exponentials / architecture.special)
    if one_tile:
        cards = [card for card in CARDS.values() if card.architecture == target]
        clocks = max(clocks, min(d * ITEMSIZE[dtype] / queries / (card.read / card.sms / card.clock) for card in cards))
    return architecture.lanes * clocks


def triton_row(plan_row: Any, kernel: Any) -> Facts:
    """The facts of one row of `compile_plan` and its compiled kernel."""
    launch, target = plan_row.launch, plan_row.code.target
    threads = plan_row.code.warps * ARCHITECTURES[target].warp
    if "amdgcn" in kernel.asm:
        function, facts = amdgcn_facts(kernel.asm["amdgcn"])
    else:
        ((function, facts),) = cubin_facts(kernel.asm["cubin"])
    row = {
        "backend": "triton",
        "kernel": plan_row.code.name,
        "configuration": plan_row.label,
        "target": target,
        "threads": threads,
        "stages": plan_row.code.stages,
        "shared_bytes": kernel.metadata.shared,
        **facts,
        **occupancy(target, facts["registers"], threads, kernel.metadata.shared),
        **code_facts(function),
    }
    if "allow" in launch.arguments:  # the kernel scans the table
        d, depth, items, queries, compute = launch.arguments["shape"]
        dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(str(compute), "int8")
        tile = Tile(items, queries, depth, dtype, plan_row.code.warps, ARCHITECTURES[target].warp)
        row |= {"dtype": dtype, "d": d, "tile": f"{tile.items}x{tile.queries}x{depth}"}
        row["tile_bytes"] = tile.items * min(d, depth) * ITEMSIZE[dtype]  # per step over d
        row["one_tile"] = launch.grid[0] == 1  # one tile holds all queries
        row["slots_per_score"] = slots(target, dtype, d, tile.queries, row["one_tile"])
        row |= loop_facts(function, MATRIX if row["matrix"] != "none" else ("fma",), tile, d)
        instructions = row["matrix_per_score"] + row["other_per_score"]
        row["issue_share"] = min(1.0, row["slots_per_score"] / instructions)
        row["budget_other_per_score"] = budget(row)
    return row


KNOWN_SPILLS = {  # bytes, of kernels with all filters or wide rows; may only shrink
    "scan float16 d=768 B=256 k=500 sm_80": 8,
    "scan bfloat16 certified d=128 B=256 k=500 ids exclude allow sm_80": 32,
    "scan float16 d=128 B=256 k=500 ids exclude allow sm_100": 72,
    "collect float16 d=128 B=256 k=500 ids exclude allow sm_100": 16,
    "scan bfloat16 certified d=128 B=256 k=500 ids exclude allow sm_100": 32,
    "collect bfloat16 certified d=128 B=256 k=500 ids exclude allow sm_100": 16,
}


def faults(row: Facts) -> list[str]:
    """Requirements that a row fails.

    Exceptions:

    - `KNOWN_SPILLS`: a launch compiles strides of 1 as constants, and these kernels then need more registers than
      there are.

    - float32 products run on the FMA units, whose instructions alone fill the slots: no budget.
    - gfx942 has no asynchronous copies of 16 bytes; its loads go through registers.
    - Triton 3.7 compiles int8 products for sm_100 to mma, not tcgen05, and NVIDIA publishes no rate for it: no budget.
    - `sample` scores one row in 64: 16 times the slots, a quarter of a scan.
    - `collect` on several query tiles only runs for queries with a failed threshold: no budget.
    - The CUDA kernels use mma on every target.
    """
    found = []
    if row["spilled_bytes"] > KNOWN_SPILLS.get(f"{row['kernel']} {row['configuration']} {row['target']}", 0):
        found.append(f"{row['spilled_bytes']} bytes spilled")
    if row["blocks_per_sm"] == 0:
        found.append("not one block fits")
    if "issue_share" not in row:
        return found
    target, dtype = row["target"], row["dtype"]
    expected = "mma" if row["backend"] == "cuda" or (target, dtype) == ("sm_100", "int8") else MATRIX_OF[target]
    if dtype != "float32" and row["matrix"] != expected:
        found.append(f"matrix instructions: {row['matrix']}, not {expected}")
    if row["loop_bytes_by_16"] < row["tile_bytes"]:
        found.append(f"{row['loop_bytes_by_16']} of {row['tile_bytes']} bytes of rows by loads of 16 bytes")
    if target != "gfx942" and row["loop_copies_in_flight"] == 0:
        found.append("no copies in flight while a tile is multiplied")
    most = row["budget_other_per_score"]
    if most is not None and row["other_per_score"] > most:
        found.append(f"{row['other_per_score']:.2f} instructions per score beside the products, {most:.2f} allowed")
    return found


def budget(row: Facts) -> float | None:
    """Most instructions per score beside the matrix instructions; None means no limit (see `faults`)."""
    target, dtype, kernel = row["target"], row["dtype"], row["kernel"]
    if target not in REACHED or dtype == "float32" or (target, dtype) == ("sm_100", "int8"):
        return None
    if kernel == "collect" and not row["one_tile"]:
        return None
    reached = REACHED[target] * (REACHED_BY_INT8 if dtype == "int8" else 1)
    return float(row["slots_per_score"] * (16 if kernel == "sample" else 1) / reached - row["matrix_per_score"])


# Kernels of csrc/cuda: pattern of the mangled template arguments, bytes of dynamic shared memory.
CUDA_KERNELS = {
    "score_candidates": (
        r"kernelINS0_\d+(b?float16)ELi(?P<d>\d+)ELi(?P<h>\d+)E",
        lambda d, h: 128 * d + 2 * (128 * (d + h) + 256),  # the two stages of a long history
    ),
    "candidate_cross_attention": (
        r"kernelINS0_\d+(b?float16)ELi(?P<d>\d+)ENS0_\d+(OnlineSoftmax|SiluWeights)E",
        lambda d, h: 640 * d + 512,
    ),
    "candidate_cross_attention_backward": (
        r"kernelINS0_\d+(b?float16)ELi(?P<d>\d+)ELNS0_5OwnedE([01])ELb([01])E",
        lambda d, h: 256 * d + 2 * (4 * d + 8) * (32 if d == 128 else 64),
    ),
    "candidate_cross_attention_delta": (r"kernelINS0_\d+(b?float16)ELi(?P<d>\d+)E", lambda d, h: 0),
}
CUDA_THREADS = 128


def cuda_row(target: str, function: Function, facts: Facts) -> Facts | None:
    """The facts of one kernel of the CUDA module; None for any other function."""
    name = re.match(r"_ZN5grank4cuda\d+(\w+?)_(kernelI.*)", function.name)
    if name is None or name[1] not in CUDA_KERNELS:
        return None
    pattern, shared = CUDA_KERNELS[name[1]]
    found = re.match(pattern, name[2])
    if found is None:
        raise ValueError(f"{function.name}: unknown form of template arguments")
    d = int(found["d"])
    h = int(found.groupdict().get("h", d))
    row = {
        "backend": "cuda",
        "kernel": name[1],
        "configuration": " ".join(found.groups()),
        "target": target,
        "threads": CUDA_THREADS,
        "shared_bytes": shared(d, h),
        **facts,
        **occupancy(target, facts["registers"], CUDA_THREADS, shared(d, h)),
        **code_facts(function),
    }
    if name[1] in ("score_candidates", "candidate_cross_attention"):
        exponentials = 2 if "SiluWeights" in row["configuration"] else 1  # silu: an exponential and a reciprocal
        row["dtype"] = found[1]
        row["slots_per_score"] = slots(target, "float16", d + h, 64, False, exponentials)
        row["tile_bytes"] = 64 * (d + h) * 2
        tile = Tile(64, 64, d + h, "float16", CUDA_THREADS // 32, 32)  # depth: a key and its value
        row |= loop_facts(function, MATRIX, tile, d + h, copies=row["tile_bytes"] // 16 // CUDA_THREADS)
        instructions = row["matrix_per_score"] + row["other_per_score"]
        row["issue_share"] = min(1.0, row["slots_per_score"] / instructions)
        row["budget_other_per_score"] = None  # narrow heads have too few slots for a target
    return row


def cuda_rows(targets: tuple[str, ...], match: str, module: Path) -> Iterator[Facts]:
    """Rows of the kernels in the compiled module `_cuda`, for the targets with machine code in it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", module], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            target = cubin.suffixes[-2].removeprefix(".")
            if target in targets:
                for function, facts in cubin_facts(cubin.read_bytes()):
                    row = cuda_row(target, function, facts)
                    if row is not None and re.search(match, f"{row['kernel']} {row['configuration']} {target}"):
                        yield row


def triton_rows(targets: tuple[str, ...], match: str) -> Iterator[Facts]:
    from grank_kernels.backends.triton.compile_plan import compile_plan

    for plan_row in compile_plan(targets):
        if re.search(match, f"{plan_row.code.name} {plan_row.label} {plan_row.code.target}"):
            yield triton_row(plan_row, plan_row.code.compile())


def report(targets: tuple[str, ...], match: str) -> dict[str, Any]:
    """All rows; per backend the compiler's version, or the reason why its kernels are missing."""
    made: dict[str, Any] = {"label": "compiled, and derived from datasheets; nothing is measured", "rows": []}
    sources: list[Iterator[Facts]] = []
    if find_spec("triton") is None:
        made["triton"] = "Triton is not installed: its kernels are left out"
    else:
        import triton

        made["triton"] = triton.__version__
        sources.append(triton_rows(targets, match))
    module = find_spec("grank_kernels._cuda")
    if module is None or module.origin is None:
        made["cuda"] = "the CUDA module is not built (that needs nvcc): its kernels are left out"
    else:
        made["cuda"] = "the compiled module grank_kernels._cuda"
        sources.append(cuda_rows(targets, match, Path(module.origin)))
    for rows in sources:
        for row in rows:
            row["faults"] = faults(row)
            made["rows"].append(row)
            print(line(row), file=sys.stderr)
    return made


def line(row: Facts) -> str:
    """One row as text."""
    text = (
        f"{row['kernel']:10s} {row['configuration']:40s} {row['target']:6s} {row['registers']:3d} registers, "
        f"{row['spilled_bytes']} B spilled, {row['shared_bytes']} B shared, occupancy {row['occupancy']:.2f}, "
        f"{row['matrix']}, loads of {row['widest_global_load']} B"
    )
    if "issue_share" in row:
        text += (
            f", {row['loop_copies_in_flight']} copies in flight, {row['matrix_per_score']:.2f} + "
            f"{row['other_per_score']:.2f} instructions per score, {row['slots_per_score']:.1f} slots: "
            f"{row['issue_share']:.0%} of the roofline"
        )
    return text + "".join(f"\n    FAULT: {fault}" for fault in row["faults"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--target", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--match", default="", help="regular expression: only rows whose 'kernel configuration target' contains it"
    )
    parser.add_argument("--check", action="store_true", help="exit with an error if a row has a fault")
    arguments = parser.parse_args()
    made = report(tuple(arguments.target), arguments.match)
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")
    if arguments.check and any(row["faults"] for row in made["rows"]):
        raise SystemExit("rows with faults")


if __name__ == "__main__":
    main()
