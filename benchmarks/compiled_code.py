"""Facts about compiled kernels: registers, spills, occupancy, and the instructions per score in the loop over tiles."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

from benchmarks.gpus import ARCHITECTURES
from benchmarks.machine_code import MATRIX, Function, Instruction, Loop, read_amdgcn, read_sass

Facts = dict[str, Any]
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@cache
def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm, from the CUDA toolkit or from Triton's package."""
    found = which(name)
    if found is None and (triton := find_spec("triton")) is not None and triton.origin is not None:
        found = which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise FileNotFoundError(f"{name} was not found: install triton or the CUDA toolkit")
    return found


def cubin_facts(cubin: bytes) -> Iterator[tuple[Function, Facts]]:
    """Every kernel of a cubin: its code, registers, spilled bytes, and bytes of static shared memory."""
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
    """The kernel of an assembly text for AMD: its code, and the figures in the metadata at the end of the text.

    Scalar registers spill to lanes of vector registers, not to memory, and are counted apart.
    """
    figure = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, flags=re.MULTILINE)}
    return read_amdgcn(text), {
        "registers": figure["vgpr_count"],
        "spilled_bytes": 4 * figure["vgpr_spill_count"],
        "scalar_registers_spilled": figure["sgpr_spill_count"],
    }


def code_facts(function: Function) -> Facts:
    """Facts that need no knowledge of a kernel's algorithm."""
    loads = [i.bytes for i in function.instructions if i.kind in ("global load", "async copy")]
    kinds = [kind for kind in MATRIX if function.count(kind)]
    return {
        "instructions": len(function.instructions),
        "matrix": "+".join(kinds) or "none",
        "widest_global_load": max(loads, default=0),
    }


class Tile(NamedTuple):
    """Rows x queries x depth multiplied at a time by the warps of a block."""

    items: int
    queries: int
    depth: int  # components of a row per step
    dtype: str
    warps: int
    lanes: int  # per warp

    def multiply_adds(self, instruction: Instruction) -> int:
        """Multiply-adds of one instruction, executed by every warp of the block."""
        opcode = instruction.opcode
        if instruction.kind == "fma":
            return self.warps * self.lanes * (2 if "FFMA2" in opcode or "_pk_" in opcode else 1)
        if instruction.kind == "tcgen05":  # issued by one warp for all; shape in a register, 32 bytes deep
            return min(self.items, 128) * self.queries * 32 // ITEMSIZE[self.dtype]
        if found := re.search(r"(\d+)x(\d+)x(\d+)", opcode):  # HGMMA.64x128x16 (four warps), v_mfma_f32_32x32x8
            return prod(map(int, found.groups())) * self.warps // (4 if instruction.kind == "wgmma" else 1)
        if found := re.search(r"\.168(\d+)", opcode):  # HMMA.16816
            return 16 * 8 * int(found[1]) * self.warps
        raise ValueError(f"{opcode}: a matrix instruction of unknown shape")


def loop_facts(function: Function, kinds: tuple[str, ...], tile: Tile, d: int, copies: int = 0) -> Facts:
    """Instructions per score in the loop over tiles.

    Args:
        function: the kernel's code.
        kinds: kinds of the multiplying instructions.
        tile: shape of the product.
        d: width of a row.
        copies: asynchronous copies that an iteration starts, if they are behind a branch.
    """
    loops = function.loops(kinds)
    if not loops:
        raise ValueError(f"{function.name}: no loop with {', '.join(kinds)} in it")
    hot = loops[0].with_copies(copies)
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
        "other_per_score": (sum(i.takes_slot for i in path) - products) / scores_a_lane,
        "with_hit_per_score": (len(outer.body) + len(path) - len(outer.path)) / scores_a_lane,
    }


def tile_path(
    name: str, hot: Loop, loops: list[Loop], kinds: tuple[str, ...], tile: Tile, d: int
) -> tuple[list[Instruction], Loop]:
    """Instructions of one whole tile, and the loop over tiles.

    The innermost loop, if one iteration makes all products of a tile; otherwise the loop around it, with the innermost
    loop repeated as often as the products need. If a tile is too small for its warps, two or four warps make the same
    products.

    Raises:
        ValueError: the matrix instructions do not add up to the products of a tile: the code was misread.
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
    """Largest number of groups of asynchronous copies in flight during an iteration.

    `DEPBAR.LE SB0, n` leaves n groups in flight; the copies between it and the next wait are one group more.
    """
    most = in_flight = 0
    waited = False
    for instruction in loop.path:
        if _waits_for_copies(instruction):
            waited, in_flight = True, int(instruction.operands.split(",")[1], 16)
        elif instruction.kind == "async copy" and waited:
            in_flight += 1
            waited = False
        most = max(most, in_flight)
    return most


def _waits_for_copies(instruction: Instruction) -> bool:
    return instruction.opcode == "DEPBAR.LE" and instruction.operands.startswith("SB0, ")


def occupancy(target: str, registers: int, threads: int, shared: int) -> Facts:
    architecture = ARCHITECTURES[target]
    blocks = architecture.blocks_per_sm(registers, threads, shared)
    return {"blocks_per_sm": blocks, "occupancy": blocks * -(-threads // architecture.warp) / architecture.warps}
