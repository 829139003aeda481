"""Single PTX instructions on extreme values, against definitions in Python's int, Fraction and math.

The definitions use no NumPy arithmetic, since the simulator does.
"""

import itertools
import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from emulation.ptx import GlobalMemory, launch, parse
from emulation.ptx.values import TYPE_BITS, UNSIGNED

Row = tuple[int, ...]
INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")


def execute(opcode: str, to: str, types: tuple[str, ...], rows: list[Row], suffix: str = "") -> list[int]:
    """Result bits of an instruction for rows of operand bits. `suffix`: further, constant operands."""
    memory = GlobalMemory()
    declarations, body, arguments = "", "", []
    for i, type in enumerate(types):
        bits = TYPE_BITS[type]
        column = np.array([row[i] for row in rows], np.uint64).astype(UNSIGNED[max(8, bits)])
        arguments.append(memory.put(f"x{i}", column))
        if type == "pred":
            declarations += f".reg .pred x{i}; .reg .b16 byte{i};"
            body += f"ld.global.u8 byte{i}, [at{i}]; setp.ne.u16 x{i}, byte{i}, 0;"
        else:
            declarations += f".reg .b{max(16, bits)} x{i};"
            body += f"ld.global.b{bits} x{i}, [at{i}];"
    size = max(16, TYPE_BITS[to])
    arguments.append(memory.empty("result", len(rows), UNSIGNED[size]))
    declarations += f".reg .b{size} result; .reg .pred truth;"
    body += (
        f"{opcode} {'truth' if to == 'pred' else 'result'}, {', '.join(f'x{i}' for i in range(len(types)))}{suffix};"
    )
    body += "selp.u16 result, 1, 0, truth;" if to == "pred" else ""
    body += f"st.global.b{size} [at{len(types)}], result;"
    find = ""
    for i, width in enumerate([max(8, TYPE_BITS[type]) for type in types] + [size]):
        find += f"ld.param.u64 at{i}, [p{i}]; mad.wide.u32 at{i}, thread, {width // 8}, at{i};"
    kernel = parse(f"""
        .entry k({", ".join(f".param .u64 p{i}" for i in range(len(arguments)))}) {{
        .reg .b32 thread; .reg .b32 cta; .reg .pred outside; .reg .b64 at<9>; {declarations}
        mov.u32 thread, %tid.x; mov.u32 cta, %ctaid.x; mad.lo.u32 thread, cta, 256, thread;
        setp.ge.u32 outside, thread, {len(rows)}; @outside exit;
        {find} {body} ret; }}""")
    launch(kernel, (-(-len(rows) // 256),), (256,), arguments, memory)
    return [int(x) for x in memory.get("result")]


# ---- integers


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def value(x: int, type: str) -> int:
    """Value of bits in an integer type."""
    return signed(x, TYPE_BITS[type]) if type[0] == "s" else x & (1 << TYPE_BITS[type]) - 1


def integers(bits: int) -> list[int]:
    top = 1 << (bits - 1)
    random = np.random.default_rng(bits).integers(0, 1 << 63, 6, np.uint64)
    corners = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 100, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2]
    return sorted({x & (2 * top - 1) for x in corners + [int(x) * 2 + 1 for x in random]})


def truncate(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shift_right(a: int, n: int, type: str) -> int:
    return value(a, type) >> n  # Python's shift keeps the sign and takes any distance


def extract(a: int, start: int, length: int, type: str) -> int:
    """PTX ISA, bfe: bits beyond the register are the sign (s32, s64) or zero (u32, u64)."""
    bits = TYPE_BITS[type]
    start, length = start & 255, length & 255
    sign_at = min(start + length - 1, bits - 1)
    sign = a >> sign_at & 1 if type[0] == "s" and length else 0
    return sum((a >> start + i & 1 if i < length and start + i < bits else sign) << i for i in range(bits))


def insert(a: int, b: int, start: int, length: int, bits: int) -> int:
    start, length = start & 255, length & 255
    for i in range(length):
        if start + i < bits:
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
    return b


def permute(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    chosen = [(source[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes((255 if byte >> 7 else 0) if sign else byte for byte, sign in chosen), "little")


def three_inputs(table: int) -> Callable[[int, int, int], int]:
    return lambda a, b, c: sum(
        (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
    )


def funnel(a: int, b: int, n: int, left: bool, wrap: bool) -> int:
    n = n & 31 if wrap else min(n, 32)
    both = b << 32 | a
    return (both << n) >> 32 if left else both >> n


def bytes_of(x: int, type: str) -> list[int]:
    return [value(x >> 8 * i, type[0] + "8") for i in range(4)]


INTEGER: list[
    tuple[str, str, tuple[str, ...], Callable[..., int], str]
] = []  # opcode, result, operands, definition, suffix
for t in ("s32", "u32", "s64", "u64"):
    b = int(t[1:])
    INTEGER += [
        (f"add.{t}", t, (t, t), lambda a, b: a + b, ""),
        (f"sub.{t}", t, (t, t), lambda a, b: a - b, ""),
        (f"mul.lo.{t}", t, (t, t), lambda a, b: a * b, ""),
        (f"mul.hi.{t}", t, (t, t), lambda a, c, n=b: a * c >> n, ""),
        (f"mad.lo.{t}", t, (t, t, t), lambda a, b, c: a * b + c, ""),
        (f"div.{t}", t, (t, t), lambda a, b: truncate(a, b) if b else -1, ""),
        (f"rem.{t}", t, (t, t), lambda a, b: a - b * truncate(a, b) if b else a, ""),
        (f"min.{t}", t, (t, t), min, ""),
        (f"max.{t}", t, (t, t), max, ""),
        (f"shr.{t}", t, (t, "u32"), lambda a, n: a >> n, ""),
        (f"bfe.{t}", t, (t, "u32", "u32"), lambda a, s, n, t=t: extract(a & (1 << TYPE_BITS[t]) - 1, s, n, t), ""),
        *((f"setp.{c}.{t}", "pred", (t, t), f, "") for c, f in {
            "eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__,
        }.items()),
    ]  # fmt: skip
for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    INTEGER.append((f"mul.wide.{t}", wide, (t, t), lambda a, b: a * b, ""))
    INTEGER.append((f"mad.wide.{t}", wide, (t, t, wide), lambda a, b, c: a * b + c, ""))
for t in ("b32", "b64"):
    b = int(t[1:])
    INTEGER += [
        (f"and.{t}", t, (t, t), int.__and__, ""),
        (f"or.{t}", t, (t, t), int.__or__, ""),
        (f"xor.{t}", t, (t, t), int.__xor__, ""),
        (f"not.{t}", t, (t,), int.__invert__, ""),
        (f"shl.{t}", t, (t, "u32"), lambda a, n: a << n if n < 64 else 0, ""),
        (f"bfi.{t}", t, (t, t, "u32", "u32"), lambda a, c, s, n, b=b: insert(a, c, s, n, b), ""),
        (f"popc.{t}", "u32", (t,), lambda a: bin(a).count("1"), ""),
        (f"clz.{t}", "u32", (t,), lambda a, b=b: b - a.bit_length(), ""),
        (f"brev.{t}", t, (t,), lambda a, b=b: int(f"{a:0{b}b}"[::-1], 2), ""),
        (f"selp.{t}", t, (t, t, "pred"), lambda a, b, p: a if p else b, ""),
    ]
INTEGER += [
    ("prmt.b32", "b32", ("b32", "b32", "b32"), permute, ""),
    *(("lop3.b32", "b32", ("b32", "b32", "b32"), three_inputs(n), f", {n}") for n in (0x00, 0x96, 0xE8, 0xD8, 0xFF)),
    *((f"shf.{'lr'[right]}.{mode}.b32", "b32", ("b32", "b32", "u32"),
       lambda a, b, n, right=right, mode=mode: funnel(a, b, n, not right, mode == "wrap"), "")
      for right in (0, 1) for mode in ("wrap", "clamp")),
    ("dp4a.s32.s32", "s32", ("s32", "s32", "s32"),
     lambda a, b, c: c + sum(map(int.__mul__, bytes_of(a, "s32"), bytes_of(b, "s32"))), ""),
    ("dp4a.u32.s32", "s32", ("u32", "s32", "s32"),
     lambda a, b, c: c + sum(map(int.__mul__, bytes_of(a, "u32"), bytes_of(b, "s32"))), ""),
    ("setp.lt.and.s32", "pred", ("s32", "s32", "pred"), lambda a, b, p: a < b and bool(p), ""),
    ("setp.lt.or.s32", "pred", ("s32", "s32", "pred"), lambda a, b, p: a < b or bool(p), ""),
    ("setp.lt.xor.s32", "pred", ("s32", "s32", "pred"), lambda a, b, p: (a < b) != bool(p), ""),
    ("and.pred", "pred", ("pred", "pred"), int.__and__, ""), ("or.pred", "pred", ("pred", "pred"), int.__or__, ""),
    ("xor.pred", "pred", ("pred", "pred"), int.__xor__, ""), ("not.pred", "pred", ("pred",), lambda a: 1 - a, ""),
    *((f"cvt.{to}.{of}", to, (of,), lambda a: a, "")
      for to in INTEGERS[2:] for of in INTEGERS if to != of),
    *((f"cvt.sat.{to}.{of}", to, (of,), lambda a, low=low, high=high: min(max(a, low), high), "")
      for to, low, high in (("s16", -(2**15), 2**15 - 1), ("u16", 0, 2**16 - 1)) for of in ("s32", "u32", "s64")),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "to", "types", "definition", "suffix"), INTEGER, ids=[c[0] + c[4] for c in INTEGER])
def test_integers(opcode: str, to: str, types: tuple[str, ...], definition: Callable[..., int], suffix: str) -> None:
    choices = [[0, 1] if type == "pred" else integers(TYPE_BITS[type]) for type in types]
    rows = list(itertools.product(*choices))
    if len(rows) > 3000:
        rows = [rows[i] for i in np.random.default_rng(0).choice(len(rows), 3000, replace=False)]
    found = execute(opcode, to, types, rows, suffix)
    for row, bits in zip(rows, found, strict=True):
        operands = [x if type == "pred" else value(x, type) for x, type in zip(row, types, strict=True)]
        size = TYPE_BITS[to]
        assert bits & (1 << size) - 1 == int(definition(*operands)) & (1 << size) - 1, (opcode, operands)


# ---- floats

FORMATS = {
    "f16": ("e", 10, 15),
    "f32": ("f", 23, 127),
    "bf16": ("", 7, 127),
}  # struct code, mantissa bits, exponent bias
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.5,
    3.0,
    1 / 3,
    1e-3,
    -7.25,
    100.7,
    6e4,
    1e-7,
    3e38,
    -1e-41,
    2.0**-24,
    math.inf,
    -math.inf,
    math.nan,
]


def to_float(bits: int, type: str) -> float:
    if type == "bf16":
        return to_float(bits << 16, "f32")
    code = FORMATS[type][0]
    return struct.unpack("<" + code, bits.to_bytes(TYPE_BITS[type] // 8, "little"))[0]


def round_to(x: Fraction, type: str) -> int:
    """Bits of the nearest number, ties to even, counted in units in the last place."""
    _, mantissa, bias = FORMATS[type]
    sign, x = (1 << TYPE_BITS[type] - 1 if x < 0 else 0), abs(x)
    if x == 0:
        return sign
    exponent = max(math.frexp(float(x))[1] - 1 if 2**-1000 < x < 2**1000 else -1000, 1 - bias)
    while Fraction(2) ** exponent > x and exponent > 1 - bias:
        exponent -= 1
    units = round(x / Fraction(2) ** (exponent - mantissa))  # Fraction rounds half to even
    return sign | min(units + (exponent + bias - 1 << mantissa), (2 * bias + 1) << mantissa)


def float_rows(type: str, operands: int, seed: int = 0) -> list[Row]:
    """Bits of all pairs of special values, and of random values of all magnitudes."""
    width = TYPE_BITS[type]
    special = torch.tensor(SPECIAL, dtype={"f16": torch.float16, "f32": torch.float32, "bf16": torch.bfloat16}[type])
    bits = special.view(torch.int32 if width == 32 else torch.int16).numpy().view(UNSIGNED[width])
    random = np.random.default_rng(seed).integers(0, 1 << width, (500, operands))
    close = np.random.default_rng(seed).integers(0, 1 << FORMATS[type][1], (300, operands)) + (
        FORMATS[type][2] << FORMATS[type][1]
    )
    pairs = itertools.product(map(int, bits), repeat=min(operands, 2))
    return [row + row[: operands - len(row)] for row in pairs] + [tuple(map(int, row)) for row in (*random, *close)]


def exact(function: Callable[..., Any], operands: list[float], type: str) -> int | None:
    """Correct bits, or None if an operand or the result is not finite (compared with NumPy's IEEE results)."""
    if not all(map(math.isfinite, operands)):
        return None
    try:
        return round_to(function(*map(Fraction, operands)), type)
    except ZeroDivisionError:
        return None


ROUNDED: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c, "div.rn": lambda a, b: a / b, "rcp.rn": lambda a: 1 / a,
}  # fmt: skip
ONLY_F32 = ("div.rn", "rcp.rn")


@pytest.mark.parametrize(
    ("name", "type"), [(name, type) for name in ROUNDED for type in FORMATS if type == "f32" or name not in ONLY_F32]
)
def test_floats_are_rounded_once(name: str, type: str) -> None:
    function = ROUNDED[name]
    operands = function.__code__.co_argcount
    rows = float_rows(type, operands)
    found = execute(f"{name}.{type}", type, (type,) * operands, rows)
    checked = 0
    for row, bits in zip(rows, found, strict=True):
        values = [to_float(x, type) for x in row]
        expected = exact(function, values, type)
        if expected is None or expected << 1 == 0:  # the sign of a zero is tested below
            continue
        checked += 1
        assert bits == expected, (name, values, to_float(bits, type), to_float(expected, type))
    assert checked > 300


def test_zeros_infinities_and_nans() -> None:
    inf, nan = math.inf, math.nan
    cases = [
        ("add", -0.0, -0.0, -0.0), ("add", 0.0, -0.0, 0.0), ("add", inf, -inf, nan), ("mul", 0.0, inf, nan),
        ("mul", -0.0, 3.0, -0.0), ("min", nan, 1.0, 1.0), ("max", 1.0, nan, 1.0), ("max", -0.0, 0.0, 0.0),
        ("max", 0.0, -0.0, 0.0), ("min", 0.0, -0.0, -0.0), ("min", -0.0, 0.0, -0.0), ("max", nan, nan, nan),
        ("max.NaN", 1.0, nan, nan), ("min.NaN", nan, 1.0, nan), ("div.full", 1.0, 0.0, inf),
        ("div.rn", -1.0, 0.0, -inf), ("add.sat", 3.0, 4.0, 1.0), ("add.sat", -3.0, 1.0, 0.0),
        ("mul.sat", 0.5, 0.5, 0.25), ("mul.ftz", 1e-20, 1e-20, 0.0),
        ("add.ftz", 1e-40, 0.0, 0.0), ("add", 1e-40, 0.0, 1e-40), ("copysign", -2.0, 3.0, -3.0),
    ]  # fmt: skip
    for name, a, b, expected in cases:
        row = tuple(int(np.float32(x).view(np.uint32)) for x in (a, b))
        (bits,) = execute(f"{name}.f32", "f32", ("f32", "f32"), [row])
        found = to_float(bits, "f32")
        assert math.isnan(found) if math.isnan(expected) else bits == int(np.float32(expected).view(np.uint32)), name


@pytest.mark.parametrize(
    "comparison", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_comparisons_of_floats(comparison: str) -> None:
    rows = float_rows("f32", 2)
    for row, found in zip(rows, execute(f"setp.{comparison}.f32", "pred", ("f32", "f32"), rows), strict=True):
        a, b = (to_float(x, "f32") for x in row)
        unordered = math.isnan(a) or math.isnan(b)
        if comparison in ("num", "nan"):
            expected = unordered == (comparison == "nan")
        elif unordered:
            expected = len(comparison) == 3
        else:
            expected = getattr(a, f"__{comparison[:2]}__")(b)
        assert found == expected, (a, b)


@pytest.mark.parametrize(
    ("name", "function", "ulps"),
    [
        ("ex2.approx", lambda x: 2.0**x, 2), ("lg2.approx", math.log2, 2), ("sqrt.rn", math.sqrt, 0.5),
        ("rsqrt.approx", lambda x: 1 / math.sqrt(x), 2), ("rcp.approx", lambda x: 1 / x, 1),
        ("tanh.approx", math.tanh, 4), ("sin.approx", math.sin, 4), ("cos.approx", math.cos, 4),
    ],
)  # fmt: skip
def test_functions_of_floats(name: str, function: Callable[[float], float], ulps: float) -> None:
    """Errors are within the bounds of the PTX ISA."""
    x = np.concatenate([np.linspace(0.01, 30, 200), np.geomspace(1e-6, 100, 200)])
    x = x.astype(np.float32)
    found = execute(f"{name}.f32", "f32", ("f32",), [(int(bits),) for bits in x.view(np.uint32)])
    for value, bits in zip(x, found, strict=True):
        expected = function(float(value))
        assert abs(to_float(bits, "f32") - expected) <= (ulps + 0.01) * np.spacing(
            np.float32(max(abs(expected), 1e-30))
        )


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s8"])
@pytest.mark.parametrize("of", ["f32", "f16"])
def test_floats_to_integers(mode: str, to: str, of: str) -> None:
    """Rounded by the modifier, saturated, NaN to 0."""
    rows = float_rows(of, 1)
    low, high = (
        (-(1 << TYPE_BITS[to] - 1), (1 << TYPE_BITS[to] - 1) - 1) if to[0] == "s" else (0, (1 << TYPE_BITS[to]) - 1)
    )
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    for row, bits in zip(rows, execute(f"cvt.{mode}.{to}.{of}", to, (of,), rows), strict=True):
        x = to_float(row[0], of)
        expected = (
            0
            if math.isnan(x)
            else low
            if x == -math.inf
            else high
            if x == math.inf
            else min(max(rounding(x), low), high)
        )
        assert value(bits, to) == expected, x


@pytest.mark.parametrize(("to", "of"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f16"), ("f32", "bf16")])
def test_floats_to_floats(to: str, of: str) -> None:
    rows = float_rows(of, 1)
    rounding = ".rn" if TYPE_BITS[to] < TYPE_BITS[of] else ""
    for row, bits in zip(rows, execute(f"cvt{rounding}.{to}.{of}", to, (of,), rows), strict=True):
        x = to_float(row[0], of)
        if math.isfinite(x):
            sign = 1 << TYPE_BITS[to] - 1 if math.copysign(1, x) < 0 else 0
            assert bits == round_to(Fraction(x), to) | sign, x
        else:
            assert str(to_float(bits, to)).lstrip("-") == str(x).lstrip("-")


@pytest.mark.parametrize("of", ["s32", "u32", "s64", "u64"])
def test_integers_to_floats(of: str) -> None:
    rows = [(x,) for x in integers(TYPE_BITS[of])]
    for row, bits in zip(rows, execute(f"cvt.rn.f32.{of}", "f32", (of,), rows), strict=True):
        assert bits == round_to(Fraction(value(row[0], of)), "f32"), row


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_packed_pairs(type: str) -> None:
    """The two halves of a register do not affect each other."""
    rows = [
        tuple(low | high << 16 for low, high in zip(row, reversed(row), strict=True)) for row in float_rows(type, 3)
    ]
    for name, function in (("add", lambda a, b, c: a + b), ("fma.rn", lambda a, b, c: a * b + c)):
        operands = 3 if name == "fma.rn" else 2
        found = execute(f"{name}.{type}x2", f"{type}x2", (f"{type}x2",) * operands, [row[:operands] for row in rows])
        for row, bits in zip(rows, found, strict=True):
            for half in (0, 16):
                values = [to_float(x >> half & 0xFFFF, type) for x in row]
                expected = exact(function, values, type)
                if expected is not None and expected << 1 & 0xFFFF:
                    assert bits >> half & 0xFFFF == expected, values
    rows = float_rows("f32", 2)
    for row, bits in zip(rows, execute(f"cvt.rn.{type}x2.f32", f"{type}x2", ("f32", "f32"), rows), strict=True):
        for x, half in ((row[0], bits >> 16), (row[1], bits & 0xFFFF)):
            if math.isfinite(to_float(x, "f32")):
                assert half == round_to(Fraction(to_float(x, "f32")), type) or half << 1 & 0xFFFF == 0
