"""Registry of implemented instructions; launching a kernel with any other instruction or modifier is an error."""

from collections.abc import Callable

from .parser import Kernel, PtxError
from .values import TYPE_BITS

HANDLERS: dict[str, Callable] = {}
MODIFIERS: dict[str, frozenset[str]] = {}

CACHE = (
    "ca cg cs lu cv wb wt nc L1::no_allocate L1::evict_first L1::evict_last L1::evict_normal "
    "L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B"
)
SPACES = "global shared shared::cta param"
ORDER = "weak relaxed acquire release acq_rel volatile cta gpu sys cluster"


def instruction(names: str, modifiers: str = "") -> Callable[[Callable], Callable]:
    """Registers a handler `(machine, instruction, mask)` for the instructions `names`; mask None means all lanes."""

    def declare(handler: Callable) -> Callable:
        for name in names.split():
            HANDLERS[name] = handler
            MODIFIERS[name] = frozenset(modifiers.split())
        return handler

    return declare


def resolve(kernel: Kernel) -> list[Callable]:
    """The handler of every instruction of a kernel."""
    for i in kernel.instructions:
        if i.name not in HANDLERS:
            raise PtxError(f"{kernel.name}: unknown instruction {i.opcode}, {i}")
        unknown = [m for m in i.modifiers if m not in MODIFIERS[i.name] | TYPE_BITS.keys()]
        if unknown:
            raise PtxError(f"{kernel.name}: unknown instruction {i.opcode}: .{unknown[0]} of {i.name}, {i}")
    return [HANDLERS[i.name] for i in kernel.instructions]
