"""Tables, comparisons and subprocesses shared by the tests of tables."""

import os
import subprocess
import sys
import textwrap
from typing import Any

import torch
from oracle import KINDS, TESTS

import grank_kernels as gk

KINDS_OF_TABLES = [*((kind, None) for kind in KINDS), ("float32", torch.int8), ("bfloat16", torch.int8)]


def table_of(n: int, d: int, kind: str, coarse: torch.dtype | None = None, with_ids: bool = True) -> gk.ItemTable:
    ids = torch.randperm(10 * n + 1)[:n] if with_ids else None
    return gk.ItemTable.from_rows(torch.randn(n, d), ids=ids, dtype=getattr(torch, kind), coarse=coarse)


def assert_equal_tables(got: gk.ItemTable, want: gk.ItemTable) -> None:
    kept = want.current.compact()
    for name, column in got.current.compact()._asdict().items():
        other = getattr(kept, name)
        assert (column is None) == (other is None), name
        if column is not None and other is not None:
            assert (column.dtype, column.shape) == (other.dtype, other.shape)
            assert torch.equal(column, other), name
    basis, other = got.current.basis, want.current.basis
    assert (basis is None) == (other is None)
    assert basis is None or other is None or torch.equal(basis, other)


def run(code: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, cwd=TESTS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip
