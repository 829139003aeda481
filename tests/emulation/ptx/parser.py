"""PTX parser: instructions, parameters, registers, shared variables and labels of an `.entry`."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .values import TYPE_BITS


class PtxError(Exception):
    """A fault in the PTX text, in the kernel's execution, or in the arguments of a launch."""


@dataclass(frozen=True)
class Register:
    name: str
    bits: int  # 1 for a predicate
    index: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    bits: int  # two's complement in 64 bits, or the bits of a float
    kind: str  # "int", "f32" or "f64"


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Name:
    """A label, or an undeclared name."""

    name: str


@dataclass(frozen=True)
class Address:
    base: "Register | Immediate | Name"
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`, or the two results `d|p`."""

    items: "tuple[Operand, ...]"


Operand = Register | Immediate | Special | Name | Address | Vector | None  # None: `_`, an unused result


@dataclass(frozen=True)
class Instruction:
    index: int
    opcode: str
    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    source: str  # file:line of the last .loc

    @cached_property
    def type(self) -> str:
        return self.types[-1]

    @cached_property
    def ftz(self) -> bool:
        return "ftz" in self.modifiers

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def __str__(self) -> str:
        return f"#{self.index} `{self.text}`" + (f" of {self.source}" if self.source else "")


@dataclass
class Parameter:
    offset: int
    size: int


@dataclass
class Kernel:
    """One `.entry`. Shared variables are placed one after the other, dynamic shared memory last."""

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, Register] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared_bytes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


def parse(ptx: str, entry: str = "") -> Kernel:
    """The first `.entry` with `entry` in its name."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    heads = list(re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", ptx, flags=re.DOTALL))
    head = next((h for h in heads if entry in h[1]), None)
    if head is None:
        raise PtxError(f"no .entry with {entry!r} in its name; the text has {[h[1] for h in heads]}")
    kernel = Kernel(head[1])
    _parameters(kernel, head[2] or "")
    _shared_variables(kernel, ptx)
    files = {number: name.rpartition("/")[2] for number, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
    _body(kernel, ptx[head.end() : _closing_brace(ptx, head.end())], files)
    return kernel


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise PtxError("the kernel's body has no closing brace")


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _parameters(kernel: Kernel, text: str) -> None:
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*?\s)?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)"
    for align, type, name, count in re.findall(pattern, text.strip()):
        width = TYPE_BITS[type] // 8
        offset = _align(kernel.parameter_bytes, int(align or width))
        kernel.parameters[name] = Parameter(offset, width * int(count or 1))
        kernel.parameter_bytes = offset + kernel.parameters[name].size


def _shared_variables(kernel: Kernel, ptx: str) -> None:
    pattern = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
    dynamic = []
    for extern, align, type, name, count in re.findall(pattern, ptx):
        if extern:
            dynamic.append((name, int(align or 16)))
            continue
        width = TYPE_BITS[type] // 8
        kernel.shared[name] = _align(kernel.static_shared_bytes, int(align or width))
        kernel.static_shared_bytes = kernel.shared[name] + width * int(count or 1)
    for name, align in dynamic:  # all dynamic variables share one address
        kernel.shared[name] = _align(kernel.static_shared_bytes, max(align, 128))
    if dynamic:
        kernel.static_shared_bytes = max(kernel.shared[name] for name, _ in dynamic)


def _body(kernel: Kernel, text: str, files: dict[str, str]) -> None:
    source = ""
    for line in _statements(text):
        if line.startswith(".loc"):
            number, row = line.split()[1:3]
            source = f"{files.get(number, number)}:{row}"
        elif line.startswith(".reg"):
            _declare_registers(kernel, line)
        elif line.endswith(":"):
            _declare(kernel.labels, line[:-1], len(kernel.instructions))
        elif not line.startswith("."):
            kernel.instructions.append(_instruction(kernel, line, source))


def _statements(text: str) -> list[str]:
    """Instructions, directives and labels, one per string, without the braces of scopes (see _declare_registers)."""
    found = []
    for piece in re.split(r";|\n(?=\s*\.loc)|(?<=\n)(?=\s*\.loc)", text):
        rest = piece.strip()
        while rest:
            if rest.startswith(".loc"):
                line, _, rest = rest.partition("\n")
                found.append(line)
            elif label := re.match(r"([\w$]+):(?!:)", rest):
                found.append(label[0])
                rest = rest[label.end() :]
            elif scope := re.match(r"[{}]\s*", rest):
                rest = rest[scope.end() :]
                continue
            else:
                found.append(" ".join(rest.split()))
                break
            rest = rest.strip()
    return found


def _declare(table: dict, name: str, value: object) -> None:
    if table.setdefault(name, value) != value:
        raise PtxError(f"{name} is declared twice")


def _declare_registers(kernel: Kernel, line: str) -> None:
    declaration = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", line)
    if declaration is None or declaration[1] not in TYPE_BITS:
        raise PtxError(f"cannot read {line!r}")
    bits = TYPE_BITS[declaration[1]]
    for item in declaration[2].split(","):
        name, _, count = item.strip().rstrip(">").partition("<")
        for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
            known = kernel.registers.get(each)
            if known is None:
                kernel.registers[each] = Register(each, bits, len(kernel.registers))
            elif known.bits != bits:  # scopes of inline assembly may repeat a name, with one width
                raise PtxError(f"{each} is declared twice, with {known.bits} and {bits} bits")


def _instruction(kernel: Kernel, text: str, source: str) -> Instruction:
    parts = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, flags=re.DOTALL)
    if parts is None:
        raise PtxError(f"cannot read {text!r}")
    negated, guard, opcode, operands = parts.groups()
    name, *modifiers = opcode.split(".")
    try:
        return Instruction(
            index=len(kernel.instructions),
            opcode=opcode,
            name=name,
            modifiers=tuple(modifiers),
            types=tuple(m for m in modifiers if m in TYPE_BITS),
            operands=tuple(_operand(kernel, each) for each in _split(operands)),
            guard=_predicate(kernel, guard, bool(negated)) if guard else None,
            text=text,
            source=source,
        )
    except (KeyError, ValueError) as error:
        raise PtxError(f"cannot read {text!r}: {error}") from error


def _split(text: str, separator: str = ",") -> Sequence[str]:
    """Splits at the separators outside braces and brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def _predicate(kernel: Kernel, name: str, negated: bool) -> Register:
    register = kernel.registers[name]
    return Register(register.name, register.bits, register.index, negated)


def _operand(kernel: Kernel, text: str) -> Operand:
    if text == "_":
        return None
    if text[0] == "{":
        return Vector(tuple(_operand(kernel, each) for each in _split(text[1:-1])))
    if text[0] == "[":
        base, sign, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]", text).groups()
        operand = _operand(kernel, base)
        shift = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        return Address(operand, shift)
    if "|" in text:
        return Vector(tuple(_operand(kernel, each) for each in _split(text, "|")))
    if text[0] == "!":
        return _predicate(kernel, text[1:].strip(), True)
    if text in kernel.registers:
        return kernel.registers[text]
    if text[0] == "%":
        return Special(text[1:])
    if text in kernel.shared:
        return Immediate(kernel.shared[text], "int")
    if text in kernel.parameters:
        return Immediate(kernel.parameters[text].offset, "int")
    return _immediate(text) if text[0].isdigit() or text[0] == "-" else Name(text)


def _immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F"):
        return Immediate(int(text[2:], 16), "f32")
    if text[:2] in ("0d", "0D"):
        return Immediate(int(text[2:], 16), "f64")
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
    return Immediate(int(text.rstrip("U"), 0) & (1 << 64) - 1, "int")
