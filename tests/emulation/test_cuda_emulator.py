"""The CUDA emulator: every checker finds its planted bug and reports nothing for correct kernels."""

from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.cuda import EmulationError, Emulator, Output, Settings

SOURCES = Path(__file__).parent / "cuda"
IN_ORDER = Settings()
SEEDS = [IN_ORDER] + [Settings(seed=seed, preempt=0.02) for seed in range(1, 5)]


@pytest.fixture(scope="module")
def fast() -> Emulator:
    return Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=False)


@pytest.fixture(scope="module")
def checked() -> Emulator:
    return Emulator("planted_bugs", SOURCES / "planted_bugs.cu", checked=True)


@pytest.fixture(params=["fast", "checked"])
def planted(request: pytest.FixtureRequest) -> Emulator:
    return request.getfixturevalue(request.param)


# ---- planted bugs ----


class Bug(IntEnum):
    """The enumeration of planted_bugs.cu."""

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
    BARRIER_BEFORE_WAIT = 23
    READ_ACROSS_THE_END = 24
    DIFFERENT_OPERATIONS = 25
    WARP_BARRIER_AFTER_COPY = 26


@dataclass
class Kernel:
    """A kernel of planted_bugs.cu: its arguments, its result, and the expected report of each planted bug."""

    entry: str
    x: torch.Tensor
    expected: torch.Tensor
    bugs: dict[Bug, str]
    sizes: dict[str, int] = field(default_factory=dict)
    initial: int | None = None

    def run(self, emulator: Emulator, bug: Bug = Bug.NONE, settings: Settings = IN_ORDER) -> torch.Tensor:
        out = Output.empty(*self.expected.shape, dtype=self.expected.dtype)
        if self.initial is not None:
            out = Output(torch.full_like(self.expected, self.initial), initialised=True)
        emulator.run(self.entry, settings, x=self.x, out=out, **self.sizes, bug=int(bug))
        return out.tensor


WHO = r"block \(\d+, 0, 0\) thread \d+: "
AT = r" at planted_bugs\.cu:\d+"


def race(memory: str, access: str, other: str, by: str = r"thread \d+") -> str:
    return rf"race: {WHO}{access} of {memory}\+\d+{AT}.* is not ordered after the {other} by {by}{AT}"


FLOATS = torch.arange(2560.0)
INTEGERS = torch.arange(1024, dtype=torch.int32)
SUM_REVERSED_TILES = Kernel(
    "planted_sum_reversed_tiles",
    FLOATS,
    FLOATS.view(5, 128, 4).sum(dim=0).flip(0).flatten(),
    {
        Bug.NO_BARRIER_AFTER_COPY: race("shared memory", "read", "write"),
        Bug.WARP_BARRIER_AFTER_COPY: race("shared memory", "read", "write"),
        Bug.NO_BARRIER_BEFORE_PREFETCH: race("shared memory", "write", "read"),
        Bug.BARRIER_BEFORE_WAIT: race("shared memory", "read", "write"),
        Bug.WAIT_FOR_TOO_FEW_GROUPS: rf"cp.async: {WHO}read of shared memory\+\d+{AT} while the copy by thread \d+{AT}",
        Bug.NOT_WAITED_FOR: rf"cp.async: {WHO}exits and has not waited for its copies",
    },
    {"tiles": 5},
)
COPY = Kernel(
    "planted_copy",
    FLOATS[:100],
    FLOATS[:100],
    {
        Bug.READ_PAST_BUFFER: rf"thread 100: read of 4 bytes 0 bytes past the end of x{AT}",
        Bug.WRITE_PAST_BUFFER: rf"thread 100: write of 4 bytes 0 bytes past the end of out{AT}",
        Bug.READ_PAST_SHARED: rf"thread 127: read of 4 bytes 0 bytes past the end of shared memory{AT}",
        Bug.READ_UNWRITTEN_SHARED: rf"uninitialised: {WHO}read of shared memory\+\d+{AT}",
        Bug.READ_UNWRITTEN_OUTPUT: rf"uninitialised: {WHO}read of out\+\d+{AT}",
        Bug.TOO_MUCH_SHARED: "launch: 204800 bytes of shared memory",
    },
    {"n": 100},
)
COPY_VECTORS = Kernel(
    "planted_copy_vectors",
    FLOATS[:510],
    torch.cat([FLOATS[:508], torch.zeros(4)]),  # the last copy is invalid and fills zeros
    {
        Bug.MISALIGNED_VECTOR: rf"misaligned: {WHO}read of 16 bytes at x\+\d+{AT}",
        Bug.MISALIGNED_COPY: rf"misaligned: {WHO}read of 16 bytes at x\+\d+{AT}",
        Bug.READ_ACROSS_THE_END: rf"out of bounds: {WHO}read of 16 bytes across the end of x{AT}",
    },
)
MAXIMUM = Kernel(
    "planted_maximum",
    INTEGERS[:160],
    torch.tensor([159], dtype=torch.int32),
    {Bug.BLOCKS_WITHOUT_ATOMIC: race("out", "read", "write", "another block")},
    {"blocks": 5},
    initial=-1,
)
ADD_NEXT = Kernel(
    "planted_add_next",
    INTEGERS[:8],
    INTEGERS[:8].roll(-1),
    {Bug.READ_FROM_OTHER_BLOCKS: race("out", "write", "read", "another block")},
    {"blocks": 8},
    initial=0,
)
BROADCAST = Kernel(
    "planted_broadcast",
    INTEGERS[:4],
    torch.full((128,), 6, dtype=torch.int32),
    {
        Bug.NO_BARRIER_AFTER_READS: race("shared memory", "read", "write"),
        Bug.WARP_BARRIER_FOR_BLOCK: race("shared memory", "write", "read", "threads of several warps"),
    },
    {"rounds": 4, "threads": 128},
)
BROADCAST_IN_WARP = Kernel(
    "planted_broadcast",
    INTEGERS[:4],
    torch.full((32,), 6, dtype=torch.int32),
    {Bug.NO_BARRIER_AFTER_READS: race("shared memory", "write", "read", "several threads of warp 0")},
    {"rounds": 4, "threads": 32},
)
SWAP_WITHIN_WARP = Kernel(
    "planted_swap_within_warp",
    FLOATS[:128],
    FLOATS[:128].view(64, 2).flip(1).flatten(),
    {
        Bug.NO_WARP_BARRIER: race("shared memory", "read", "write"),
        Bug.BARRIER_IN_BRANCH: rf"divergence: .* have exited; 16 \(0 to 15\) wait at __syncthreads{AT}",
        Bug.CALLER_NOT_IN_MASK: rf"divergence: {WHO}__shfl_sync by a lane that its mask does not name{AT}",
        Bug.SOURCE_NOT_IN_MASK: rf"divergence: {WHO}__shfl_sync from lane \d+, which the mask does not name{AT}",
        Bug.MASK_NAMES_OTHERS: rf"divergence: .* wait at __ballot_sync{AT}",
        Bug.DIFFERENT_OPERATIONS: rf"divergence: .* wait at __all_sync{AT}.* wait at __any_sync{AT}",
    },
)
FIRST_COLUMN = Kernel(
    "planted_first_column",
    INTEGERS,
    INTEGERS[::32],
    {
        Bug.MATRIX_FROM_GLOBAL: rf"address space: {WHO}read of 16 bytes at x\+\d+{AT} by an instruction for shared",
    },
    {"swizzled": 1},
)
KERNELS = [
    SUM_REVERSED_TILES,
    COPY,
    COPY_VECTORS,
    MAXIMUM,
    ADD_NEXT,
    BROADCAST,
    BROADCAST_IN_WARP,
    SWAP_WITHIN_WARP,
    FIRST_COLUMN,
]
PLANTED = [
    pytest.param(kernel, bug, text, id=f"{bug.name.lower()}-{len(kernel.expected)}")
    for kernel in KERNELS
    for bug, text in kernel.bugs.items()
]


def test_every_bug_is_planted() -> None:
    assert {bug for kernel in KERNELS for bug in kernel.bugs} == set(Bug) - {Bug.NONE}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.entry)
@pytest.mark.parametrize("settings", SEEDS, ids=lambda settings: f"seed{settings.seed}")
def test_correct_kernels_are_not_reported(planted: Emulator, kernel: Kernel, settings: Settings) -> None:
    assert torch.equal(kernel.run(planted, settings=settings), kernel.expected)


@pytest.mark.parametrize(("kernel", "bug", "text"), PLANTED)
def test_planted_bugs_are_found(checked: Emulator, kernel: Kernel, bug: Bug, text: str) -> None:
    with pytest.raises(EmulationError, match=text):
        kernel.run(checked, bug)


@pytest.mark.parametrize(("kernel", "bug", "text"), PLANTED)
@pytest.mark.parametrize("settings", SEEDS[1:], ids=lambda settings: f"seed{settings.seed}")
def test_planted_bugs_are_found_in_any_order(
    checked: Emulator, kernel: Kernel, bug: Bug, text: str, settings: Settings
) -> None:
    with pytest.raises(
        EmulationError, match=text.split(":")[0]
    ):  # which of two accesses is reported depends on the schedule
        kernel.run(checked, bug, settings)


def test_fresh_shared_memory_is_nan(fast: Emulator) -> None:
    out = COPY.run(fast, Bug.READ_UNWRITTEN_SHARED)
    assert torch.equal(out[::2], FLOATS[:100:2])
    assert out[1::2].isnan().all()


def test_a_write_past_a_buffer_is_found_without_the_checker(fast: Emulator) -> None:
    with pytest.raises(EmulationError, match="guard: bytes around out were changed"):
        COPY.run(fast, Bug.WRITE_PAST_BUFFER)


def test_tensors_keep_their_strides(planted: Emulator) -> None:
    x = FLOATS[5:69:2]
    out = torch.zeros(32, 3)
    # The kernel ignores strides: it writes 32 elements from out[0, 1] on.
    planted.run("planted_gather", x=x, out=Output(out[:, 1], initialised=True), stride=2)
    assert torch.equal(out[:, 1], torch.cat([x[::3], torch.zeros(21)]))
    assert not out[:, ::2].any()


@pytest.mark.parametrize(
    ("kernel", "sizes", "text"),
    [(MAXIMUM, {"blocks": 0}, "the grid is empty"), (BROADCAST, {"threads": 1025}, "1025 threads in a block")],
    ids=["grid", "block"],
)
def test_launches_that_cuda_refuses(planted: Emulator, kernel: Kernel, sizes: dict[str, int], text: str) -> None:
    with pytest.raises(EmulationError, match=f"launch: {text}"):
        replace(kernel, sizes={**kernel.sizes, **sizes}).run(planted)


# ---- schedules ----


def test_random_schedules_find_bugs_hidden_by_a_fixed_order(fast: Emulator) -> None:
    kernel, bug = SUM_REVERSED_TILES, Bug.NO_BARRIER_BEFORE_PREFETCH
    assert torch.equal(kernel.run(fast, bug), kernel.expected)
    for seed in range(1, 6):
        assert not torch.equal(kernel.run(fast, bug, Settings(seed=seed)), kernel.expected)


def test_blocks_run_in_any_order(fast: Emulator) -> None:
    kernel, bug = replace(ADD_NEXT, initial=1), Bug.READ_FROM_OTHER_BLOCKS
    in_order = kernel.run(fast, bug)
    assert in_order.tolist() == [2] * 7 + [3]
    assert any(not torch.equal(kernel.run(fast, bug, Settings(seed=seed)), in_order) for seed in range(1, 4))


def test_a_seed_fixes_the_schedule(planted: Emulator) -> None:
    def results(seed: int) -> list[Any]:
        try:
            return SUM_REVERSED_TILES.run(planted, Bug.NO_BARRIER_BEFORE_PREFETCH, Settings(seed, 0.05)).tolist()
        except EmulationError as error:
            return error.reports

    assert results(3) == results(3)
    assert results(3) != results(4)


# ---- traffic ----


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_a_strided_load(checked: Emulator, stride: int, sectors: int) -> None:
    out = Output.empty(32)
    counters = checked.run("planted_gather", x=FLOATS[:1024], out=out, stride=stride)
    assert torch.equal(out.tensor, torch.arange(32.0) * stride)
    load, store = counters.global_load, counters.global_store
    assert (load.requests, load.bytes, load.transactions) == (1, 128, sectors)
    assert load.ideal == (4 if stride else 1)
    assert (store.requests, store.bytes, store.transactions, store.ideal) == (1, 128, 4, 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_of_a_strided_access(checked: Emulator, stride: int, wavefronts: int) -> None:
    counters = checked.run("planted_spread", x=FLOATS[:32], out=Output.empty(32), stride=stride)
    for traffic in (counters.shared_load, counters.shared_store):
        assert (traffic.requests, traffic.bytes, traffic.transactions, traffic.ideal) == (1, 128, wavefronts, 1)


@pytest.mark.parametrize(("swizzled", "wavefronts"), [(1, 1), (0, 8)])
@pytest.mark.parametrize("settings", SEEDS[:2], ids=["in_order", "random"])
def test_bank_conflicts_of_ldmatrix(checked: Emulator, swizzled: int, wavefronts: int, settings: Settings) -> None:
    out = Output.empty(32, dtype=torch.int32)
    counters = checked.run("planted_first_column", settings, x=INTEGERS, out=out, swizzled=swizzled, bug=0)
    ldmatrix, source, target = counters.ldmatrix, counters.copy_source, counters.copy_target
    assert (ldmatrix.requests, ldmatrix.bytes) == (1, 512)
    assert (ldmatrix.transactions, ldmatrix.ideal) == (4 * wavefronts, 4)  # one matrix per wavefront
    # Eight copies per lane, each lane in its own row.
    assert (source.requests, source.bytes, source.transactions, source.ideal) == (8, 4096, 8 * 32, 8 * 16)
    assert (target.requests, target.transactions, target.ideal) == (8, 8 * 4 * wavefronts, 8 * 4)
    assert (counters.mma, counters.barriers, counters.atomics, counters.blocks) == (0, 1, 0, 1)


def test_broadcast_is_one_wavefront(checked: Emulator) -> None:
    counters = checked.run(
        "planted_broadcast", x=INTEGERS[:4], out=Output.empty(128, dtype=torch.int32), **BROADCAST.sizes, bug=0
    )
    load = counters.shared_load
    assert (load.requests, load.transactions, load.ideal) == (4 * 4, 4 * 4, 4 * 4)  # warps, rounds
    assert counters.barriers == 2 * 4


def test_atomics_and_blocks_are_counted(planted: Emulator) -> None:
    out = Output(torch.zeros(1, dtype=torch.int32), initialised=True)
    counters = planted.run("planted_maximum", x=INTEGERS[:160], out=out, blocks=5, bug=0)
    assert (counters.atomics, counters.blocks) == (5, 5)
