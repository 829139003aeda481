"""PTX matrix instructions, with the fragments of the PTX ISA's figures, and atomics."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulation.ptx import GlobalMemory, PtxError, launch, parse

LANES = range(32)
DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "s8": torch.int8, "u8": torch.uint8,
    "f32": torch.float32, "s32": torch.int32,
}  # fmt: skip


def run(body: str, *arrays: np.ndarray, result: tuple[int, ...], block: int = 32, shared: int = 16) -> np.ndarray:
    """uint32 results at %d9 of a kernel with the arrays at %d0, %d1, ..."""
    memory = GlobalMemory()
    arguments = [memory.put(f"x{i}", array) for i, array in enumerate(arrays)]
    arguments.append(memory.empty("result", result, np.uint32))
    names = [f"p{i}" for i in range(len(arguments))]
    where = [f"%d{i}" for i in range(len(arrays))] + ["%d9"]
    kernel = parse(f"""
        .entry k({", ".join(f".param .u64 {name}" for name in names)}) {{
        .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %d<40>; .shared .align 128 .b8 tile[{shared}];
        {" ".join(f"ld.param.u64 {to}, [{name}];" for to, name in zip(where, names, strict=True))}
        mov.u32 %r0, %tid.x;
        {body} ret; }}""")
    launch(kernel, (1,), (block,), arguments, memory)
    return memory.get("result")


def registers(base: int, count: int) -> str:
    return "{" + ", ".join(f"%r{base + i}" for i in range(count)) + "}"


def transfer(opcode: str, pointer: str, base: int, count: int) -> str:
    """Loads or stores `count` registers per lane, one after the other in memory."""
    text = f"mad.wide.u32 %d20, %r0, {4 * count}, {pointer};"
    for i in range(count):
        register, place = f"%r{base + i}", f"[%d20+{4 * i}]"
        text += f"{opcode} {register}, {place};" if opcode.startswith("ld") else f"{opcode} {place}, {register};"
    return text


def bits_of(held: torch.Tensor) -> np.ndarray:
    return held.contiguous().view(torch.uint8).numpy().view(np.uint32)


MMAS = [
    ("m16n8k8", "f16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k16", "bf16"), ("m16n8k4", "tf32"),
    ("m16n8k8", "tf32"), ("m16n8k16", "s8"), ("m16n8k32", "s8"), ("m16n8k32", "u8"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "type"), MMAS)
def test_mma(shape: str, type: str) -> None:
    """Lane l is thread l & 3 of group l >> 2. With p elements per register, element i of A is in register i // p."""
    depth, dtype = int(shape.partition("k")[2]), DTYPES[type]
    packed = 4 // dtype.itemsize
    sums = "s32" if type in ("s8", "u8") else "f32"
    low, high = (0, 256) if type == "u8" else (-128, 128) if type == "s8" else (-8, 9)
    a, b = torch.randint(low, high, (16, depth)).to(dtype), torch.randint(low, high, (depth, 8)).to(dtype)
    c = torch.randint(-99, 100, (16, 8)).to(DTYPES[sums])

    def of_a(lane: int, i: int) -> tuple[int, int]:
        register, element = divmod(i, packed)
        return (lane >> 2) + 8 * (register % 2), (lane & 3) * packed + element + 4 * packed * (register // 2)

    def of_b(lane: int, i: int) -> tuple[int, int]:
        register, element = divmod(i, packed)
        return (lane & 3) * packed + element + 4 * packed * register, lane >> 2

    def of_c(lane: int, i: int) -> tuple[int, int]:
        return (lane >> 2) + 8 * (i // 2), (lane & 3) * 2 + i % 2

    def held(matrix: torch.Tensor, place: Callable[[int, int], tuple[int, int]]) -> np.ndarray:
        elements = matrix.numel() // 32
        return bits_of(torch.stack([torch.stack([matrix[place(lane, i)] for i in range(elements)]) for lane in LANES]))

    operands = [held(a, of_a), held(b, of_b), held(c, of_c)]
    counts = [each.shape[1] for each in operands]
    body = "".join(transfer("ld.global.b32", f"%d{i}", 10 * (i + 1), n) for i, n in enumerate(counts))
    body += f"mma.sync.aligned.{shape}.row.col.{sums}.{type}.{type}.{sums} {registers(40, 4)}, "
    body += ", ".join(registers(10 * (i + 1), n) for i, n in enumerate(counts)) + ";"
    body += transfer("st.global.b32", "%d9", 40, 4)
    found = run(body, *operands, result=(32, 4))
    expected = (a.double() @ b.double() + c.double()).to(DTYPES[sums])
    np.testing.assert_array_equal(found, held(expected, of_c))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_to_registers_and_back(count: int, transposed: bool) -> None:
    """Register j of lane l: elements 2 (l % 4) and 2 (l % 4) + 1 of row l // 4 of matrix j (.trans: of a column)."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    trans = ".trans" if transposed else ""
    rows = f"and.b32 %r5, %r0, {8 * count - 1}; mov.u32 %r6, tile; mad.lo.s32 %r6, %r5, 16, %r6;"
    copy = f"setp.lt.u32 %p1, %r0, {8 * count}; mad.wide.u32 %d20, %r0, 16, %d0;"
    copy += "@%p1 ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d20]; @%p1 st.shared.v4.u32 [%r6], {%r1, %r2, %r3, %r4};"
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(10, count)}, [%r6];"
    found = run(
        rows + copy + "bar.sync 0;" + load + transfer("st.global.b32", "%d9", 10, count),
        matrices, result=(32, count), shared=512,
    )  # fmt: skip
    for lane, j in itertools.product(LANES, range(count)):
        matrix = matrices[j].T if transposed else matrices[j]
        low, high = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
        assert found[lane, j] == int(low) | int(high) << 16

    store = (
        f"add.u32 %r7, %r6, 512; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r7], {registers(10, count)};"
    )
    back = "bar.sync 0; @%p1 ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r7]; mad.wide.u32 %d20, %r0, 16, %d9;"
    back += "@%p1 st.global.v4.u32 [%d20], {%r1, %r2, %r3, %r4};"
    again = run(rows + copy + "bar.sync 0;" + load + store + back, matrices, result=(count, 8, 4), shared=1024)
    np.testing.assert_array_equal(again, matrices.view(np.uint32).reshape(count, 8, 4))


# ---- atomics

ATOMICS: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda old, x: (old + x) % 2**32,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda old, x: min((old, x), key=lambda y: y ^ 0x80000000),
    "max.s32": lambda old, x: max((old, x), key=lambda y: y ^ 0x80000000),
    "and.b32": int.__and__,
    "or.b32": int.__or__,
    "xor.b32": int.__xor__,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics(operation: str, space: str) -> None:
    """64 threads on 4 words, in thread order without a seed; each thread gets the old value."""
    values = np.random.default_rng(0).integers(0, 1 << 32, 64, np.uint32)
    if operation[:3] in ("inc", "dec"):
        values %= 9
    start = "and.b32 %r5, %r0, 3; mad.wide.u32 %d20, %r0, 4, %d0; ld.global.u32 %r1, [%d20];"
    if space == "global":
        address, ready = "[%d21]", "mad.wide.u32 %d21, %r5, 4, %d1;"
    else:
        ready = "mov.u32 %r6, tile; mad.lo.s32 %r6, %r5, 4, %r6; setp.lt.u32 %p1, %r0, 4;"
        ready += "@%p1 st.shared.u32 [%r6], 5; bar.sync 0;"
        address = "[%r6]"
    body = f"{start}{ready} atom.{space}.{operation} %r9, {address}, %r1;" + transfer("st.global.b32", "%d9", 9, 1)
    found = run(body, values, np.full(4, 5, np.uint32), result=(64,), block=64)
    words = [5] * 4
    for thread, value in enumerate(values):
        assert found[thread] == words[thread % 4]
        words[thread % 4] = ATOMICS[operation](words[thread % 4], int(value))


def test_compare_and_swap() -> None:
    """Each thread in turn changes the word from its own number to the next."""
    body = "add.u32 %r1, %r0, 1; atom.global.cas.b32 %r9, [%d0], %r0, %r1;" + transfer("st.global.b32", "%d9", 9, 1)
    np.testing.assert_array_equal(run(body, np.zeros(1, np.uint32), result=(32,)), np.arange(32))


@pytest.mark.parametrize(("type", "dtype"), [("f32", np.float32), ("f16x2", np.float16), ("u64", np.uint64)])
def test_sums_by_atomics(type: str, dtype: type) -> None:
    """Integer-valued floats: the order does not matter."""
    x = np.arange(32 * 8 // np.dtype(dtype).itemsize).astype(dtype) % 7
    words = x.reshape(-1, 2 if type == "f16x2" else 1)[:32]
    size, register = (8, "%d3") if type == "u64" else (4, "%r3")
    noftz = ".noftz" if type == "f16x2" else ""
    body = f"mad.wide.u32 %d20, %r0, {size}, %d0; ld.global.b{8 * size} {register}, [%d20];"
    body += f"red.global.add{noftz}.{type} [%d1], {register}; membar.gl; bar.sync 0;"
    body += f"ld.relaxed.gpu.global.b{8 * size} {register}, [%d1]; st.global.b{8 * size} [%d9], {register};"
    found = run(body, words, np.zeros_like(words[0]), result=(size // 4,))
    np.testing.assert_array_equal(found.view(dtype), words.sum(0))


def test_invalid_matrix_instructions_are_refused() -> None:
    for opcode in (
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    ):
        with pytest.raises(PtxError, match=r"unknown types of mma|deep"):
            run(
                f"{opcode} {registers(10, 4)}, {registers(20, 4)}, {registers(30, 2)}, {registers(40, 4)};", result=(1,)
            )
