"""Every check and correction of the strict interpreter, on correct kernels and on kernels with a planted bug."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from emulation.triton_interpreter import KernelFaultError, strict

if not triton.knobs.runtime.interpret:
    pytest.skip("kernels are compiled in this process", allow_module_level=True)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with strict():
        yield


@triton.jit
def copy(x, y, n, shift, MASKED: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    if MASKED:
        tl.store(y + place, tl.load(x + place + shift, mask=place + shift < n), mask=place < n)
    else:
        tl.store(y + place, tl.load(x + place + shift))


def test_bounds() -> None:
    x, y = torch.arange(100.0), torch.zeros(100)
    copy[(2,)](x, y, 100, 0, True, 64)
    assert torch.equal(x, y)
    with pytest.raises(
        KernelFaultError, match=r"out of bounds: load near x, element 100 of 100, .*tl\.load\(x \+ place"
    ):
        copy[(2,)](x, y, 100, 0, False, 64)
    with pytest.raises(KernelFaultError, match=r"out of bounds: load near x, element -1 of 100"):
        copy[(1,)](x, y, 100, -1, False, 64)
    with pytest.raises(KernelFaultError, match=r"out of bounds: store near y, element 64 of 64, .*tl\.store\(y"):
        copy[(2,)](x, y[:64], 100, 0, True, 64)
    view = torch.full((100,), 7.0)
    copy[(1,)](x, view[::2], 64, 0, True, 64)  # reaches 64 of the 99 elements that the view spans
    assert torch.equal(view[:64], x[:64])


def test_masked_elements_are_not_zero() -> None:
    for dtype in (torch.float32, torch.int32, torch.float16):
        y = torch.zeros(64, dtype=dtype)
        copy[(1,)](torch.ones(64, dtype=dtype), y, 64, 32, True, 64)
        assert torch.all(y[:32] == 1)
        assert torch.all((y[32:] != 0) | y[32:].isnan())


@triton.jit
def total(x, sums, KIND: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    s = tl.sum(tl.load(x + program * SIZE + tl.arange(0, SIZE)))
    if KIND == "atomic":
        tl.atomic_add(sums, s)
    elif KIND == "read and write":
        tl.store(sums, tl.load(sums) + s)
    elif KIND == "write":
        tl.store(sums, s)
    elif KIND == "write, then atomic":
        if program == 0:
            tl.store(sums, s)
        else:
            tl.atomic_add(sums, s)
    elif KIND == "atomic, then read":
        if program == 0:
            tl.atomic_add(sums, s)
        else:
            tl.store(sums + 1, tl.load(sums))
    elif KIND == "two lanes":
        tl.store(sums + tl.arange(0, 2) * 0, tl.zeros((2,), tl.float32))
    else:
        tl.store(sums + program, s)


def test_races() -> None:
    x, sums = torch.arange(64.0), torch.zeros(4)
    total[(4,)](x, sums, "own", 16)
    assert torch.equal(sums, x.reshape(4, 16).sum(1))
    sums.zero_()
    total[(4,)](x, sums, "atomic", 16)
    assert sums[0] == x.sum()
    for kind, message in {
        "read and write": "race: load of sums",
        "write": "race: store of sums",
        "write, then atomic": "race: atomic of sums",
        "atomic, then read": "race: load of sums",
        "two lanes": "race: two lanes of one store write one element of sums",
    }.items():
        with pytest.raises(KernelFaultError, match=message):
            total[(4,)](x, sums, kind, 16)
    total[(1,)](x, sums, "read and write", 16)  # allowed for a single program


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x, y = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    out = tl.dot(x, y, out_dtype=tl.int32 if x.dtype.is_int8() else tl.float32, input_precision="ieee")
    tl.store(c + m * N + n, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_products(dtype: torch.dtype) -> None:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, 32), dtype=dtype) for n in (16, 64))
        c, want = torch.zeros(16, 64, dtype=torch.int32), a.int() @ b.int().T
    else:
        a, b = torch.randn(16, 32).to(dtype), torch.randn(64, 32).to(dtype)
        c, want = torch.zeros(16, 64), torch.zeros(16, 64)
        for k in range(32):
            want += a[:, k, None].float() * b[None, :, k].float()
    product[(1,)](a, b.T.contiguous(), c, 16, 64, 32)
    assert torch.equal(c, want)
    few = torch.zeros(16, 16, dtype=c.dtype)
    product[(1,)](a, b[16:32].T.contiguous(), few, 16, 16, 32)
    assert torch.equal(few, want[:, 16:32])  # the shape of a product does not change its bits


@triton.jit
def _larger_half(a, b):
    return tl.maximum(a, b) - 0.5 * tl.minimum(a, b)


@triton.jit
def reductions(x, y, z, w, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.arange(0, R), tl.arange(0, C)
    tile = tl.load(x + row[:, None] * C + column[None, :])
    tl.store(y + row, tl.reduce(tile, 1, _larger_half))
    tl.store(z + row[:, None] * C + column[None, :], tl.associative_scan(tile, 1, _larger_half))
    tl.store(w, tl.max(tile))
    tl.store(w + 1, tl.min(tile))


def test_reductions_and_scans() -> None:
    x = torch.randn(8, 32)
    want = torch.empty(8, 32)
    want[:, 0] = x[:, 0]
    for j in range(1, 32):
        want[:, j] = torch.maximum(want[:, j - 1], x[:, j]) - 0.5 * torch.minimum(want[:, j - 1], x[:, j])
    x_nan = x.clone()
    y, z, w = torch.zeros(8), torch.zeros(8, 32), torch.zeros(2)
    reductions[(1,)](x, y, z, w, 8, 32)
    assert torch.equal(z, want)
    assert torch.equal(y, want[:, -1])
    x_nan[3] = torch.nan
    reductions[(1,)](x_nan, y, z, w, 8, 32)
    assert w.tolist() == [np.nanmax(x_nan), np.nanmin(x_nan)]


def test_patches_are_undone() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    inside: Any = InterpreterBuilder.create_dot
    with strict():
        assert InterpreterBuilder.create_dot is inside
    assert InterpreterBuilder.create_dot is inside
