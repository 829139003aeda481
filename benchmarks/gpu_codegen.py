"""What the compilers made of the GPU kernels, without a GPU: `python -m benchmarks.gpu_codegen [--json FILE]`.

One row a kernel, configuration and target: registers, spills, shared memory and occupancy; the kind of matrix
instruction, the widest load, the copies in flight; and the instructions that a score costs in the hot loop, beside the
number of issue slots it may cost. Registers, spills and instructions are the compiler's. Occupancy, issue slots and
everything that follows from them are derived from the figures in gpus.py. Nothing here is measured.

Issue slots. A multiprocessor issues an instruction to `lanes` lanes a clock (128 on NVIDIA: four schedulers, one warp
of 32 each) and multiplies `fma` pairs of factors a clock, so the d products of a score take d / fma clocks, in which

    lanes * d / fma

instructions can be issued for it: 16, 8 and 4 on sm_80, sm_90 and sm_100 for float16 at d = 128, half of that for int8
or for d = 64. An instruction that every lane executes once for each of its scores counts 1. If one tile holds all
queries of a batch, every tile of rows comes from memory: then the row's bytes take
d itemsize / (queries * bytes a clock), and the slots are those of the longer of the two times. What the matrix
instructions themselves take of the slots is left out of the budget of the others.

A kernel above its slots is bound by issue, and `issue_share` is the share of the peak that is left to it. A kernel is
asked to leave at least `REACHED` of the peak, the most that its other limits (a loop over d of one or two steps, the
barrier of every tile, what is left of the wave at the end) let one expect: a budget of slots / REACHED.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from benchmarks.gpus import ARCHITECTURES, CARDS
from benchmarks.machine_code import MATRIX, Function, Instruction, Loop, read_amdgcn, read_sass

Facts = dict[str, Any]

# Share of the peak of the matrix unit (of the memory, where that is the limit) that the kernels are designed for.
REACHED = {"sm_80": 0.65, "sm_90": 0.5, "sm_100": 0.4, "gfx942": 0.4}


@cache
def tool(name: str) -> str:
    """NVIDIA's cuobjdump or nvdisasm: of the CUDA toolkit, or those that come with Triton."""
    found = which(name)
    if found is None and (triton := find_spec("triton")) is not None and triton.origin is not None:
        found = which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise FileNotFoundError(f"there is no {name}: it comes with triton and with the CUDA toolkit")
    return found


def cubin_facts(cubin: bytes) -> Iterator[tuple[Function, Facts]]:
    """Every kernel of a cubin: its code, and the registers, bytes of stack and of static shared memory it takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool(name), option, file.name], capture_output=True, text=True, check=True).stdout
            for name, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    functions = read_sass(sass)
    for found in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        function = functions[found[1]]
        stored = sum(i.bytes for i in function.instructions if i.kind == "spill" and i.opcode.startswith("STL"))
        registers, stack, shared = map(int, found.groups()[1:])
        yield function, {"registers": registers, "spilled_bytes": max(stored, stack), "static_shared_bytes": shared}


def amdgcn_facts(text: str) -> tuple[Function, Facts]:
    """The kernel of an assembly text for AMD: the figures stand in the metadata at its end.

    Scalar registers that do not fit are kept in lanes of vector registers, not in memory, and are no spill to memory.
    """
    figure = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, flags=re.MULTILINE)}
    return read_amdgcn(text), {
        "registers": figure["vgpr_count"],
        "spilled_bytes": 4 * figure["vgpr_spill_count"],
        "scalar_registers_spilled": figure["sgpr_spill_count"],
    }


def code_facts(function: Function) -> Facts:
    """What can be said of a kernel's code without knowing what it computes."""
    loads = [i.bytes for i in function.instructions if i.kind in ("global load", "async copy")]
    kinds = [kind for kind in MATRIX if function.count(kind)]
    return {
        "instructions": len(function.instructions),
        "matrix": "+".join(kinds) or "none",
        "widest_global_load": max(loads, default=0),
    }


def loop_facts(function: Function, kinds: tuple[str, ...], steps: int, scores_a_lane: float) -> Facts:
    """What a score costs in the loop over tiles.

    Args:
        function: the code.
        kinds: of instructions that multiply.
        steps: iterations of an inner loop over d that make a tile, if there is an inner loop.
        scores_a_lane: of one tile.
    """
    loops = function.loops(kinds)
    if not loops:
        raise ValueError(f"{function.name}: no loop with {', '.join(kinds)} in it")
    hot = loops[0]
    outer = next((loop for loop in loops if loop.blocks > hot.blocks), None)
    path = outer.path + hot.path * (steps - 1) if outer else hot.path
    products = sum(i.kind in kinds for i in path)
    loads = [i.bytes for i in hot.path if i.kind in ("global load", "async copy")]
    return {
        "loop_instructions": len(hot.path),
        "loop_async_copies": hot.count("async copy"),
        "loop_copies_in_flight": copies_in_flight(hot),
        "loop_widest_load": max(loads, default=0),
        "loop_wide_load_share": sum(b for b in loads if b == 16) / max(1, sum(loads)),
        "matrix_per_score": products / scores_a_lane,
        "other_per_score": (len(path) - products) / scores_a_lane,
        "with_hit_per_score": len((outer or hot).body) / scores_a_lane,
    }


def copies_in_flight(loop: Loop) -> int:
    """Groups of asynchronous copies that are still under way while a tile is multiplied.

    `DEPBAR.LE SB0, n` lets n groups go on; copies that begin after it in the loop are waited for in a later iteration.
    """
    waits = [i for i, instruction in enumerate(loop.path) if _waits_for_copies(instruction)]
    copies = [i for i, instruction in enumerate(loop.path) if instruction.kind == "async copy"]
    if not waits or not copies:
        return 0
    return int(loop.path[waits[-1]].operands.split(",")[1], 16) + (copies[-1] > waits[-1])


def _waits_for_copies(instruction: Instruction) -> bool:
    return instruction.opcode == "DEPBAR.LE" and instruction.operands.startswith("SB0, ")


def slots(target: str, dtype: str, d: int, queries: int, one_tile: bool) -> float:
    """Issue slots that a score may take at the roofline, as the module describes them."""
    architecture = ARCHITECTURES[target]
    clocks = architecture.clocks_per_score(dtype, d)
    if one_tile:
        itemsize = {"float32": 4, "int8": 1}.get(dtype, 2)
        cards = [card for card in CARDS.values() if card.architecture == target]
        clocks = max(clocks, min(d * itemsize / queries / (card.read / card.sms / card.clock) for card in cards))
    return architecture.lanes * clocks


def triton_row(plan_row: Any, kernel: Any) -> Facts:
    """The facts of one row of `compile_plan` and what Triton compiled for it."""
    launch, target = plan_row.launch, plan_row.target
    threads = launch.warps * ARCHITECTURES[target].warp
    if "amdgcn" in kernel.asm:
        function, facts = amdgcn_facts(kernel.asm["amdgcn"])
    else:
        ((function, facts),) = cubin_facts(kernel.asm["cubin"])
    row = {
        "backend": "triton",
        "kernel": plan_row.kernel.__name__,
        "configuration": plan_row.label,
        "target": target,
        "threads": threads,
        "stages": launch.stages,
        "shared_bytes": kernel.metadata.shared,
        **facts,
        **occupancy(target, facts["registers"], threads, kernel.metadata.shared),
        **code_facts(function),
    }
    tile = launch.constants
    if "COMPUTE" in tile:  # it multiplies
        dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(str(tile["COMPUTE"]), "int8")
        scores_a_lane = tile["ITEMS"] * tile["QUERIES"] / threads
        kinds = MATRIX if row["matrix"] != "none" else ("fma",)
        budget = slots(target, dtype, tile["D"], tile["QUERIES"], one_tile=launch.grid[0] == 1)
        row |= {"dtype": dtype, "d": tile["D"], "tile": f"{tile['ITEMS']}x{tile['QUERIES']}x{tile['DEPTH']}"}
        row |= loop_facts(function, kinds, -(-tile["D"] // tile["DEPTH"]), scores_a_lane)
        row |= {
            "slots_per_score": budget,
            "budget_other_per_score": budget / REACHED[target] - row["matrix_per_score"],
            "issue_share": min(1.0, budget / (row["matrix_per_score"] + row["other_per_score"])),
        }
    return row


def occupancy(target: str, registers: int, threads: int, shared: int) -> Facts:
    architecture = ARCHITECTURES[target]
    blocks = architecture.blocks_per_sm(registers, threads, shared)
    return {"blocks_per_sm": blocks, "occupancy": blocks * -(-threads // architecture.warp) / architecture.warps}


def triton_rows(targets: tuple[str, ...]) -> Iterator[Facts]:
    from grank_kernels.backends.triton.compile_plan import compile_plan, compile_row

    for plan_row in compile_plan(targets):
        yield triton_row(plan_row, compile_row(plan_row))


def report(targets: tuple[str, ...]) -> dict[str, Any]:
    """All rows, and for each backend what its code was compiled with, or why there is none."""
    made: dict[str, Any] = {"label": "compiled, and derived from datasheets; nothing is measured", "rows": []}
    if find_spec("triton") is None:
        made["triton"] = "not installed: its kernels are left out"
    else:
        import triton

        made["triton"] = triton.__version__
        for row in triton_rows(targets):
            made["rows"].append(row)
            print(line(row), file=sys.stderr)
    return made


def line(row: Facts) -> str:
    """A row for people."""
    text = (
        f"{row['kernel']:10s} {row['configuration']:40s} {row['target']:6s} {row['registers']:3d} registers, "
        f"{row['spilled_bytes']} B spilled, {row['shared_bytes']} B shared, occupancy {row['occupancy']:.2f}, "
        f"{row['matrix']}, loads of {row['widest_global_load']} B"
    )
    if "issue_share" in row:
        text += (
            f", {row['loop_copies_in_flight']} copies in flight, {row['matrix_per_score']:.2f} + "
            f"{row['other_per_score']:.2f} instructions a score of {row['slots_per_score']:.1f} slots: "
            f"{row['issue_share']:.0%} of the roofline"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--target", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    arguments = parser.parse_args()
    made = report(tuple(arguments.target))
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
