"""The emulator's primitives for CUDA kernels, against the PTX ISA."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation.cuda import Emulator, Output, Rounding, Settings

ELEMENTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def probe() -> Emulator:
    source = Path(__file__).parent / "cuda" / "primitives_probe.cu"
    return Emulator("primitives_probe", source, checked=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---- the tensor cores ----


def fragment_a(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": row and column of a_i, i < 8."""
    group, thread = lane >> 2, lane % 4
    return group if i in (0, 1, 4, 5) else group + 8, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def fragment_b(lane: int, i: int) -> tuple[int, int]:
    """The same for b_i, i < 4."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def fragment_c(lane: int, i: int) -> tuple[int, int]:
    """The same for c_i and d_i, i < 4."""
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def to_fragments(matrix: torch.Tensor, fragment: Callable[[int, int], tuple[int, int]], count: int) -> torch.Tensor:
    """Elements per lane, (32, count)."""
    return torch.stack([torch.stack([matrix[fragment(lane, i)] for i in range(count)]) for lane in range(32)])


def mma(
    probe: Emulator, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, rounding: Rounding = Rounding.SEQUENTIAL
) -> torch.Tensor:
    """A B + C by mma_m16n8k16."""
    d = Output(to_fragments(c, fragment_c, 4), initialised=True)
    name = str(a.dtype).removeprefix("torch.")
    counters = probe.run(
        f"probe_mma_{name}",
        Settings(rounding=rounding),
        a=to_fragments(a, fragment_a, 8),
        b=to_fragments(b, fragment_b, 4),
        d=d,
    )
    assert counters.mma == 1
    result = torch.full((16, 8), torch.nan)
    for lane in range(32):
        for i in range(4):
            result[fragment_c(lane, i)] = d.tensor[lane, i]
    return result


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


@pytest.mark.parametrize("dtype", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("rounding", Rounding)
def test_mma_has_the_fragments_of_the_ptx_isa(probe: Emulator, dtype: torch.dtype, rounding: Rounding) -> None:
    a, b, c = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype), integers(16, 8)
    assert torch.equal(mma(probe, a, b, c, rounding), a.float() @ b.float() + c)


@pytest.mark.parametrize("dtype", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("rounding", Rounding)
def test_mma_follows_the_rounding_setting(probe: Emulator, dtype: torch.dtype, rounding: Rounding) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    terms = torch.cat([a.float()[:, :, None] * b.float()[None], c[:, None]], dim=1)
    sequential = c.clone()
    for k in range(16):
        sequential += terms[:, k]
    result = mma(probe, a, b, c, rounding)
    assert torch.equal(result, sequential) == (rounding == Rounding.SEQUENTIAL)
    # Each of 16 additions, and each truncated term, is off by at most 2^-23 of the largest partial sum.
    bound = 33 * 2**-23 * terms.abs().sum(dim=1).double()
    assert ((result.double() - terms.double().sum(dim=1)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("places", "term", "units"),  # 1 + a term at each of these k, in units of 2^-23: in sequence, groups of 8, of 16
    [
        ([0, 1, 2], -24, (0, 1, 1)),  # each alone is rounded away; their sum, 1.5 units, is truncated
        ([0, 1, 2, 3, 4, 5, 6], -25, (0, 0, 1)),  # below the 24 bits kept by groups of 8
        ([0, 8], -24, (0, 0, 1)),  # in one group of 16, or in two groups of 8
        ([0], -23, (1, 1, 1)),
    ],
)
def test_mma_rounding_by_hand(probe: Emulator, places: list[int], term: int, units: tuple[int, int, int]) -> None:
    a, b, c = torch.zeros(16, 16).half(), torch.full((16, 8), 2.0**-12).half(), torch.ones(16, 8)
    a[3, places] = 2.0 ** (term + 12)
    for rounding, unit in zip(Rounding, units, strict=True):
        result = mma(probe, a, b, c, rounding)
        assert (result[3] == 1 + unit * 2.0**-23).all()
        assert (result[4] == 1).all()


@pytest.mark.parametrize("rounding", Rounding)
def test_mma_keeps_infinities_and_nan(probe: Emulator, rounding: Rounding) -> None:
    a, b, c = torch.ones(16, 16).half(), torch.ones(16, 8).half(), torch.zeros(16, 8)
    a[0, 3], a[1, 5], a[2, 0], b[0, 7] = torch.inf, torch.nan, torch.inf, 0.0
    c[3, 1] = -torch.inf
    result = mma(probe, a, b, c, rounding)
    torch.testing.assert_close(result, a.float() @ b.float() + c, equal_nan=True, rtol=0, atol=0)
    assert result[2, 7].isnan()
    assert result[3, 1] == -torch.inf


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_has_the_fragments_of_the_ptx_isa(probe: Emulator, rng: np.random.Generator, transposed: bool) -> None:
    # PTX ISA, ldmatrix: thread t holds row t / 4, elements 2 (t % 4) and the next, of each matrix; .trans: transposed.
    x = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    rows = torch.from_numpy(rng.permutation(32).astype(np.int32))
    out = Output.empty(32, 4, 2, dtype=torch.int16)
    probe.run("probe_ldmatrix_x4", x=x, rows=rows, out=out, transposed=int(transposed))
    for matrix in range(4):
        expected = x[rows[8 * matrix : 8 * matrix + 8].long()]
        if transposed:
            expected = expected.T
        assert torch.equal(out.tensor[:, matrix].reshape(8, 8), expected)


# ---- the warp ----


def test_shuffles_and_votes(probe: Emulator, rng: np.random.Generator) -> None:
    source = rng.integers(0, 32, 32).astype(np.int32)
    for lane_mask in (1, 2, 16, 31):
        for x in (rng.integers(-99, 99, 32), np.full(32, 4), np.full(32, 2)):
            others, votes = Output.empty(2, 32, dtype=torch.int64), Output.empty(3, 32, dtype=torch.int32)
            arguments = {"x": x.astype(np.int32), "source": source, "others": others, "votes": votes}
            probe.run("probe_warp_operations", **arguments, lane_mask=lane_mask)
            np.testing.assert_array_equal(others.tensor[0], x[source])
            np.testing.assert_array_equal(others.tensor[1], x[np.arange(32) ^ lane_mask] << 32)
            ballot = sum(1 << lane for lane in range(32) if x[lane] & 1)
            np.testing.assert_array_equal(votes.tensor[0].numpy().view(np.uint32), ballot)
            np.testing.assert_array_equal(votes.tensor[1], (x & 2).any())
            np.testing.assert_array_equal(votes.tensor[2], (x & 4).astype(bool).all())


# ---- numbers ----


@pytest.mark.parametrize("element", ELEMENTS)
def test_conversions_round_to_nearest_even(probe: Emulator, rng: np.random.Generator, element: str) -> None:
    dtype = ELEMENTS[element]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    halfway = every.view(torch.int32) + (1 << (12 if dtype == torch.float16 else 15))
    random = torch.from_numpy(rng.integers(-(2**31), 2**31, 4096).astype(np.int32))
    x = torch.cat([every, halfway.view(torch.float32), random.view(torch.float32)])
    n = len(x)
    singles, pairs, back = Output.empty(n, dtype=dtype), Output.empty(n, dtype=dtype), Output.empty(2, n)
    probe.run(f"probe_conversions_{element}", x=x, singles=singles, pairs=pairs, back=back, n=n)
    expected = x.to(dtype)
    for result in (singles.tensor, pairs.tensor):
        assert torch.equal(result.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(result.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
    assert (singles.tensor[x.isnan()].view(torch.int16) == 0x7FFF).all()
    for result in back.tensor:
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("element", ELEMENTS)
def test_int8_is_unpacked_exactly(probe: Emulator, element: str) -> None:
    x = torch.arange(-128, 128).to(torch.int8)
    out = Output.empty(256, dtype=ELEMENTS[element])
    probe.run(f"probe_unpack_int8_{element}", x=x, out=out)
    assert torch.equal(out.tensor.float(), x.float())


@pytest.mark.parametrize("rounding", Rounding)
def test_approximate_functions_have_their_documented_errors(probe: Emulator, rounding: Rounding) -> None:
    x = torch.cat([torch.rand(1000) * 4, torch.rand(1000) * 100 + 1e-3])
    out = Output.empty(3, 2000)
    probe.run("probe_approximate_functions", Settings(rounding=rounding), x=x, out=out, n=2000)
    exact = torch.stack([x.double().exp2(), x.double().log2(), 1 / x.double()])
    error = (out.tensor - exact).abs()
    log2_scale = torch.where((x > 0.5) & (x < 2), 1.0, exact[1].abs())
    error /= torch.stack([exact[0], log2_scale, exact[2]])
    rounded = 2**-24  # rounding of the emulator's float32
    documented = torch.tensor([2**-22, 2**-22, 2**-23])
    if rounding == Rounding.SEQUENTIAL:
        assert error.max() <= 2 * rounded
    else:
        assert (error.amax(dim=1) <= documented + 2 * rounded).all()
        assert (error.amax(dim=1) > documented / 2).all()


@pytest.mark.parametrize("rounding", Rounding)
def test_approximate_functions_of_extreme_arguments(probe: Emulator, rounding: Rounding) -> None:
    denormal = 2.0**-130
    x = torch.tensor([0.0, -torch.inf, torch.inf, -130.0, denormal, torch.nan])
    out = Output.empty(3, 6)
    probe.run("probe_approximate_functions", Settings(rounding=rounding), x=x, out=out, n=6)
    inf, nan = torch.inf, torch.nan
    exp2, log2, rcp = [1, 0, inf, 0, 1, nan], [-inf, nan, inf, nan, -inf, nan], [inf, -0.0, 0, -1 / 130, inf, nan]
    torch.testing.assert_close(out.tensor, torch.tensor([exp2, log2, rcp]), equal_nan=True)
