"""Control-flow analysis of disassembly: instructions, loops, and the usual path of an iteration.

Two readers, `read_sass` for `nvdisasm -c` and `read_amdgcn` for LLVM's AMD assembly, return a `Function`. The hot loop
is the innermost loop with matrix instructions. Few iterations execute its whole body: the branch that appends
candidates is rarely entered. So instructions are counted along one path from the loop's first block back to it: among
the paths with the most matrix instructions the shortest, which is a tile without a hit. If asynchronous copies are
behind a branch too, the caller gives their number (`Loop.with_copies`).
"""

import re
from collections import Counter
from typing import NamedTuple

# Kind: pattern matched against "opcode operands"; the first match wins. Everything else (addresses, compares, moves) is
# "other".
KINDS = {
    "tcgen05": r"UTC[A-Z]*MMA\b",
    "wgmma": r"[HIQ]GMMA\b",
    "mma": r"[HIQDB]MMA\b",
    "mfma": r"v_mfma_",
    "async copy": r"LDGSTS|UTMALDG|UBLKCP|global_load_lds_|buffer_load_\S+ .*\blds$",
    "spill": r"STL\b|LDL\b|scratch_(store|load)_",
    "global load": r"LDG?\b|(global|flat|buffer)_load_",
    "global store": r"STG?\b|(global|flat|buffer)_store_",
    "atomic": r"ATOMG?\b|REDG?\b|(global|flat|buffer)_atomic_",
    "shared": r"LDS|STS|ATOMS|ds_",
    "tensor memory": r"LDTM|STTM|UTCCP",
    "fma": r"FFMA|v_(pk_)?fmac?_f32",
}
MATRIX = ("mma", "wgmma", "tcgen05", "mfma")
_KIND = re.compile("|".join(f"(?P<_{i}>{pattern})" for i, pattern in enumerate(KINDS.values())))
_WIDTHS = {
    **{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},  # SASS: LDG.E.128
    **{"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8},
    **{"dwordx3": 12, "dwordx4": 16, "b8": 1, "u8": 1, "b16": 2, "u16": 2, "b64": 8, "b96": 12, "b128": 16},
}


class Instruction(NamedTuple):
    opcode: str  # with suffixes: LDGSTS.E.BYPASS.128
    operands: str = ""
    guarded: bool = False  # predicated: @P0, @!UP1

    @property
    def kind(self) -> str:
        found = _KIND.match(f"{self.opcode} {self.operands}".rstrip())
        return list(KINDS)[int(found.lastgroup[1:])] if found and found.lastgroup else "other"

    @property
    def bytes(self) -> int:
        """Bytes loaded, stored or copied per lane; 4 for a SASS opcode without a width."""
        return next((_WIDTHS[part] for part in re.split(r"[._]", self.opcode) if part in _WIDTHS), 4)

    @property
    def takes_slot(self) -> bool:
        """Whether the instruction takes an issue slot from matrix instructions.

        On NVIDIA every instruction does. AMD issues scalar, memory and branch instructions of other waves in parallel.
        """
        return self.opcode[0].isupper() or self.opcode.startswith("v_")


class Loop(NamedTuple):
    blocks: frozenset[int]
    path: list[Instruction]  # one iteration without a hit (see the module)
    body: list[Instruction]  # every block
    others: dict[int, list[Instruction]]  # number of copies: shortest path with as many matrix instructions

    @property
    def counts(self) -> Counter[str]:
        return Counter(instruction.kind for instruction in self.path)

    def count(self, *kinds: str) -> int:
        return sum(instruction.kind in kinds for instruction in self.path)

    def with_copies(self, copies: int) -> "Loop":
        """The loop with the shortest path that starts at least this number of asynchronous copies."""
        found = [path for number, path in self.others.items() if number >= copies]
        if not found:
            raise ValueError(
                f"copies must be at most {max(self.others)}, the most that a path of the loop starts, got {copies}"
            )
        return self._replace(path=min(found, key=len))


class Function:
    """Control-flow graph of one kernel.

    Args:
        name: the kernel's name.
        instructions: in order of address.
        targets: branch instruction: its target, both as indices of `instructions`.
        stops: indices of the instructions that never fall through to the next one.
    """

    def __init__(self, name: str, instructions: list[Instruction], targets: dict[int, int], stops: set[int]):
        if not instructions:
            raise ValueError(f"{name}: no instructions found")
        self.name, self.instructions = name, instructions
        starts = sorted({0, *targets.values(), *(i + 1 for i in [*targets, *stops] if i + 1 < len(instructions))})
        self.blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
        number = {block.start: n for n, block in enumerate(self.blocks)}
        self.successors: list[list[int]] = []
        for n, block in enumerate(self.blocks):
            last = block[-1]
            after = [number[targets[last]]] if last in targets else []
            if last not in stops and n + 1 < len(self.blocks):
                after.append(n + 1)
            self.successors.append(after)

    def loops(self, kinds: tuple[str, ...] = MATRIX) -> list[Loop]:
        """Natural loops with instructions of these kinds: innermost first, then by the number of such instructions."""
        order = self._reverse_postorder()
        dominators = self._dominators(order)
        bodies: dict[int, set[int]] = {}
        predecessors: dict[int, list[int]] = {}
        for block in order:
            for after in self.successors[block]:
                predecessors.setdefault(after, []).append(block)
        for block in order:
            for head in self.successors[block]:
                if head in dominators[block]:  # block -> head is a back edge
                    body, todo = bodies.setdefault(head, {head}), [block]
                    while todo:
                        if (inside := todo.pop()) not in body:
                            body.add(inside)
                            todo += predecessors[inside]
        loops = [self._loop(head, body, order, dominators, kinds) for head, body in bodies.items()]
        loops = [loop for loop in loops if loop.count(*kinds)]
        depth = {loop.blocks: sum(other.blocks > loop.blocks for other in loops) for loop in loops}
        return sorted(loops, key=lambda loop: (-depth[loop.blocks], -loop.count(*kinds)))

    def count(self, *kinds: str) -> int:
        return sum(instruction.kind in kinds for instruction in self.instructions)

    def _reverse_postorder(self) -> list[int]:
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            after = next((b for b in rest if b not in seen), None)
            if after is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(after)
                stack.append((after, iter(self.successors[after])))
        return order[::-1]

    def _dominators(self, order: list[int]) -> dict[int, set[int]]:
        everything = set(order)
        dominators = {block: everything for block in order} | {0: {0}}
        predecessors = {block: [p for p in order if block in self.successors[p]] for block in order}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                new = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    def _loop(
        self, head: int, body: set[int], order: list[int], dominators: dict[int, set[int]], kinds: tuple[str, ...]
    ) -> Loop:
        """The loop with the shortest path for every (instructions of these kinds, copies), over the acyclic body."""
        kept = {head: {self._numbers(head, kinds): [head]}}
        ends: dict[tuple[int, int], list[int]] = {}
        for block in (b for b in order if b in kept):
            for after in self.successors[block]:
                if after == head:
                    self._keep(ends, kept[block], (0, 0), [])
                elif after in body and after not in dominators[block]:
                    self._keep(kept.setdefault(after, {}), kept[block], self._numbers(after, kinds), [after])
        most = max(wanted for wanted, _ in ends)
        others = {copies: self._of(path) for (wanted, copies), path in ends.items() if wanted == most}
        return Loop(frozenset(body), min(others.values(), key=len), self._of(sorted(body)), others)

    def _keep(
        self,
        kept: dict[tuple[int, int], list[int]],
        paths: dict[tuple[int, int], list[int]],
        more: tuple[int, int],
        block: list[int],
    ) -> None:
        """Extends `paths` by a block and keeps the shorter path for each key (instructions, copies)."""
        for numbers, path in paths.items():
            longer, total = [*path, *block], (numbers[0] + more[0], numbers[1] + more[1])
            kept[total] = min(kept.get(total, longer), longer, key=lambda p: sum(len(self.blocks[b]) for b in p))

    def _numbers(self, block: int, kinds: tuple[str, ...]) -> tuple[int, int]:
        found = Counter(self.instructions[i].kind for i in self.blocks[block])
        return sum(found[kind] for kind in kinds), found["async copy"]

    def _of(self, blocks: list[int]) -> list[Instruction]:
        return [self.instructions[i] for block in blocks for i in self.blocks[block]]


def read_sass(text: str) -> dict[str, Function]:
    """Functions in the output of `nvdisasm -c`, by name."""
    functions = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name = part.split(":", 1)[0]
        instructions, labels = _scan(
            part.split("\n", 1)[1],
            r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;",
            r"(\.L_x_\d+):",
        )
        targets, stops = {}, set()
        for i, (opcode, operands, guarded) in enumerate(instructions):
            stem = opcode.split(".")[0]
            if stem in ("BRX", "JMX", "JMP"):
                raise ValueError(f"{name}: {opcode} is an indirect jump, which this reader cannot follow")
            label = re.search(r"`\((\.L_x_\d+)\)", operands)
            if stem in ("BRA", "CALL") and label:  # ptxas also leaves loops by a predicated CALL.REL.NOINC to a label
                targets[i] = labels[label[1]]
                conditional = guarded or not operands.startswith("`")  # BRA.U UP0, `(.L_x_1)
                if not conditional:
                    stops.add(i)
            elif stem in ("EXIT", "RET") and not guarded:
                stops.add(i)
        functions[name] = Function(name, instructions, targets, stops)
    return functions


def read_amdgcn(text: str) -> Function:
    """The kernel of an assembly text that LLVM wrote for an AMD GPU.

    A branch on an empty execution mask (s_cbranch_execz) counts as never taken: it skips code that no lane needs, such
    as a masked load, and a full tile needs it.
    """
    name = re.search(r"^\s+\.type\s+(\S+),@function", text, flags=re.MULTILINE)
    if name is None:
        raise ValueError("no function in the assembly")
    code = text[name.end() : text.index("\n\t.section", name.end())]
    instructions, labels = _scan(code, r"\t(?P<opcode>[a-z]\w+)\s*(?P<operands>[^;]*?)\s*(;|$)", r"(\.LBB\w+):")
    targets, stops = {}, set()
    for i, (opcode, operands, _) in enumerate(instructions):
        if opcode in ("s_setpc_b64", "s_swappc_b64"):
            raise ValueError(f"{name[1]}: {opcode} is an indirect jump, which this reader cannot follow")
        if opcode == "s_branch" or (opcode.startswith("s_cbranch_") and opcode != "s_cbranch_execz"):
            targets[i] = labels[operands]
        if opcode in ("s_branch", "s_endpgm"):
            stops.add(i)
    return Function(name[1], instructions, targets, stops)


def _scan(text: str, instruction: str, label: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and for each label the index of the instruction after it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(instructions)
        elif found := re.match(instruction, line):
            guarded = found.groupdict().get("guard") is not None
            instructions.append(Instruction(found["opcode"], found["operands"], guarded))
    return instructions, labels
