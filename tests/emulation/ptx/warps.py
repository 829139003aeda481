"""Warp instructions: shuffles, votes, ldmatrix, mma.sync.

Matrix fragments: with p elements per 32-bit register, lane l holds p columns from p (l % 4) on of row l // 4, in blocks
of 8 rows (PTX ISA, "Matrix Fragments for mma.m16n8k16" and the sections after it).
"""

import re

import numpy as np

from .machine import WARP, Machine, Mask
from .memory import wavefronts
from .parser import Immediate, Instruction, Operand
from .registry import instruction
from .transfers import items, observe, overwrite
from .values import TYPE_BITS, decode

LANE = np.arange(WARP)
ROW, QUAD = LANE // 4, LANE % 4
FULL = 0xFFFFFFFF  # the mask of a whole warp


def rows_of(m: Machine, operand: Operand, type: str, warps: np.ndarray) -> np.ndarray:
    """Values of an operand, (warps, 32)."""
    rows = m.read_lanes(operand, type).reshape(-1, WARP)
    return rows if len(warps) == len(rows) else rows[warps]


def write_rows(
    m: Machine, target: Operand, type: str, values: np.ndarray, warps: np.ndarray, active: np.ndarray | bool = True
) -> None:
    """Writes values (warps, 32) or (warps, 1) to the active lanes of the warps."""
    everybody = len(warps) == m.lanes // WARP and np.all(active)
    if everybody and values.shape[1] == WARP:
        m.write(target, type, values.reshape(-1), None)
        return
    spread = np.zeros((m.lanes // WARP, WARP), values.dtype)
    spread[warps] = values
    lanes = np.zeros(spread.shape, bool)
    lanes[warps] = active
    m.write(target, type, spread.reshape(-1), None if everybody else lanes.reshape(-1))


def whole_warps(m: Machine, mask: Mask) -> np.ndarray:
    """The executing warps; an error unless all their lanes are active."""
    if mask is None:
        return np.arange(m.lanes // WARP)
    rows = mask.reshape(-1, WARP)
    partial = rows.any(1) & ~rows.all(1)
    if partial.any():
        m.fail("executed by part of a warp", np.nonzero(mask & np.repeat(partial, WARP))[0][0])
    return np.nonzero(rows.all(1))[0]


def members(m: Machine, mask: Mask, membermask: Operand) -> tuple[np.ndarray, np.ndarray]:
    """Executing warps and their lanes (warps, 32); an error unless the lanes are those in their mask."""
    if mask is None and isinstance(membermask, Immediate) and membermask.bits & FULL == FULL:
        return np.arange(m.lanes // WARP), np.ones((m.lanes // WARP, WARP), bool)
    rows = np.ones((m.lanes // WARP, WARP), bool) if mask is None else mask.reshape(-1, WARP)
    warps = np.nonzero(rows.any(1))[0]
    rows = rows[warps]
    named = rows_of(m, membermask, "u32", warps)
    expected = named[..., None] >> LANE.astype(np.uint32) & np.uint32(1) != 0
    wrong = rows & (expected != rows[:, None, :]).any(-1)
    if wrong.any():
        warp, lane = np.argwhere(wrong)[0]
        m.fail(f"executed by part of a warp: the mask is {named[warp, lane]:#x}", warps[warp] * WARP + lane)
    return warps, rows


@instruction("shfl", "sync up down bfly idx")
def shuffle(m: Machine, i: Instruction, mask: Mask) -> None:
    warps, active = members(m, mask, i.operands[4])
    value = rows_of(m, i.operands[1], "b32", warps)
    constant = all(isinstance(each, Immediate) for each in i.operands[2:4])
    first_warp = warps[:1] if constant else warps
    by, clamp = (rows_of(m, each, "u32", first_warp).astype(np.int64) for each in i.operands[2:4])
    segment, by = clamp >> 8 & 31, by & 31
    first, last = LANE & segment, LANE & segment | clamp & 31 & ~segment
    if i.has("up"):
        source = LANE - by
        inside = source >= last
    else:
        source = LANE + by if i.has("down") else LANE ^ by if i.has("bfly") else first | by & ~segment
        inside = source <= last
    source = np.where(inside, source, LANE)
    if constant:
        found, named = value[:, source[0]], active[:, source[0]]
    else:
        found, named = np.take_along_axis(value, source, 1), np.take_along_axis(active, source, 1)
    if (active & ~named).any():
        m.fail("shuffle from a lane outside its mask")
    target = items(i.operands[0])
    write_rows(m, target[0], "b32", found, warps, active)
    if len(target) == 2:
        write_rows(m, target[1], "pred", np.broadcast_to(inside, value.shape), warps, active)


@instruction("vote", "sync ballot any all uni")
def vote(m: Machine, i: Instruction, mask: Mask) -> None:
    warps, active = members(m, mask, i.operands[2])
    said = rows_of(m, i.operands[1], "pred", warps)
    if i.has("ballot"):
        ballot = ((said & active).astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
        write_rows(m, i.operands[0], "b32", ballot[:, None], warps, active)
        return
    every, some = (said | ~active).all(1), (said & active).any(1)
    result = every if i.has("all") else some if i.has("any") else every | ~some
    write_rows(m, i.operands[0], "pred", result[:, None], warps, active)


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@instruction("redux", "sync " + " ".join(REDUCTIONS))
def reduce(m: Machine, i: Instruction, mask: Mask) -> None:
    warps, active = members(m, mask, i.operands[2])
    value = rows_of(m, i.operands[1], i.type, warps)
    function = next(REDUCTIONS[each] for each in i.modifiers if each in REDUCTIONS)
    result = np.array([function.reduce(row[who]) for row, who in zip(value, active, strict=True)], value.dtype)
    write_rows(m, i.operands[0], i.type, result[:, None], warps, active)


@instruction("match", "sync any all")
def match(m: Machine, i: Instruction, mask: Mask) -> None:
    warps, active = members(m, mask, i.operands[2])
    value = rows_of(m, i.operands[1], i.type, warps)
    if i.has("all"):
        m.fail("match.all is not implemented")
    same = (value[:, :, None] == value[:, None, :]) & active[:, None, :]
    result = (same.astype(np.uint64) << LANE.astype(np.uint64)).sum(2).astype(np.uint32)
    write_rows(m, i.operands[0], "b32", result, warps, active)


@instruction("activemask")
def active_mask(m: Machine, i: Instruction, mask: Mask) -> None:
    rows = (m.active if mask is None else mask).reshape(-1, WARP)
    result = (rows.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)
    m.write(i.operands[0], "b32", np.repeat(result, WARP), mask)


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16")
def load_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    """ldmatrix: lanes 8 j to 8 j + 7 give the addresses of the rows of matrix j."""
    warps = whole_warps(m, mask)
    targets = items(i.operands[0])
    space, lanes, offsets = matrix_rows(m, i.operands[1], warps, len(targets))
    observe(m, space, lanes, offsets, 16)
    rows = space.words(2)[(offsets // 2)[:, None] + np.arange(8)].reshape(len(warps), len(targets), 8, 8)
    if i.has("trans"):
        rows = rows.swapaxes(2, 3)
    for j, target in enumerate(targets):
        pair = np.ascontiguousarray(rows[:, j]).view(np.uint32)  # (warps, 8, 4)
        write_rows(m, target, "b32", pair.reshape(len(warps), WARP), warps)


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16")
def store_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    warps = whole_warps(m, mask)
    sources = items(i.operands[1])
    space, lanes, offsets = matrix_rows(m, i.operands[0], warps, len(sources))
    pairs = np.stack([rows_of(m, each, "b32", warps) for each in sources], 1)
    rows = pairs.reshape(len(warps), len(sources), 8, 4).view(np.uint16)
    if i.has("trans"):
        rows = np.ascontiguousarray(rows.swapaxes(2, 3))
    overwrite(m, space, lanes, offsets, rows.reshape(-1, 8))


def matrix_rows(m: Machine, address: Operand, warps: np.ndarray, matrices: int) -> tuple:
    mask = np.zeros((m.lanes // WARP, WARP), bool)
    mask[warps, : 8 * matrices] = True
    space, lanes, offsets = m.locate("shared", address, 16, mask.reshape(-1))
    taken, ideal = wavefronts(offsets.reshape(-1, 8), 16)
    m.counters["matrix_wavefronts"] += taken
    m.counters["matrix_wavefronts_ideal"] += ideal
    return space, lanes, offsets


@instruction("mma", "sync aligned row col satfinite m16n8k4 m16n8k8 m16n8k16 m16n8k32")
def multiply_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    """D = A B + C, with an exact sum of the products and one rounding after the addition of C."""
    warps = whole_warps(m, mask)
    if len(i.types) != 4 or i.types[0] not in ("f32", "s32") or i.types[0] != i.types[3] or not i.has("row"):
        m.fail("unknown types of mma")
    shape = next(each for each in i.modifiers if each[0] == "m" and each[1].isdigit())
    depth = int(re.sub(r".*k", "", shape))
    to, a_type, b_type, _ = i.types
    a = fragment(m, i.operands[1], a_type, warps, rows=2)
    b = fragment(m, i.operands[2], b_type, warps, rows=1)
    if a.shape[2] != depth or b.shape[2] != depth:
        m.fail(f"{shape} with operands {a.shape[2]} and {b.shape[2]} deep")
    product = a @ b.swapaxes(1, 2)
    m.counters["mma"] += len(warps)
    for j, (target, addend) in enumerate(zip(items(i.operands[0]), items(i.operands[3]), strict=True)):
        total = rows_of(m, addend, to, warps) + product[:, ROW + 8 * (j >> 1), QUAD * 2 + (j & 1)]
        write_rows(m, target, to, accumulated(total, to, saturate=i.has("satfinite")), warps)


def accumulated(total: np.ndarray, type: str, saturate: bool = False) -> np.ndarray:
    if type == "f32":
        return total.astype(np.float32)
    limit = np.iinfo(np.int32)
    return (np.clip(total, limit.min, limit.max) if saturate else total).astype(np.int64)


def elements(bits: np.ndarray, type: str) -> np.ndarray:
    """Matrix elements packed in 32-bit registers, unpacked to a new last axis of float64 (exact products)."""
    width = {"s8": np.uint8, "u8": np.uint8, "f16": np.uint16, "bf16": np.uint16, "tf32": np.uint32}[type]
    return decode(np.ascontiguousarray(bits)[..., None].view(width), type).astype(np.float64)


def fragment(m: Machine, operand: Operand, type: str, warps: np.ndarray, rows: int) -> np.ndarray:
    """A matrix (warps, 8 * rows, depth) from registers, ordered by blocks of 8 rows, then by depth."""
    registers = items(operand)
    packed = 32 // TYPE_BITS[type] if type != "tf32" else 1
    matrix = np.zeros((len(warps), 8 * rows, 4 * packed * len(registers) // rows))
    for j, register in enumerate(registers):
        part = elements(rows_of(m, register, "b32", warps), type)
        depth = (QUAD * packed + 4 * packed * (j // rows))[:, None] + np.arange(packed)
        matrix[:, (ROW + 8 * (j % rows))[:, None], depth] = part
    return matrix
