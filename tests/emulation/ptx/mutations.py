"""Mutation tests of the simulator: PTX with one barrier, wait or fence deleted, which it must report."""

import re
from collections.abc import Iterator

ORDERS = re.compile(
    r"^\s*(bar\.sync|barrier\.sync|cp\.async\.wait_group|cp\.async\.wait_all|wgmma\.wait_group|fence\.proxy\.async)\b[^;]*;",
    re.MULTILINE,
)


def mutants(ptx: str) -> Iterator[tuple[str, str]]:
    """(deleted instruction, PTX without it) for each barrier, wait and fence."""
    for order in ORDERS.finditer(ptx):
        yield order[1], ptx[: order.start()] + "\n" + ptx[order.end() :]
