"""What the compilers made of the GPU kernels, without a GPU: `python -m benchmarks.gpu_codegen --json FILE [--check]`.

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

A kernel above its slots is bound by issue, and `issue_share` is the share of the roofline that is left to it. A kernel
is asked to leave at least the share that it is designed to reach, since a loop over d of one or two steps, the barriers
of every tile and the last wave take the rest: `REACHED`, times 0.85 for int8, whose slots are half as many. So it may
take slots / REACHED instructions. `faults` says of a row what is wrong with it, by this and by what every kernel is
asked: nothing spilled, products on tensor cores, the rows of a tile read by loads of 16 bytes, copies in flight while a
tile is multiplied.
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
from math import prod
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

from benchmarks.gpus import ARCHITECTURES, CARDS
from benchmarks.machine_code import MATRIX, Function, Instruction, Loop, read_amdgcn, read_sass

Facts = dict[str, Any]

# Share of the roofline that the kernels are designed for.
REACHED = {"sm_80": 0.65, "sm_90": 0.45, "sm_100": 0.35, "gfx942": 0.4}
REACHED_BY_INT8 = 0.85  # of that

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
MATRIX_OF = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


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


class Tile(NamedTuple):
    """Of a kernel that scores: rows x queries x numbers of each, and the warps that share the work."""

    items: int
    queries: int
    depth: int
    dtype: str
    warps: int
    lanes: int

    def multiply_adds(self, instruction: Instruction) -> int:
        """Products with addition of all warps together, if each executes the instruction."""
        opcode = instruction.opcode
        if instruction.kind == "fma":
            return self.warps * self.lanes * (2 if "FFMA2" in opcode or "_pk_" in opcode else 1)
        if instruction.kind == "tcgen05":  # one warp for all; the shape is in a register, 32 bytes deep
            return min(self.items, 128) * self.queries * 32 // ITEMSIZE[self.dtype]
        if found := re.search(r"(\d+)x(\d+)x(\d+)", opcode):  # HGMMA.64x128x16, by four warps; v_mfma_f32_32x32x8
            return prod(map(int, found.groups())) * self.warps // (4 if instruction.kind == "wgmma" else 1)
        if found := re.search(r"\.168(\d+)", opcode):  # HMMA.16816
            return 16 * 8 * int(found[1]) * self.warps
        raise ValueError(f"{opcode}: a matrix instruction of unknown shape")


def loop_facts(function: Function, kinds: tuple[str, ...], tile: Tile, d: int) -> Facts:
    """What a score costs in the loop over tiles; `kinds` are the instructions that multiply."""
    loops = function.loops(kinds)
    if not loops:
        raise ValueError(f"{function.name}: no loop with {', '.join(kinds)} in it")
    hot = loops[0]
    path, outer = tile_path(function.name, hot, loops, kinds, tile, d)
    products = sum(i.kind in kinds for i in path)
    loads = [i.bytes for i in hot.path if i.kind in ("global load", "async copy")]
    scores_a_lane = tile.items * tile.queries / (tile.warps * tile.lanes)
    return {
        "loop_instructions": len(hot.path),
        "loop_spills": hot.count("spill"),
        "loop_async_copies": hot.count("async copy"),
        "loop_copies_in_flight": copies_in_flight(hot),
        "loop_bytes_by_16": sum(b for b in loads if b >= 16) * tile.warps * tile.lanes,
        "matrix_per_score": products / scores_a_lane,
        "other_per_score": (len(path) - products) / scores_a_lane,
        "with_hit_per_score": (len(outer.body) + len(path) - len(outer.path)) / scores_a_lane,
    }


def tile_path(
    name: str, hot: Loop, loops: list[Loop], kinds: tuple[str, ...], tile: Tile, d: int
) -> tuple[list[Instruction], Loop]:
    """Instructions of one whole tile, and the loop over tiles.

    That is the innermost loop if it makes all products of a tile; else the one around it, in whose iteration the inner
    one is repeated as often as the products need. Where a tile is too small for its warps some of them make the same
    products, twice as many or four times as many.

    Raises:
        ValueError: the matrix instructions that were found do not make the products of a tile, so that something of the
            code was not understood.
    """
    products = tile.items * tile.queries * tile.depth * -(-d // tile.depth)
    over_tiles, inside = hot, sum(tile.multiply_adds(i) for i in hot.path if i.kind in kinds)
    if inside < products:
        over_tiles = next((loop for loop in loops if loop.blocks > hot.blocks), hot)
    made = sum(tile.multiply_adds(i) for i in over_tiles.path if i.kind in kinds)
    for needed in (products, 2 * products, 4 * products):
        if made <= needed and (needed - made) % inside == 0:
            return over_tiles.path + hot.path * ((needed - made) // inside), over_tiles
    raise ValueError(f"{name}: loops of {made} and {inside} products for a tile of {products}")


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
        cards = [card for card in CARDS.values() if card.architecture == target]
        clocks = max(clocks, min(d * ITEMSIZE[dtype] / queries / (card.read / card.sms / card.clock) for card in cards))
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
    constants = launch.constants
    if "COMPUTE" in constants:  # it multiplies
        d, depth = constants["D"], constants["DEPTH"]
        dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(str(constants["COMPUTE"]), "int8")
        lanes = ARCHITECTURES[target].warp
        tile = Tile(constants["ITEMS"], constants["QUERIES"], depth, dtype, launch.warps, lanes)
        row |= {"dtype": dtype, "d": d, "tile": f"{tile.items}x{tile.queries}x{depth}"}
        row["tile_bytes"] = tile.items * min(d, depth) * ITEMSIZE[dtype]  # of one step
        row["one_tile"] = launch.grid[0] == 1  # of queries
        row["slots_per_score"] = slots(target, dtype, d, tile.queries, row["one_tile"])
        row |= loop_facts(function, MATRIX if row["matrix"] != "none" else ("fma",), tile, d)
        instructions = row["matrix_per_score"] + row["other_per_score"]
        row["issue_share"] = min(1.0, row["slots_per_score"] / instructions)
    return row


def faults(row: Facts) -> list[str]:
    """What a row is blamed for; nothing, if all is well.

    Excepted: float32 products are exact, so they run on the FMA units, and their own instructions fill the slots. AMD's
    gfx942 has no asynchronous copies of 16 bytes; its loads go through registers. Triton 3.7 compiles int8 products for
    sm_100 to mma, not tcgen05, at a rate that NVIDIA does not publish, so that there are no slots to count. `sample` scores one row in 64 and may take 16 times the slots, a quarter of a scan.
    `collect` on several query tiles runs for the few queries whose threshold failed, and may take what it takes.
    """
    found = []
    if row["spilled_bytes"]:
        found.append(f"{row['spilled_bytes']} bytes spilled")
    if row["blocks_per_sm"] == 0:
        found.append("not one block fits")
    if "issue_share" not in row:
        return found
    target, exact = row["target"], row["dtype"] == "float32"
    expected = "mma" if (target, row["dtype"]) == ("sm_100", "int8") else MATRIX_OF[target]
    if not exact and row["matrix"] != expected:
        found.append(f"matrix instructions: {row['matrix']}, not {expected}")
    if row["loop_bytes_by_16"] < row["tile_bytes"]:
        found.append(f"{row['loop_bytes_by_16']} of {row['tile_bytes']} bytes of rows by loads of 16 bytes")
    if target != "gfx942" and row["loop_copies_in_flight"] == 0:
        found.append("no copies in flight while a tile is multiplied")
    slot_share = {"scan": 1, "sample": 16, "collect": 1 if row["one_tile"] else 0}[row["kernel"]]
    allowed = (
        row["slots_per_score"] * slot_share / (REACHED[target] * (REACHED_BY_INT8 if row["dtype"] == "int8" else 1))
    )
    instructions = row["matrix_per_score"] + row["other_per_score"]
    if not exact and (target, row["dtype"]) != ("sm_100", "int8") and 0 < allowed < instructions:
        found.append(f"{instructions:.2f} instructions a score, {allowed:.2f} allowed")
    return found


def occupancy(target: str, registers: int, threads: int, shared: int) -> Facts:
    architecture = ARCHITECTURES[target]
    blocks = architecture.blocks_per_sm(registers, threads, shared)
    return {"blocks_per_sm": blocks, "occupancy": blocks * -(-threads // architecture.warp) / architecture.warps}


def triton_rows(targets: tuple[str, ...], match: str) -> Iterator[Facts]:
    from grank_kernels.backends.triton.compile_plan import compile_plan, compile_row

    for plan_row in compile_plan(targets):
        if re.search(match, f"{plan_row.kernel.__name__} {plan_row.label} {plan_row.target}"):
            yield triton_row(plan_row, compile_row(plan_row))


def report(targets: tuple[str, ...], match: str) -> dict[str, Any]:
    """All rows, and for each backend what its code was compiled with, or why there is none."""
    made: dict[str, Any] = {"label": "compiled, and derived from datasheets; nothing is measured", "rows": []}
    if find_spec("triton") is None:
        made["triton"] = "not installed: its kernels are left out"
    else:
        import triton

        made["triton"] = triton.__version__
        for row in triton_rows(targets, match):
            row["faults"] = faults(row)
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
    return text + "".join(f"\n    FAULT: {fault}" for fault in row["faults"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--target", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="only rows whose 'kernel configuration target' this pattern finds")
    parser.add_argument("--check", action="store_true", help="fail if a row has a fault")
    arguments = parser.parse_args()
    made = report(tuple(arguments.target), arguments.match)
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")
    if arguments.check and any(row["faults"] for row in made["rows"]):
        raise SystemExit("rows with faults")


if __name__ == "__main__":
    main()
