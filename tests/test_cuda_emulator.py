"""The CUDA emulator: its arithmetic against the PTX ISA, and every checker against a bug it must find."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation.cuda import EmulationError, Emulator, Output, Rounding, Settings

SOURCES = Path(__file__).parent / "emulation" / "cuda"
IN_ORDER = Settings()
SEEDS = [IN_ORDER] + [Settings(seed=seed, preempt=0.02) for seed in range(1, 5)]
ELEMENTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def probe() -> Emulator:
    return Emulator("primitives_probe", SOURCES / "primitives_probe.cu", checked=True)


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def planted(request: pytest.FixtureRequest) -> Emulator:
    return Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=request.param)


@pytest.fixture(scope="module")
def checked() -> Emulator:
    return Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=True)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Output:
    return Output(torch.empty(shape, dtype=dtype))


# ---- arithmetic ----


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
    """(32, count): what every lane holds."""
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
def test_mma_rounds_as_it_is_told(probe: Emulator, dtype: torch.dtype, rounding: Rounding) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    terms = torch.cat([a.float()[:, :, None] * b.float()[None], c[:, None]], dim=1)
    sequential = c.clone()
    for k in range(16):
        sequential += terms[:, k]
    result = mma(probe, a, b, c, rounding)
    assert torch.equal(result, sequential) == (rounding == Rounding.SEQUENTIAL)
    # Every one of 16 additions loses at most one unit of 2^-23 of the largest sum on its way; so does a term when it is
    # cut off.
    bound = 33 * 2**-23 * terms.abs().sum(dim=1).double()
    assert ((result.double() - terms.double().sum(dim=1)).abs() <= bound).all()


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
    out = fresh(32, 4, 2, dtype=torch.int16)
    probe.run("probe_ldmatrix_x4", x=x, rows=rows, out=out, transposed=int(transposed))
    for matrix in range(4):
        expected = x[rows[8 * matrix : 8 * matrix + 8].long()]
        if transposed:
            expected = expected.T
        assert torch.equal(out.tensor[:, matrix].reshape(8, 8), expected)


def test_shuffles_and_votes(probe: Emulator, rng: np.random.Generator) -> None:
    source = rng.integers(0, 32, 32).astype(np.int32)
    for lane_mask in (1, 2, 16, 31):
        for x in (rng.integers(-99, 99, 32), np.full(32, 4), np.full(32, 2)):
            others, votes = fresh(2, 32, dtype=torch.int64), fresh(3, 32, dtype=torch.int32)
            arguments = {"x": x.astype(np.int32), "source": source, "others": others, "votes": votes}
            probe.run("probe_warp_operations", **arguments, lane_mask=lane_mask)
            np.testing.assert_array_equal(others.tensor[0], x[source])
            np.testing.assert_array_equal(others.tensor[1], x[np.arange(32) ^ lane_mask] << 32)
            ballot = sum(1 << lane for lane in range(32) if x[lane] & 1)
            np.testing.assert_array_equal(votes.tensor[0].numpy().view(np.uint32), ballot)
            np.testing.assert_array_equal(votes.tensor[1], (x & 2).any())
            np.testing.assert_array_equal(votes.tensor[2], (x & 4).astype(bool).all())


@pytest.mark.parametrize("element", ELEMENTS)
def test_conversions_round_to_nearest_even(probe: Emulator, rng: np.random.Generator, element: str) -> None:
    dtype = ELEMENTS[element]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    halfway = every.view(torch.int32) + (1 << (12 if dtype == torch.float16 else 15))
    random = torch.from_numpy(rng.integers(-(2**31), 2**31, 4096).astype(np.int32))
    x = torch.cat([every, halfway.view(torch.float32), random.view(torch.float32)])
    n = len(x)
    singles, pairs, back = fresh(n, dtype=dtype), fresh(n, dtype=dtype), fresh(2, n)
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
    out = fresh(256, dtype=ELEMENTS[element])
    probe.run(f"probe_unpack_int8_{element}", x=x, out=out)
    assert torch.equal(out.tensor.float(), x.float())


@pytest.mark.parametrize("rounding", Rounding)
def test_approximate_functions_are_off_by_their_documented_errors(probe: Emulator, rounding: Rounding) -> None:
    x = torch.cat([torch.rand(1000) * 4, torch.rand(1000) * 100 + 1e-3])
    out = fresh(3, 2000)
    probe.run("probe_approximate_functions", Settings(rounding=rounding), x=x, out=out, n=2000)
    exact = torch.stack([x.double().exp2(), x.double().log2(), 1 / x.double()])
    error = (out.tensor - exact).abs()
    log2_scale = torch.where((x > 0.5) & (x < 2), 1.0, exact[1].abs())
    error /= torch.stack([exact[0], log2_scale, exact[2]])
    rounded = 2**-24  # the emulator's own float
    documented = torch.tensor([2**-22, 2**-22, 2**-23])
    if rounding == Rounding.SEQUENTIAL:
        assert error.max() <= 2 * rounded
    else:
        assert (error.amax(dim=1) <= documented + 2 * rounded).all()
        assert (error.amax(dim=1) > documented / 2).all()


@pytest.mark.parametrize("rounding", Rounding)
def test_approximate_functions_at_the_ends(probe: Emulator, rounding: Rounding) -> None:
    denormal = 2.0**-130
    x = torch.tensor([0.0, -torch.inf, torch.inf, -130.0, denormal, torch.nan])
    out = fresh(3, 6)
    probe.run("probe_approximate_functions", Settings(rounding=rounding), x=x, out=out, n=6)
    inf, nan = torch.inf, torch.nan
    exp2, log2, rcp = [1, 0, inf, 0, 1, nan], [-inf, nan, inf, nan, -inf, nan], [inf, -0.0, 0, -1 / 130, inf, nan]
    torch.testing.assert_close(out.tensor, torch.tensor([exp2, log2, rcp]), equal_nan=True)


# ---- planted bugs ----


class Bug(IntEnum):
    """As in planted_bugs.cu."""

    NONE = 0
    NO_BARRIER_AFTER_COPY = 1
    NO_BARRIER_BEFORE_PREFETCH = 2
    WAIT_FOR_TOO_FEW_GROUPS = 3
    NOT_WAITED_FOR = 4
    READ_PAST_BUFFER = 5
    WRITE_PAST_BUFFER = 6
    READ_PAST_SHARED = 7
    READ_UNWRITTEN_SHARED = 8
    READ_UNWRITTEN_OUTPUT = 9
    MISALIGNED_VECTOR = 10
    MISALIGNED_COPY = 11
    BLOCKS_WITHOUT_ATOMIC = 12
    NO_WARP_BARRIER = 13
    BARRIER_IN_BRANCH = 14
    CALLER_NOT_IN_MASK = 15
    SOURCE_NOT_IN_MASK = 16
    MASK_NAMES_OTHERS = 17
    MATRIX_FROM_GLOBAL = 18
    TOO_MUCH_SHARED = 19
    NO_BARRIER_AFTER_READS = 20
    WARP_BARRIER_FOR_BLOCK = 21
    READ_FROM_OTHER_BLOCKS = 22


@dataclass
class Kernel:
    """A kernel of planted_bugs.cu, what it takes and what it must give; `finds`: what a bug of it must be called."""

    entry: str
    x: torch.Tensor
    expected: torch.Tensor
    finds: dict[Bug, set[str]]
    sizes: dict[str, int] = field(default_factory=dict)
    initial: float | None = None

    def run(self, emulator: Emulator, bug: Bug = Bug.NONE, settings: Settings = IN_ORDER) -> torch.Tensor:
        out = fresh(*self.expected.shape, dtype=self.expected.dtype)
        if self.initial is not None:
            out = Output(torch.full_like(self.expected, self.initial), initialised=True)
        emulator.run(self.entry, settings, x=self.x, out=out, **self.sizes, bug=int(bug))
        return out.tensor


FLOATS = torch.arange(2560.0)
INTEGERS = torch.arange(1024, dtype=torch.int32)
KERNELS = [
    Kernel(
        "planted_sum_reversed_tiles",
        FLOATS,
        FLOATS.view(5, 128, 4).sum(dim=0).flip(0).flatten(),
        {
            Bug.NO_BARRIER_AFTER_COPY: {"race", "uninitialised"},
            Bug.NO_BARRIER_BEFORE_PREFETCH: {"race"},
            Bug.WAIT_FOR_TOO_FEW_GROUPS: {"cp.async"},
            Bug.NOT_WAITED_FOR: {"cp.async"},
        },
        {"tiles": 5},
    ),
    Kernel(
        "planted_copy",
        FLOATS[:100],
        FLOATS[:100],
        {
            Bug.READ_PAST_BUFFER: {"out of bounds"},
            Bug.WRITE_PAST_BUFFER: {"out of bounds"},
            Bug.READ_PAST_SHARED: {"out of bounds"},
            Bug.READ_UNWRITTEN_SHARED: {"uninitialised"},
            Bug.READ_UNWRITTEN_OUTPUT: {"uninitialised"},
            Bug.TOO_MUCH_SHARED: {"launch"},
        },
        {"n": 100},
    ),
    Kernel(
        "planted_copy_vectors",
        FLOATS[:512],
        torch.cat([FLOATS[:508], torch.zeros(4)]),  # the last copy is not valid: zeros
        {Bug.MISALIGNED_VECTOR: {"misaligned"}, Bug.MISALIGNED_COPY: {"misaligned"}},
    ),
    Kernel(
        "planted_maximum",
        INTEGERS[:160],
        torch.tensor([159], dtype=torch.int32),
        {Bug.BLOCKS_WITHOUT_ATOMIC: {"race"}},
        {"blocks": 5},
        initial=-1,
    ),
    Kernel(
        "planted_shift",
        INTEGERS[:8],
        torch.cat([INTEGERS[1:8], INTEGERS[:1]]),
        {Bug.READ_FROM_OTHER_BLOCKS: {"race"}},
        {"blocks": 8},
        initial=-1,
    ),
    Kernel(
        "planted_broadcast",
        INTEGERS[:4],
        torch.full((128,), 6, dtype=torch.int32),
        {Bug.NO_BARRIER_AFTER_READS: {"race"}, Bug.WARP_BARRIER_FOR_BLOCK: {"race"}},
        {"rounds": 4, "threads": 128},
    ),
    Kernel(
        "planted_broadcast",
        INTEGERS[:4],
        torch.full((32,), 6, dtype=torch.int32),
        {Bug.NO_BARRIER_AFTER_READS: {"race"}},
        {"rounds": 4, "threads": 32},
    ),
    Kernel(
        "planted_swap_within_warp",
        FLOATS[:128],
        FLOATS[:128].view(64, 2).flip(1).flatten(),
        {
            Bug.NO_WARP_BARRIER: {"race", "uninitialised"},
            Bug.BARRIER_IN_BRANCH: {"divergence"},
            Bug.CALLER_NOT_IN_MASK: {"divergence"},
            Bug.SOURCE_NOT_IN_MASK: {"divergence"},
            Bug.MASK_NAMES_OTHERS: {"divergence"},
        },
    ),
    Kernel(
        "planted_first_column",
        INTEGERS,
        INTEGERS[::32],
        {Bug.MATRIX_FROM_GLOBAL: {"address space"}},
        {"swizzled": 1},
    ),
]
PLANTED = [
    pytest.param(kernel, bug, kinds, id=f"{bug.name.lower()}-{len(kernel.expected)}")
    for kernel in KERNELS
    for bug, kinds in kernel.finds.items()
]


def test_every_bug_is_planted() -> None:
    assert {bug for kernel in KERNELS for bug in kernel.finds} == set(Bug) - {Bug.NONE}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.entry)
@pytest.mark.parametrize("settings", SEEDS, ids=lambda settings: f"seed{settings.seed}")
def test_right_kernels_are_not_reported(planted: Emulator, kernel: Kernel, settings: Settings) -> None:
    assert torch.equal(kernel.run(planted, settings=settings), kernel.expected)


@pytest.mark.parametrize(("kernel", "bug", "kinds"), PLANTED)
@pytest.mark.parametrize("settings", SEEDS[:2], ids=["in_order", "random"])
def test_planted_bugs_are_found(
    checked: Emulator, kernel: Kernel, bug: Bug, kinds: set[str], settings: Settings
) -> None:
    with pytest.raises(EmulationError) as error:
        kernel.run(checked, bug, settings)
    reports = error.value.reports
    assert kinds <= {report.kind for report in reports}
    places = [report for report in reports if "at planted_bugs.cu:" in report.text]
    assert places or bug == Bug.TOO_MUCH_SHARED, reports


@pytest.mark.parametrize(
    ("bug", "text"),
    [
        (Bug.READ_PAST_BUFFER, "block (0, 0, 0) thread 100: read of 4 bytes 0 bytes past the end of x at planted_bugs"),
        (Bug.WRITE_PAST_BUFFER, "thread 100: write of 4 bytes 0 bytes past the end of out at planted_bugs"),
        (Bug.READ_PAST_SHARED, "thread 127: read of 4 bytes 0 bytes past the end of shared memory at planted_bugs"),
    ],
    ids=lambda parameter: parameter.name.lower() if isinstance(parameter, Bug) else "",
)
def test_a_report_names_thread_memory_and_line(checked: Emulator, bug: Bug, text: str) -> None:
    with pytest.raises(EmulationError, match=text.replace("(", r"\(").replace(")", r"\)")):
        KERNELS[1].run(checked, bug)


def test_a_write_past_a_buffer_shows_without_the_checker_too() -> None:
    fast = Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=False)
    with pytest.raises(EmulationError, match="guard: bytes around out were changed"):
        KERNELS[1].run(fast, Bug.WRITE_PAST_BUFFER)


def test_memory_between_strided_elements_is_kept(planted: Emulator) -> None:
    out = fresh(3, 32).tensor.fill_(0)[1]  # a view
    planted.run("planted_gather", x=FLOATS[5:69:2], out=Output(out), stride=2)
    assert torch.equal(out, FLOATS[5:69:2])
    planted.run("planted_gather", x=FLOATS[5:69:2], out=Output(out), stride=1)
    assert torch.equal(out, FLOATS[5:37])


@pytest.mark.parametrize(
    ("kernel", "sizes", "text"),
    [(KERNELS[3], {"blocks": 0}, "the grid is empty"), (KERNELS[5], {"threads": 1025}, "1025 threads in a block")],
    ids=["grid", "block"],
)
def test_what_cuda_would_not_launch(planted: Emulator, kernel: Kernel, sizes: dict[str, int], text: str) -> None:
    with pytest.raises(EmulationError, match=f"launch: {text}"):
        replace(kernel, sizes={**kernel.sizes, **sizes}).run(planted)


# ---- schedules ----


def test_random_schedules_show_what_the_order_hides() -> None:
    fast = Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=False)
    racy = KERNELS[0]
    results = [racy.run(fast, Bug.NO_BARRIER_BEFORE_PREFETCH, Settings(seed=seed)) for seed in range(6)]
    wrong = [not torch.equal(result, racy.expected) for result in results]
    assert not wrong[0]
    assert all(wrong[1:])


def test_a_seed_fixes_the_schedule(planted: Emulator) -> None:
    def results(seed: int) -> list[Any]:
        try:
            return KERNELS[0].run(planted, Bug.NO_BARRIER_BEFORE_PREFETCH, Settings(seed=seed, preempt=0.05)).tolist()
        except EmulationError as error:
            return error.reports

    assert results(3) == results(3)
    assert results(3) != results(4)


# ---- traffic ----


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_a_strided_load(checked: Emulator, stride: int, sectors: int) -> None:
    out = fresh(32)
    counters = checked.run("planted_gather", x=FLOATS[: 32 * stride], out=out, stride=stride)
    assert torch.equal(out.tensor, FLOATS[: 32 * stride : stride])
    load, store = counters.global_load, counters.global_store
    assert (load.requests, load.bytes, load.transactions, load.ideal) == (1, 128, sectors, 4)
    assert (store.requests, store.bytes, store.transactions, store.ideal) == (1, 128, 4, 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_of_a_strided_access(checked: Emulator, stride: int, wavefronts: int) -> None:
    counters = checked.run("planted_spread", x=FLOATS[:32], out=fresh(32), stride=stride)
    for traffic in (counters.shared_load, counters.shared_store):
        assert (traffic.requests, traffic.bytes, traffic.transactions, traffic.ideal) == (1, 128, wavefronts, 1)


@pytest.mark.parametrize(("swizzled", "wavefronts"), [(1, 1), (0, 8)])
@pytest.mark.parametrize("settings", SEEDS[:2], ids=["in_order", "random"])
def test_bank_conflicts_of_ldmatrix(checked: Emulator, swizzled: int, wavefronts: int, settings: Settings) -> None:
    out = fresh(32, dtype=torch.int32)
    counters = checked.run("planted_first_column", settings, x=INTEGERS, out=out, swizzled=swizzled, bug=0)
    ldmatrix, source, target = counters.ldmatrix, counters.copy_source, counters.copy_target
    assert (ldmatrix.requests, ldmatrix.bytes) == (1, 512)
    assert (ldmatrix.transactions, ldmatrix.ideal) == (4 * wavefronts, 4)  # a matrix at a time
    # Eight copies a lane, each lane in a row of its own.
    assert (source.requests, source.bytes, source.transactions, source.ideal) == (8, 4096, 8 * 32, 8 * 16)
    assert (target.requests, target.transactions, target.ideal) == (8, 8 * 4 * wavefronts, 8 * 4)
    assert (counters.mma, counters.barriers, counters.atomics, counters.blocks) == (0, 1, 0, 1)


def test_atomics_and_blocks_are_counted(planted: Emulator) -> None:
    out = Output(torch.zeros(1, dtype=torch.int32), initialised=True)
    counters = planted.run("planted_maximum", x=INTEGERS[:160], out=out, blocks=5, bug=0)
    assert (counters.atomics, counters.blocks) == (5, 5)
