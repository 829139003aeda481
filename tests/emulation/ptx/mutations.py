"""PTX without one of its barriers, waits or fences: a simulator that does not miss it has a dead check."""

import re
from collections.abc import Iterator

ORDERS = re.compile(
    r"^\s*(bar\.sync|barrier\.sync|cp\.async\.wait_group|cp\.async\.wait_all|wgmma\.wait_group|fence\.proxy\.async)\b[^;]*;",
    re.MULTILINE,
)


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """What was deleted, and the rest."""
    for order in ORDERS.finditer(ptx):
        yield order[1], ptx[: order.start()] + "\n" + ptx[order.end() :]
