"""wgmma.mma_async of sm_90a: four warps multiply 64 rows; operands from shared memory through matrix descriptors.

Products are computed at issue. Until the wait their registers must not be accessed and their operands in shared memory
must not be written. PTX ISA, "Asynchronous warpgroup-level matrix instructions".
"""

import re
from dataclasses import dataclass

import numpy as np

from .machine import WARP, Machine, Mask
from .parser import Instruction, Operand, Vector
from .registry import instruction
from .transfers import items, observe
from .values import TYPE_BITS, decode
from .warps import QUAD, ROW, accumulated, fragment, rows_of, whole_warps, write_rows

SHAPE = re.compile(r"m64n(\d+)k(\d+)")
SHAPES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16, 32))
SWIZZLED_ROW = np.array([16, 128, 64, 32])  # bytes, indexed by the two highest bits of a descriptor
SWIZZLE = np.array([0, 7, 3, 1])  # which of the address bits 7 to 9 are xored into bits 4 to 6


@dataclass
class Product:
    """One wgmma in flight, for the warps that have not waited for it."""

    warps: np.ndarray
    group: np.ndarray  # per warp
    registers: list[int]
    read: np.ndarray  # (warps, granules) of shared memory
    writer: np.ndarray  # last writer of the granules at issue, and its clock
    written_at: np.ndarray

    def part(self, which: np.ndarray) -> "Product":
        rows = (self.read[which], self.writer[which], self.written_at[which])
        return Product(self.warps[which], self.group[which], self.registers, *rows)


@instruction("wgmma", f"fence commit_group wait_group mma_async sync aligned {SHAPES}")
def wgmma(m: Machine, i: Instruction, mask: Mask) -> None:
    warps = whole_warps(m, mask)
    if i.has("commit_group"):
        m.committed_products[warps] += 1
    elif i.has("wait_group"):
        wait(m, int(m.read(i.operands[0], "u32")), warps)
    elif i.has("mma_async"):
        issue(m, i, warps)


def issue(m: Machine, i: Instruction, warps: np.ndarray) -> None:
    if len(warps) % 4 or (warps.reshape(-1, 4) % 4 != np.arange(4)).any():
        m.fail("executed by part of a warpgroup", warps[0] * WARP)
    to, a_type, b_type = i.types
    target, a_operand, b_operand, keep, *flags = i.operands
    flags = [int(m.read(each, "u32")) for each in flags]  # floats: scales of a and b, then transpositions
    transposed = flags[2:]
    if to not in ("f32", "s32") or flags[:2] not in ([], [1, 1]):
        m.fail("unknown types or scales of wgmma")
    shape = next(found for each in i.modifiers if (found := SHAPE.fullmatch(each)))
    width, depth = int(shape[1]), np.arange(int(shape[2]))
    for register in items(target):  # accumulating on a wgmma in flight is allowed
        m.locked.pop(register.index, None)
    if isinstance(a_operand, Vector):
        a, read = fragment(m, a_operand, a_type, warps, rows=2), []
    else:
        row = (warps % 4 * 16)[:, None, None] + np.arange(16)[:, None]
        a, read_a = shared_matrix(m, a_operand, a_type, warps, row, depth, len(transposed) == 2 and transposed[0] == 1)
        read = [read_a]
    b, read_b = shared_matrix(m, b_operand, b_type, warps, np.arange(width)[:, None], depth, transposed[-1:] == [1])
    product = a @ b.swapaxes(1, 2)
    m.counters["wgmma"] += len(warps)
    adds = rows_of(m, keep, "pred", warps)
    for j, register in enumerate(items(target)):
        before = np.where(adds, rows_of(m, register, to, warps), 0)
        total = before + product[:, ROW + 8 * (j >> 1 & 1), (j >> 2) * 8 + QUAD * 2 + (j & 1)]
        write_rows(m, register, to, accumulated(total, to), warps)
    at, accesses = np.concatenate([*read, read_b], 1), m.shared.accesses
    registers = [each.index for each in items(target)]
    group = m.committed_products[warps]
    m.products.append(Product(warps, group, registers, at, accesses.writer[at], accesses.written_at[at]))
    lock_registers(m)


def wait(m: Machine, keep: int, warps: np.ndarray) -> None:
    """Completes all but the last `keep` groups of these warps."""
    waiting = np.zeros(m.lanes // WARP, bool)
    waiting[warps] = True
    under_way = []
    for each in m.products:
        done = waiting[each.warps] & (each.group < m.committed_products[each.warps] - keep)
        finish(m, each.part(done))
        if not done.all():
            under_way.append(each.part(~done))
    m.products = under_way
    lock_registers(m)


def finish(m: Machine, product: Product) -> None:
    accesses = m.shared.accesses
    changed = accesses.writer[product.read] != product.writer
    changed |= accesses.written_at[product.read] != product.written_at
    if changed.any():
        warp, part = np.argwhere(changed)[0]
        offset = int(product.read[warp, part]) * accesses.granule % m.shared_bytes
        m.fail(f"shared byte {offset} was written while a wgmma read it", product.warps[warp] * WARP)


def lock_registers(m: Machine) -> None:
    """Locks the accumulators of products in flight."""
    m.locked = {}
    for product in m.products:
        lanes = np.zeros((m.lanes // WARP, WARP), bool)
        lanes[product.warps] = True
        for index in product.registers:
            m.locked[index] = m.locked.get(index, False) | lanes.reshape(-1)


def shared_matrix(
    m: Machine,
    descriptor: Operand,
    type: str,
    warps: np.ndarray,
    row: np.ndarray,
    depth: np.ndarray,
    transposed: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """An operand in shared memory (warps, rows, depth), and the granules read; transposed: stored column by column."""
    held = rows_of(m, descriptor, "b64", warps)[:, 0]

    def field(start: int, bits: int) -> np.ndarray:
        return (held >> np.uint64(start) & np.uint64((1 << bits) - 1)).astype(np.int64)[:, None, None]

    start, leading, stride = (field(shift, 14) << 4 for shift in (0, 16, 32))
    mode = field(62, 2)
    width, size = SWIZZLED_ROW[mode], TYPE_BITS[type] // 8
    if transposed:
        if (mode == 0).any():
            m.fail("a transposed operand without swizzle is not implemented")
        across = row * size
        address = start + depth // 8 * stride + depth % 8 * width + across // width * leading + across % width
    else:
        along = depth * size
        address = start + row // 8 * stride + row % 8 * width + along // width * leading + along % width
    address = address ^ (address >> 7 & SWIZZLE[mode]) << 4
    lanes = warps * WARP
    if (address < 0).any() or (address + size > m.shared_bytes).any():
        m.fail(f"wgmma operand out of bounds of shared memory: byte {address.max()} of {m.shared_bytes}", lanes[0])
    offsets = address + (m.local_cta[lanes] * m.shared_bytes)[:, None, None]
    every = np.repeat(lanes, offsets[0].size)
    at = observe(m, m.shared, every, offsets.reshape(-1), size)
    accesses = m.shared.accesses
    if accesses.unfenced[at].any():
        m.fail("wgmma reads shared memory written after the last fence.proxy.async", lanes[0])
    bits = m.shared.words(size)[offsets // size]
    return decode(bits, type).astype(np.float64), at.reshape(len(warps), -1)
