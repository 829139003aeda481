"""The CUDA kernels in the PTX simulator: nvcc's PTX for sm_80 under the real launcher, forward and backward.

Every access is checked, and warps run in adversarial order.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import standing_in, with_emulator
from emulation.ptx import Coverage, GlobalMemory, PtxError, launch, nvcc, parse
from emulation.ptx.cuda_module import PtxModule
from emulation.ptx.mutations import mutants
from ranker_oracle import Scoring, allowed, attention, scoring, true_gradients

import grank_kernels as gk

pytestmark = pytest.mark.skipif(nvcc.MISSING is not None, reason=str(nvcc.MISSING))

SEEDS = [None, 1, 2]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """One torch thread: the oracle's tensors are too small for two."""


# ---- the planted bugs of the CUDA emulator's tests, compiled by nvcc ----

PLANTED = Path(__file__).parent / "cuda" / "planted_bugs.cu"
BUGS = re.findall(r"\bk(\w+)(?: = 0)?,", re.search(r"enum class Bug[^}]*\{([^}]*)\}", PLANTED.read_text())[1])  # type: ignore[index]
FLOATS = np.arange(4096, dtype=np.float32) % 251
INTEGERS = np.arange(2048, dtype=np.int32) * 37 % 1009


@dataclass(frozen=True)
class Planted:
    """A kernel of planted_bugs.cu: inputs, numbers, launch, result, and the expected report of each bug."""

    name: str
    x: np.ndarray
    numbers: list[int]
    expected: np.ndarray
    finds: dict[str, str]
    grid: int = 1
    block: int = 128
    shared: int = 0
    before: np.ndarray | None = None  # content of the output before the launch; None: uninitialised

    def run(self, bug: str, seed: int | None) -> np.ndarray:
        memory = GlobalMemory()
        x = memory.put("x", self.x)
        if self.before is None:
            out = memory.empty("out", self.expected.shape, self.expected.dtype)
        else:
            out = memory.put("out", self.before)
        kernel = parse(nvcc.compile_ptx(PLANTED.read_text(), nvcc.HEADERS), self.name)
        launch(kernel, (self.grid,), (self.block,), [x, out, *self.numbers, BUGS.index(bug)], memory, self.shared, seed)
        return memory.get("out")


def reversed_tiles() -> np.ndarray:
    return FLOATS[: 5 * 512].reshape(5, 128, 4)[:, ::-1].sum(0).reshape(-1)


KERNELS = [
    Planted("sum_reversed_tiles", FLOATS[: 5 * 512], [5], reversed_tiles(), {
        "NoBarrierAfterCopy": "race|in-flight", "NoBarrierBeforePrefetch": "race on shared .* read by",
        "WaitForTooFewGroups": "read of in-flight", "NotWaitedFor": "read of in-flight",
        "BarrierBeforeWait": "race|in-flight", "WarpBarrierAfterCopy": "race|in-flight",
    }, shared=4096),
    Planted("4copyE", FLOATS[:100], [100], FLOATS[:100], {
        "ReadPastBuffer": r"out of bounds: x\+400 of 400 bytes, thread 100",
        "WritePastBuffer": r"out of bounds: out\+400",
        "ReadPastShared": "out of bounds of shared memory: byte 512 of 512, thread 127",
        "ReadUnwrittenShared": "read of uninitialised memory: shared byte 4",
        "ReadUnwrittenOutput": "read of uninitialised memory: out",
    }, shared=512),
    Planted("copy_vectors", FLOATS[:510], [], np.where(np.arange(512) < 508, FLOATS[:512], 0).astype(np.float32), {
        "MisalignedVector": "misaligned access of 16 bytes", "MisalignedCopy": "misaligned access of 16 bytes",
        "ReadAcrossTheEnd": r"out of bounds: x\+2032 of 2040 bytes",
    }, shared=2048),
    Planted("7maximum", INTEGERS[:160], [], INTEGERS[:160].max(keepdims=True), {"BlocksWithoutAtomic": "race on out"},
            grid=5, block=32, before=np.zeros(1, np.int32)),
    Planted("broadcast", INTEGERS[:6], [6], np.full(128, INTEGERS[:6].sum(), np.int32), {
        "NoBarrierAfterReads": "race on shared byte 0", "WarpBarrierForBlock": "race on shared byte 0|uninitialised",
    }, shared=16),
    Planted("swap_within_warp", FLOATS[:128], [], FLOATS[:128].reshape(64, 2)[:, ::-1].reshape(-1), {
        "BarrierInBranch": "barrier reached by part of a warp|has exited",
        "CallerNotInMask": "executed by part of a warp",
        "SourceNotInMask": "lane outside its mask|part of a warp", "MaskNamesOthers": "executed by part of a warp",
        "DifferentOperations": "executed by part of a warp",
    }, shared=512),
    Planted("first_column", INTEGERS[:1024].view(np.uint32), [1], INTEGERS[:1024:32].view(np.uint32), {
        "MatrixFromGlobal": "out of bounds of shared memory",
    }, block=32, shared=4096),
]  # fmt: skip
ELSEWHERE = {
    "NoWarpBarrier",
    "ReadFromOtherBlocks",
    "TooMuchShared",
}  # not here: races within a warp, blocks of one thread, refused launches
FOUND = [pytest.param(kernel, bug, id=bug) for kernel in KERNELS for bug in kernel.finds]


def test_every_planted_bug_has_a_case() -> None:
    assert {bug for kernel in KERNELS for bug in kernel.finds} | ELSEWHERE | {"None"} == set(BUGS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
def test_correct_kernels_pass(kernel: Planted, seed: int | None) -> None:
    np.testing.assert_array_equal(kernel.run("None", seed), kernel.expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "bug"), FOUND)
def test_planted_bugs_are_found(kernel: Planted, bug: str, seed: int | None) -> None:
    with pytest.raises(PtxError, match=kernel.finds[bug]):
        kernel.run(bug, seed)


# ---- score_candidates and candidate_cross_attention ----


def scores_of(problem: Scoring, module: PtxModule, **more: Any) -> torch.Tensor:
    with standing_in(module, module.memory.torch):
        return gk.score_candidates(**{**vars(problem), **more}, backend="emulated")


SCORINGS = [
    # lengths, candidates, width, hidden, elements, table, activation, plan
    ([0, 1, 63, 130], 65, 32, 64, torch.float16, torch.float16, "relu", (2, 1)),
    ([64, 65], 130, 64, 32, torch.bfloat16, torch.int8, "gelu", (4, 2)),  # the history stays in shared memory
    ([200, 0], 70, 128, 128, torch.float16, torch.int8, "silu", (2, 2)),
]


def check_scores(case: tuple[Any, ...], seed: int | None, coverage: dict[str, Coverage]) -> None:
    lengths, C, d, h, dtype, table, activation, plan = case
    problem = scoring(lengths, C, d, h, dtype=dtype, table=table, activation=activation)
    got = scores_of(problem, PtxModule(coverage, plan, seed))
    exact, plain, there = problem.formula(torch.float64), problem.formula(dtype), problem.candidate_ids >= 0
    assert bool((got[~there] == -torch.inf).all())
    assert float((got.double() - exact)[there].abs().max()) <= allowed(plain[there], exact[there], dtype, exact[there])
    bias, floor = torch.randn(len(problem.keys)), -1.0
    with_lse = scores_of(problem, PtxModule(coverage, plan, seed), bias_k=bias, lse_weight=0.5, lse_floor=floor)
    biased = scores_of(problem, PtxModule(coverage, plan, seed), bias_k=bias)
    term = 0.5 * problem.lse(bias, floor)
    assert torch.allclose((with_lse - biased)[there].double(), term[there], rtol=4e-3, atol=4e-3)


ATTENTIONS = [
    # lengths, queries per user, heads, width, elements, options
    (
        [0, 1, 63],
        64,
        2,
        16,
        torch.float16,
        {"queries": "dense", "history": "ragged", "bias": True, "activation": "softmax"},
    ),
    (
        [64, 65, 130],
        65,
        2,
        32,
        torch.bfloat16,
        {"queries": "ragged", "history": "dense", "bias": True, "activation": "silu"},
    ),
    ([70, 3], 30, 1, 128, torch.float16, {"queries": "shared", "history": "ragged", "activation": "softmax"}),
]


def check_attention(case: tuple[Any, ...], seed: int | None, coverage: dict[str, Coverage]) -> None:
    """Compares outputs and gradients with the oracle."""
    lengths, C, heads, D, dtype, options = case
    problem = attention(lengths, C, heads, D, dtype=dtype, **options)
    leaf, module = problem.cast(None), PtxModule(coverage, seed=seed)
    grad_out = torch.randn(problem.cast(torch.float64).formula().shape).to(dtype)
    with standing_in(module, module.memory.torch):
        out = leaf.attend("emulated")
        got = [out.detach(), *torch.autograd.grad(out, leaf.leaves(), grad_out)]

    def all_of(dtype: torch.dtype) -> list[torch.Tensor]:
        return [problem.cast(dtype).formula().detach(), *true_gradients(problem, grad_out, dtype)]

    for found, exact, plain in zip(got, all_of(torch.float64), all_of(dtype), strict=True):
        assert float((found.double() - exact).abs().max()) <= allowed(plain, exact, dtype, exact)


@pytest.mark.slow  # test_nearly_every_line_is_executed runs all cases with warps in one order
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", SCORINGS, ids=lambda case: f"d{case[2]}-h{case[3]}-{case[6]}")
def test_scores(case: tuple[Any, ...], seed: int) -> None:
    check_scores(case, seed, {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", ATTENTIONS, ids=lambda case: f"D{case[3]}-{case[5]['activation']}")
def test_attention_and_its_gradients(case: tuple[Any, ...], seed: int) -> None:
    check_attention(case, seed, {})


@pytest.mark.parametrize(("check", "cases"), [(check_scores, SCORINGS), (check_attention, ATTENTIONS)])
def test_nearly_every_line_is_executed(check: Callable[..., None], cases: list[Any]) -> None:
    """Counts source lines, not instructions: ptxas, not nvcc, removes loops for threads beyond the block."""
    coverage: dict[str, Coverage] = {}
    for case in cases:
        check(case, None, coverage)
    lines: dict[str, bool] = {}
    for each in coverage.values():
        for line, executed in each.lines().items():
            lines[line] = lines.get(line, False) or executed
    missing = [line for line, executed in lines.items() if not executed]
    assert len(missing) <= 0.05 * len(lines), missing


@pytest.mark.slow  # compiles the emulator of the CUDA source
def test_both_emulators_count_the_same() -> None:
    """Source and PTX execute the same numbers of products, barriers, copies and matrix rows."""
    problem = scoring([0, 1, 63, 130], 65, 32, 64, dtype=torch.float16)
    module = PtxModule({})
    scores = scores_of(problem, module)
    with with_emulator(checked=True, plan=module.plan) as emulated:
        assert torch.allclose(scores, problem.scores("emulated"), rtol=1e-3, atol=1e-3, equal_nan=True)
    counters = module.runs[0].counters
    assert counters["mma"] == emulated.counters.mma > 0
    assert counters["cp_async_bytes"] == emulated.counters.copy_source.bytes
    assert counters["matrix_wavefronts"] == emulated.counters.ldmatrix.transactions
    assert counters["matrix_wavefronts"] == counters["matrix_wavefronts_ideal"]
    assert counters["cp_async_sectors"] * 32 <= 1.1 * counters["cp_async_bytes"]


@pytest.mark.parametrize("i", range(2))
def test_deleted_barriers_are_reported(i: int) -> None:
    """Deletes each barrier and wait of `score_candidates` in turn."""
    coverage: dict[str, Coverage] = {}
    check_scores(SCORINGS[i], None, coverage)
    ((name, _),) = coverage.items()
    noticed, unnoticed = [], []
    for order, ptx in mutants(nvcc.ptx_of("score_candidates.cuh", name)):
        try:
            check_scores(SCORINGS[i], 1, {name: Coverage(parse(ptx))})
        except (PtxError, AssertionError):
            noticed.append(order)
        else:
            unnoticed.append(order)
    assert unnoticed == []
    assert set(noticed) == {"bar.sync", "cp.async.wait_group"}
