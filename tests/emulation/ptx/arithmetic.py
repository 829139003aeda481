"""Register instructions: arithmetic, logic, comparisons, conversions, moves."""

from collections.abc import Callable

import numpy as np

from .machine import SHARED_WINDOW, Machine, Mask
from .memory import GLOBAL_BASE
from .parser import Instruction, Vector
from .registry import instruction
from .values import SIGNED, TYPE_BITS, UNSIGNED, is_float

FLOAT_MODIFIERS = "rn ftz approx full sat NaN wide lo hi"


def flush(values: np.ndarray, i: Instruction) -> np.ndarray:
    """Flushes subnormal numbers to zero, with their sign, if the instruction has .ftz."""
    if not i.ftz or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def elementwise(names: str, modifiers: str, function: Callable) -> None:
    """Declares an instruction that applies `function` to its operands, all of one type."""

    @instruction(names, modifiers)
    def apply(m: Machine, i: Instruction, mask: Mask) -> None:
        operands = [flush(m.read(each, i.type), i) for each in i.operands[1:]]
        result = flush(np.asarray(function(*operands)), i)
        if i.has("sat"):
            if not is_float(i.type):
                m.fail("integer saturation is not implemented")
            result = np.fmin(np.fmax(result, 0), 1)  # NaN becomes 0
        m.write(i.operands[0], i.type, result, mask)


def popcount(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(x)[..., None].view(np.uint8), axis=-1).sum(-1)


def leading_zeros(x: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    length = np.frexp(x.astype(np.float64))[1] if bits == 32 else _length64(x)
    return bits - length


def _length64(x: np.ndarray) -> np.ndarray:
    high = (x >> np.uint64(32)).astype(np.float64)
    low = (x & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return np.where(high > 0, np.frexp(high)[1] + 32, np.frexp(low)[1])


def reverse_bits(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(x)[..., None].view(np.uint8), axis=-1)
    return np.packbits(bits[..., ::-1], axis=-1).view(x.dtype)[..., 0]


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient; integers round towards zero, and division by zero gives all ones, as on the hardware."""
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * divisor != a) & ((a < 0) != (divisor < 0)))
    return np.where(b == 0, a.dtype.type(-1) if a.dtype.kind == "i" else np.iinfo(a.dtype).max, quotient).astype(
        a.dtype
    )


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float64, rounded to odd: a second rounding to a shorter format is correct."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & (total != 0)
    return (bits + np.where(inexact, away, 0)).view(np.float64)


def extreme(larger: bool) -> Callable[[Machine, Instruction, Mask], None]:
    def apply(m: Machine, i: Instruction, mask: Mask) -> None:
        a, b = (flush(m.read(each, i.type), i) for each in i.operands[1:])
        if not is_float(i.type):
            result = np.maximum(a, b) if larger else np.minimum(a, b)
        else:
            zeros = (a == 0) & (b == 0)  # -0 is below +0
            if i.has("NaN"):
                result = np.maximum(a, b) if larger else np.minimum(a, b)
            else:
                result = np.fmax(a, b) if larger else np.fmin(a, b)
            result = np.where(zeros, a + b if larger else -(-a - b), result)
        m.write(i.operands[0], i.type, result, mask)

    return apply


elementwise("add", FLOAT_MODIFIERS, lambda a, b: a + b)
elementwise("sub", FLOAT_MODIFIERS, lambda a, b: a - b)
elementwise("div", FLOAT_MODIFIERS, divide)
elementwise("rem", "", remainder)
elementwise("neg", "ftz", lambda a: -a)
elementwise("abs", "ftz", np.abs)
elementwise("and", "", lambda a, b: a & b)
elementwise("or", "", lambda a, b: a | b)
elementwise("xor", "", lambda a, b: a ^ b)
elementwise("not", "", lambda a: ~a)
elementwise("brev", "", reverse_bits)
elementwise("ex2", "approx ftz", np.exp2)
elementwise("lg2", "approx ftz", np.log2)
elementwise("sin", "approx ftz", np.sin)
elementwise("cos", "approx ftz", np.cos)
elementwise("tanh", "approx", np.tanh)
elementwise("sqrt", "rn approx ftz", np.sqrt)
elementwise("rcp", "rn approx ftz", lambda a: a.dtype.type(1) / a)
elementwise("rsqrt", "approx ftz", lambda a: a.dtype.type(1) / np.sqrt(a))
elementwise("copysign", "", lambda a, b: np.copysign(b, a))
instruction("max", "ftz NaN")(extreme(larger=True))
instruction("min", "ftz NaN")(extreme(larger=False))


@instruction("popc clz")
def count_bits(m: Machine, i: Instruction, mask: Mask) -> None:
    count = popcount if i.name == "popc" else leading_zeros
    m.write(i.operands[0], "u32", count(m.read(i.operands[1], i.type)), mask)


def _product(m: Machine, i: Instruction) -> tuple[np.ndarray, str]:
    """Product of an integer mul or mad, and its type."""
    a, b = (m.read(each, i.type) for each in i.operands[1:3])
    bits = TYPE_BITS[i.type]
    if i.has("wide"):
        wide = f"{i.type[0]}{2 * bits}"
        dtype = (SIGNED if i.type[0] == "s" else UNSIGNED)[2 * bits]
        return a.astype(dtype) * b.astype(dtype), wide
    if not i.has("hi"):
        return a * b, i.type
    if bits == 64:
        return _high64(a, b), i.type
    dtype = np.int64 if i.type[0] == "s" else np.uint64
    return (a.astype(dtype) * b.astype(dtype) >> dtype(bits)).astype(a.dtype), i.type


def _high64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper 64 bits of a product, by schoolbook multiplication of 32-bit halves."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    ua, ub = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    cross = (ua >> half) * (ub & low) + ((ua & low) * (ub & low) >> half)
    rest = (ua & low) * (ub >> half) + (cross & low)
    high = (ua >> half) * (ub >> half) + (cross >> half) + (rest >> half)
    if np.asarray(a).dtype.kind == "i":  # a negative factor was read as 2^64 more
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.astype(np.asarray(a).dtype)


@instruction("mul", FLOAT_MODIFIERS)
def multiply(m: Machine, i: Instruction, mask: Mask) -> None:
    if is_float(i.type):
        a, b = (flush(m.read(each, i.type), i) for each in i.operands[1:])
        result = flush(a * b, i)
        m.write(i.operands[0], i.type, np.fmin(np.fmax(result, 0), 1) if i.has("sat") else result, mask)
    else:
        product, type = _product(m, i)
        m.write(i.operands[0], type, product, mask)


@instruction("mad", "lo hi wide")
def multiply_add(m: Machine, i: Instruction, mask: Mask) -> None:
    product, type = _product(m, i)
    m.write(i.operands[0], type, product + m.read(i.operands[3], type), mask)


@instruction("fma", "rn ftz sat")
def fused_multiply_add(m: Machine, i: Instruction, mask: Mask) -> None:
    if i.type == "f64":
        m.fail("fma.f64 is not implemented")
    a, b, c = (flush(m.read(each, i.type), i) for each in i.operands[1:])
    result = fma(a, b, c)
    result = flush(result.astype(np.float32), i) if i.type == "f32" else result
    m.write(i.operands[0], i.type, np.fmin(np.fmax(result, 0), 1) if i.has("sat") else result, mask)


@instruction("dp4a")
def dot_of_bytes(m: Machine, i: Instruction, mask: Mask) -> None:
    halves = []
    for operand, type in zip(i.operands[1:3], i.types, strict=True):
        bits = np.ascontiguousarray(m.read_lanes(operand, "b32"))[:, None]
        halves.append(bits.view(np.int8 if type == "s32" else np.uint8).astype(np.int64))
    m.write(i.operands[0], "s32", (halves[0] * halves[1]).sum(1) + m.read(i.operands[3], "s32"), mask)


@instruction("shl shr")
def shift(m: Machine, i: Instruction, mask: Mask) -> None:
    """Shifts by more than the width give 0, or the sign for arithmetic right shifts."""
    a, distance = m.read(i.operands[1], i.type), m.read(i.operands[2], "u32")
    bits = TYPE_BITS[i.type]
    within = np.minimum(distance, bits - 1).astype(a.dtype)
    if i.name == "shr":
        shifted = a >> within
        m.write(i.operands[0], i.type, shifted if i.type[0] == "s" else np.where(distance < bits, shifted, 0), mask)
    else:
        m.write(i.operands[0], i.type, np.where(distance < bits, a << within, 0), mask)


@instruction("shf", "l r wrap clamp")
def funnel_shift(m: Machine, i: Instruction, mask: Mask) -> None:
    low, high, distance = (m.read(each, "u32").astype(np.uint64) for each in i.operands[1:])
    distance = distance & np.uint64(31) if i.has("wrap") else np.minimum(distance, np.uint64(32))
    both = low | high << np.uint64(32)
    m.write(i.operands[0], "b32", both << distance >> np.uint64(32) if i.has("l") else both >> distance, mask)


@instruction("bfe")
def extract_field(m: Machine, i: Instruction, mask: Mask) -> None:
    bits = TYPE_BITS[i.type]
    field = m.read(i.operands[1], i.type).astype(np.int64 if i.type[0] == "s" else np.uint64)
    start, length = (np.asarray(m.read(each, "u32") & np.uint32(255), np.int64) for each in i.operands[2:])
    length = np.minimum(length, 64)
    # Shift left to the edge, then right, which extends by zero or sign; bits beyond the register are zero or sign too.
    end = np.minimum(start + length, bits)
    left, right = (64 - end).astype(field.dtype), (64 - (end - start)).astype(field.dtype)
    empty = end <= start
    safe = np.where(empty, 0, left).astype(field.dtype), np.where(empty, 0, right).astype(field.dtype)
    value = (field << safe[0]) >> safe[1]
    nothing = np.where((length > 0) & (field < 0), -1, 0) if i.type[0] == "s" else 0
    m.write(i.operands[0], i.type, np.where(empty, nothing, value).astype(field.dtype), mask)


@instruction("bfi")
def insert_field(m: Machine, i: Instruction, mask: Mask) -> None:
    bits = TYPE_BITS[i.type]
    field, into = (m.read(each, i.type).astype(np.uint64) for each in i.operands[1:3])
    start, length = (np.asarray(m.read(each, "u32") & np.uint32(255), np.uint64) for each in i.operands[3:])
    all_ones = np.uint64(0xFFFFFFFFFFFFFFFF)
    ones = np.where(length >= 64, all_ones, (np.uint64(1) << (length & np.uint64(63))) - np.uint64(1))
    inside = start < bits
    at = np.where(inside, start, 0).astype(np.uint64)
    where = np.where(inside, ones << at, np.uint64(0))
    m.write(i.operands[0], i.type, into & ~where | field << at & where, mask)


@instruction("prmt")
def permute_bytes(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b, selector = (m.read(each, "u32").astype(np.uint64) for each in i.operands[1:])
    both, result = a | b << np.uint64(32), np.uint64(0)
    for byte in range(4):
        choice = selector >> np.uint64(4 * byte)
        value = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(choice & np.uint64(8), sign, value) << np.uint64(8 * byte)
    m.write(i.operands[0], "b32", np.asarray(result), mask)


@instruction("lop3")
def logic_of_three(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b, c = (m.read(each, "b32") for each in i.operands[1:4])
    table = int(m.read(i.operands[4], "u32"))
    result = np.uint32(0)
    for row in range(8):
        if table >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    m.write(i.operands[0], "b32", np.asarray(result), mask)


COMPARISONS: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@instruction("setp", " ".join(COMPARISONS) + " equ neu ltu leu gtu geu num nan and or xor ftz")
def compare(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b = (flush(m.read(each, i.type), i) for each in i.operands[1:3])
    wanted = i.modifiers[0]
    if not is_float(i.type):
        result = COMPARISONS[wanted](a, b)
    else:
        unordered = np.isnan(a) | np.isnan(b)
        if wanted in ("num", "nan"):
            result = unordered if wanted == "nan" else ~unordered
        elif wanted[-1] == "u":
            result = COMPARISONS[wanted[:-1]](a, b) | unordered
        else:
            result = COMPARISONS[wanted](a, b) & ~unordered
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(i.modifiers[1])
    opposite = ~np.asarray(result)
    if combine:
        third = m.read(i.operands[3], "pred")
        result, opposite = combine(result, third), combine(opposite, third)
    both = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    for register, value in zip(both, (result, opposite), strict=False):
        m.write(register, "pred", value, mask)


@instruction("selp")
def select(m: Machine, i: Instruction, mask: Mask) -> None:
    bits = f"b{TYPE_BITS[i.type]}"
    a, b = (m.read(each, bits) for each in i.operands[1:3])
    m.write(i.operands[0], bits, np.where(m.read(i.operands[3], "pred"), a, b), mask)


@instruction("mov")
def move(m: Machine, i: Instruction, mask: Mask) -> None:
    target, source = i.operands
    type = i.type if i.type == "pred" else f"b{TYPE_BITS[i.type]}"
    if isinstance(target, Vector):
        width = TYPE_BITS[type] // len(target.items)
        whole = m.read(source, type)
        for part, register in enumerate(target.items):
            m.write(register, f"b{width}", whole >> whole.dtype.type(part * width), mask)
    elif isinstance(source, Vector):
        width, dtype = TYPE_BITS[type] // len(source.items), UNSIGNED[TYPE_BITS[type]]
        whole = dtype(0)
        for part, each in enumerate(source.items):
            whole = whole | m.read(each, f"b{width}").astype(dtype) << dtype(part * width)
        m.write(target, type, whole, mask)
    else:
        m.write(target, type, m.read(source, type), mask)


@instruction("cvta", "to global shared")
def convert_address(m: Machine, i: Instruction, mask: Mask) -> None:
    """A generic address equals the global address; shared memory is mapped at SHARED_WINDOW."""
    address = m.read(i.operands[1], i.type)
    if i.has("shared"):
        window = np.uint64(SHARED_WINDOW)
        address = address - window if i.has("to") else address + window
    m.write(i.operands[0], i.type, address, mask)


@instruction("isspacep", "global shared")
def is_in_space(m: Machine, i: Instruction, mask: Mask) -> None:
    address = m.read(i.operands[1], "u64")
    shared = (address >= np.uint64(SHARED_WINDOW)) & (address < np.uint64(GLOBAL_BASE))
    m.write(i.operands[0], "pred", shared if i.has("shared") else ~shared, mask)


ROUND_TO_INTEGER: dict[str, Callable] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", "rn rna sat ftz " + " ".join(ROUND_TO_INTEGER))
def convert(m: Machine, i: Instruction, mask: Mask) -> None:
    to, source = i.types
    if len(i.operands) == 3:  # cvt.rn.f16x2.f32 d, high, low
        high, low = (m.read_lanes(each, source) for each in i.operands[1:])
        m.write(i.operands[0], to, np.stack([low, high], -1), mask)
        return
    value = flush(m.read(i.operands[1], source), i)
    rounding = next((ROUND_TO_INTEGER[each] for each in i.modifiers if each in ROUND_TO_INTEGER), None)
    if is_float(source) and not is_float(to):
        if rounding is None:
            m.fail("cvt of a float to an integer needs a rounding modifier")
        value = _to_integer(rounding(value.astype(np.float64)), to)
    elif rounding is not None:
        value = rounding(value)
    elif i.has("sat") and is_float(to):
        value = np.fmin(np.fmax(value, 0), 1)
    elif i.has("sat"):
        value = _clamp(value, to)
    elif is_float(to) and not is_float(source):
        value = value.astype(np.float64 if to == "f64" else np.float32)
    m.write(i.operands[0], to, flush(np.asarray(value), i), mask)


def _limits(type: str) -> tuple[int, int]:
    info = np.iinfo((SIGNED if type[0] == "s" else UNSIGNED)[TYPE_BITS[type]])
    return int(info.min), int(info.max)


def _to_integer(value: np.ndarray, type: str) -> np.ndarray:
    """Float to integer: saturates, NaN gives 0."""
    low, high = _limits(type)
    dtype = (SIGNED if type[0] == "s" else UNSIGNED)[TYPE_BITS[type]]
    inside = np.where((value > low) & (value < high), value, 0).astype(dtype)
    return np.where(value >= high, dtype(high), np.where(value <= low, dtype(low), inside))


def _clamp(value: np.ndarray, type: str) -> np.ndarray:
    low, high = _limits(type)
    info = np.iinfo(value.dtype)
    return np.clip(value, max(low, info.min), min(high, info.max))
