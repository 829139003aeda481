"""The CUDA kernels in the emulator: properties that only the emulator can observe.

Checked accesses, random thread schedules, the mma rounding of a GPU, counts of memory traffic and instructions. The
quick tests take 16 s of processor time after one compilation of the emulator (42 s, kept in build/ across runs).
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import with_emulator
from emulation.cuda.build import ROOT
from emulation.cuda.emulator import Counters, Rounding, Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_checks import check_attention, check_scores
from ranker_oracle import Attention, Scoring, allowed, attention, largest, offsets_of, scoring, true_gradients

import grank_kernels as gk
from grank_kernels.backends import cuda
from grank_kernels.backends.problems import CandidateCrossAttentionProblem, ScoreCandidatesProblem

HALVES = (torch.float16, torch.bfloat16)
WIDTHS = (16, 32, 64, 128)
WARPS = 4
TILE = 64  # rows per block, and keys per stage
INT64 = torch.iinfo(torch.int64)
HOSTILE_OFFSETS = [  # for two users and 70 rows
    [INT64.min, 30, INT64.max],
    [70, 0, 70],
    [-1, -5, -70],
    [500, 600, 700],
    [0, 1 << 40, 3],
]


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """One torch thread: the oracle's tensors are too small for two."""


@pytest.fixture
def quick() -> Iterator[None]:
    """The unchecked build, for tests that compare values only."""
    with with_emulator():
        yield


def scores_of(problem: Scoring, **emulation: Any) -> tuple[torch.Tensor, Counters]:
    with with_emulator(**emulation) as module:
        return problem.scores("emulated"), module.counters


def attend(problem: Attention, grad_out: torch.Tensor, **emulation: Any) -> tuple[list[torch.Tensor], list[Counters]]:
    """(`out` and the gradients of its inputs, counters of the forward and the backward pass)."""
    leaf = problem.cast(None)
    with with_emulator(**emulation) as module:
        out = leaf.attend("emulated")
        forward = module.counters
        gradients = torch.autograd.grad(out, leaf.leaves(), grad_out)
        return [out.detach(), *gradients], [forward, module.counters]


def grad_like_out(problem: Attention) -> torch.Tensor:
    return torch.randn(problem.cast(torch.float64).formula().shape).to(problem.q.dtype)


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_scores_are_right(problem: Scoring, got: torch.Tensor) -> None:
    exact, plain = problem.formula(torch.float64), problem.formula(problem.keys.dtype)
    there = problem.candidate_ids >= 0
    assert bool((got[~there] == -torch.inf).all())
    error = (got.double() - exact)[there].abs()
    assert largest(error) <= allowed(plain[there], exact[there], problem.keys.dtype, exact[there])


def assert_attention_is_right(problem: Attention, grad_out: torch.Tensor, got: list[torch.Tensor]) -> None:
    dtype = problem.q.dtype

    def all_of(dtype: torch.dtype) -> list[torch.Tensor]:
        return [problem.cast(dtype).formula().detach(), *true_gradients(problem, grad_out, dtype)]

    for found, exact, plain in zip(got, all_of(torch.float64), all_of(dtype), strict=True):
        assert largest(found.double() - exact) <= allowed(plain, exact, dtype, exact)


# ---- every width, every size around a tile, rounding as on a GPU ----


@pytest.mark.parametrize("i", range(16))
def test_scores_of_every_width(i: int, dtype: torch.dtype) -> None:
    lengths = [[0, 1, 63], [64, 65, 200], [TILE - 1, 0, 2 * TILE], [129, 1, 16]][i // 4]
    problem = scoring(
        lengths, [1, 63, 64, 65][i % 4], WIDTHS[i % 4], WIDTHS[i // 4], dtype=dtype,
        table=torch.int8 if i % 2 else dtype, activation=("relu", "silu", "gelu")[i % 3],
    )  # fmt: skip
    rounding = (Rounding.GROUPS_OF_8, Rounding.GROUPS_OF_16)[i % 2]
    assert_scores_are_right(problem, scores_of(problem, settings=Settings(rounding=rounding))[0])


@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize("i", range(4))
def test_attention_of_every_width(i: int, activation: str, dtype: torch.dtype) -> None:
    problem = attention(
        [[0, 1, 63], [64, 65, 130]][i % 2], [64, 65, 1, 63][i], 2 if i < 2 else 1, WIDTHS[i], dtype=dtype,
        queries=("dense", "shared", "ragged", "dense")[i], history=("ragged", "dense")[i % 2], bias=i % 2 == 1,
        activation=activation,
    )  # fmt: skip
    grad_out = grad_like_out(problem)
    rounding = (Rounding.GROUPS_OF_8, Rounding.GROUPS_OF_16)[i % 2]
    got, _ = attend(problem, grad_out, settings=Settings(rounding=rounding))
    assert_attention_is_right(problem, grad_out, got)


@pytest.mark.usefixtures("quick")
@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=4))
    C, D, width = data.draw(st.integers(0, 140)), data.draw(st.sampled_from(WIDTHS)), data.draw(st.sampled_from(WIDTHS))
    table = data.draw(st.sampled_from([None, torch.int8]))
    scored = scoring(lengths, C, D, width, dtype=torch.bfloat16, table=table)
    check_scores(scored, "emulated")
    attended = attention(
        lengths, C, data.draw(st.integers(1, 3)), D, dtype=torch.bfloat16, bias=data.draw(st.booleans()),
        queries=data.draw(st.sampled_from(["dense", "shared", "ragged"])),
        history=data.draw(st.sampled_from(["dense", "ragged"])),
        activation=data.draw(st.sampled_from(["softmax", "silu"])),
    )  # fmt: skip
    check_attention(attended, "emulated")


# ---- every access checked, threads in any order ----

SCHEDULES = [Settings(), Settings(seed=1, preempt=0.02), Settings(seed=2, preempt=0.2)]


@pytest.mark.parametrize("table", ["int8", "same"])
@pytest.mark.parametrize("plan", [(2, 1), (4, 3)])
def test_scores_race_with_nothing(table: str, plan: tuple[int, int], dtype: torch.dtype) -> None:
    """Scores have the same bits under every thread schedule and plan (short histories kept in shared memory or not)."""
    problem = scoring([70, 0, 3], 130, 32, 16, dtype=dtype, table=torch.int8 if table == "int8" else dtype)
    want, _ = scores_of(problem)
    assert_scores_are_right(problem, want)
    for schedule in SCHEDULES:
        assert_same_bits([scores_of(problem, checked=True, settings=schedule, plan=plan)[0]], [want])


@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize(("queries", "history", "D"), [("ragged", "dense", 16), ("shared", "ragged", 128)])
def test_attention_races_with_nothing(queries: str, history: str, D: int, activation: str) -> None:
    problem = attention(
        [70, 0, 3], 70, 1, D, dtype=torch.float16, queries=queries, history=history, bias=True, activation=activation
    )
    grad_out = grad_like_out(problem)
    want, _ = attend(problem, grad_out)
    assert_attention_is_right(problem, grad_out, want)
    for schedule in SCHEDULES:
        assert_same_bits(attend(problem, grad_out, checked=True, settings=schedule)[0], want)


@pytest.mark.parametrize("plan", [(2, 1), (3, 2), (2, 4), (5, 2), (8, 8)])
@pytest.mark.parametrize("lengths", [[0, 0], [64, 65], [200, 1]])
def test_scores_do_not_depend_on_the_plan(plan: tuple[int, int], lengths: list[int]) -> None:
    problem = scoring(lengths, 200, 32, 32, dtype=torch.float16)
    assert_same_bits([scores_of(problem, plan=plan)[0]], [scores_of(problem)[0]])


# ---- ids and offsets that are not validated on a GPU ----


@pytest.mark.parametrize("offsets", HOSTILE_OFFSETS)
def test_scores_with_hostile_offsets_and_ids(offsets: list[int]) -> None:
    problem = scoring([30, 40], 5, dtype=torch.float16)
    ids = torch.tensor([[INT64.min, -1, 99, 100, INT64.max]] * 2)
    head = (problem.user_hidden, problem.item_weight, problem.out_weight)
    hostile = ScoreCandidatesProblem(
        ids, problem.items, None, problem.keys, problem.values, torch.tensor(offsets), *head
    )
    with with_emulator(checked=True):
        scores = cuda.score_candidates(hostile)
    assert torch.equal(scores.isfinite(), torch.tensor([[False, False, True, False, False]] * 2))
    assert bool((scores[:, [0, 1, 3, 4]] == -torch.inf).all())


@pytest.mark.parametrize("offsets", HOSTILE_OFFSETS)
@pytest.mark.parametrize("ragged", ["queries", "keys"])
def test_attention_with_hostile_offsets(ragged: str, offsets: list[int]) -> None:
    q, k, v = (torch.randn(70, 1, 16).half() for _ in range(3))
    given: list[torch.Tensor | None] = [torch.tensor(offsets), torch.tensor([0, 30, 70])]
    if ragged == "keys":
        given.reverse()
    hostile = CandidateCrossAttentionProblem(q, k, v, *given)
    with with_emulator(checked=True):
        out, lse = cuda.candidate_cross_attention(hostile)
        cuda.candidate_cross_attention_backward(q, lse, hostile, out, lse)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("lengths", [[INT64.min, INT64.max], [-1, 71]])
def test_attention_with_hostile_lengths(lengths: list[int]) -> None:
    q, k, v = (torch.randn(2, 70, 1, 16).half() for _ in range(3))
    hostile = CandidateCrossAttentionProblem(q, k, v, seqused_k=torch.tensor(lengths))
    with with_emulator(checked=True):
        out, lse = cuda.candidate_cross_attention(hostile)
        grads = cuda.candidate_cross_attention_backward(q, lse, hostile, out, lse)
        full, _ = cuda.candidate_cross_attention(CandidateCrossAttentionProblem(q, k, v))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1], full[1])
    assert bool((grads[1][0] == 0).all())


@pytest.mark.usefixtures("quick")
def test_many_ragged_users_find_their_tiles() -> None:
    """More users than one round of the binary search probes, most of them with no rows."""
    counts = [0] * 40 + [1] * 40 + [0, 200, 0, 65, 64, 63] + [2] * 20 + [0] * 30
    q = torch.randn(sum(counts), 1, 16).half()
    k, v = (torch.randn(len(counts), 3, 1, 16).half() for _ in range(2))
    problem = Attention(q, k, v, cu_seqlens_q=offsets_of(counts))
    grad_out = torch.randn_like(q)
    leaf = problem.cast(None)
    out = leaf.attend("emulated")
    gradients = torch.autograd.grad(out, leaf.leaves(), grad_out)
    assert_attention_is_right(problem, grad_out, [out.detach(), *gradients])


# ---- counters ----


def tiles(rows: int) -> int:
    return -(-rows // TILE)


def assert_no_waste(counters: Counters) -> None:
    """Each 8 x 8 matrix is read from shared memory in one wavefront, and copies use every sector they touch."""
    assert counters.ldmatrix.transactions == counters.ldmatrix.ideal > 0
    assert counters.copy_target.transactions == counters.copy_target.ideal
    assert counters.shared_load.transactions == counters.shared_load.ideal
    assert 32 * counters.copy_source.transactions <= 1.1 * counters.copy_source.bytes
    assert 32 * counters.global_store.transactions <= 1.1 * counters.global_store.bytes
    assert counters.atomics == 0


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("h", WIDTHS)
def test_cost_of_scores(d: int, h: int) -> None:
    lengths, C = [100, 0, 64], 128
    problem = scoring(lengths, C, d, h, dtype=torch.float16)
    _, counters = scores_of(problem, checked=True, plan=(2, 1))
    key_tiles = sum(map(tiles, lengths))
    of_keys = TILE // 8 * (d // 16) + TILE // 16 * (h // 8)
    assert counters.mma == WARPS * tiles(C) * (key_tiles * of_keys + len(lengths) * (h // 8) * (d // 16))
    gathered = int((problem.candidate_ids >= 0).sum()) * d
    streamed = sum(lengths) * (d + h) + len(lengths) * d * h
    assert counters.copy_source.bytes == 2 * (gathered + tiles(C) * streamed)
    assert counters.global_store.bytes == 4 * len(lengths) * C
    assert_no_waste(counters)


def test_a_history_kept_in_shared_memory_is_read_once_per_block() -> None:
    """Four tiles of candidates in one block, a history of two tiles and item_weight in three stages."""
    L, C, d, h = 100, 256, 32, 32
    problem = scoring([L], C, d, h, dtype=torch.float16)
    gathered = int((problem.candidate_ids >= 0).sum()) * d
    for plan, times in (((3, 4), 1), ((2, 4), 4), ((2, 1), 4)):
        _, counters = scores_of(problem, checked=True, plan=plan)
        assert counters.copy_source.bytes == 2 * (gathered + times * (L * (d + h) + d * h))


@pytest.mark.parametrize("activation", ["softmax", "silu"])
@pytest.mark.parametrize("D", WIDTHS)
def test_cost_of_attention(D: int, activation: str) -> None:
    lengths, C, B = [100, 0, 64], 128, 3
    problem = attention(lengths, C, 1, D, dtype=torch.float16, activation=activation)
    _, (forward, backward) = attend(problem, grad_like_out(problem), checked=True)
    key_tiles, keys, users = sum(map(tiles, lengths)), sum(lengths), sum(length > 0 for length in lengths)
    product = WARPS * (TILE // 8) * (D // 16)  # mma of 64 x 64 x D
    assert forward.mma == 2 * product * tiles(C) * key_tiles
    assert forward.copy_source.bytes == 2 * D * (users * C + tiles(C) * 2 * keys)
    assert backward.mma == 7 * product * tiles(C) * key_tiles
    of_keys = 2 * keys + 2 * sum(tiles(length) * C for length in lengths)
    of_queries = 2 * users * C + 2 * tiles(C) * keys
    assert backward.copy_source.bytes == 2 * D * (of_keys + of_queries)
    lse, delta = (4, 4) if activation == "softmax" else (0, 0)
    assert forward.global_store.bytes == B * C * (2 * D + lse)
    assert backward.global_store.bytes == B * C * (2 * D + delta) + keys * 4 * D
    for counters in (forward, backward):
        assert_no_waste(counters)


# ---- planted bugs: each must fail one of the checks above ----

SCORES, GRADIENTS = "score_candidates", "candidate_cross_attention_backward"
ONE_KERNEL = {  # replaces the .cu file: one dtype and one width, to compile quickly
    SCORES: """
void score_candidates(const ScoreCandidates& problem, bool, int, int, void* stream, const ScorePlan* plan) {
  launch_score_candidates<float16, 16, 16>(problem, plan, stream);
}""",
    GRADIENTS: """
void candidate_cross_attention_backward(const CandidateCrossAttention& problem,
                                        const CandidateCrossAttentionGradients& gradients, bool, int, void* stream) {
  launch_candidate_cross_attention_backward<float16, 16>(problem, gradients, stream);
}""",
}
BARRIER, GATHERED = "__syncthreads();  // the stage is free", "cp_async_commit();  // older"
WAIT, SWIZZLE = "cp_async_wait<1>();", "(row / kRowsInLine % kPlaces)"
RIGHT_DW, WRONG_DW = "(logits, a, second_rows", "(logits, a, first_rows"
QUICK_BUGS = [  # expected report, kernel, and the bug: (file, text, replacement)
    ("race", SCORES, f"{SCORES}.cuh", BARRIER, "//"),
    ("in flight", GRADIENTS, f"{GRADIENTS}.cuh", WAIT, "cp_async_wait<2>();"),
]
BUGS = [  # each compiles a kernel, 2 to 5 s
    ("race", GRADIENTS, f"{GRADIENTS}.cuh", BARRIER, "//"),
    ("in flight", SCORES, f"{SCORES}.cuh", WAIT, "cp_async_wait<2>();"),
    ("in flight", SCORES, f"{SCORES}.cuh", GATHERED, "//"),
    ("out of bounds: .* read", SCORES, "tiles.cuh", "row < valid}", "row <= valid}"),
    ("out of bounds: .* write", GRADIENTS, "tiles.cuh", "row < extent", "row <= extent"),
    (r"assert (\d+) == (?!\1).*ldmatrix", SCORES, "tiles.cuh", SWIZZLE, "0"),
    (r"assert (\d+) == (?!\1).*ldmatrix", GRADIENTS, "tiles.cuh", SWIZZLE, "0"),
    ("assert .* <= ", SCORES, "tiles.cuh", "x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));", ""),
    ("assert .* <= ", GRADIENTS, f"{GRADIENTS}.cuh", RIGHT_DW, WRONG_DW),
]
PLANTED = QUICK_BUGS + [pytest.param(*bug, marks=pytest.mark.slow) for bug in BUGS]


@pytest.mark.parametrize(("found", "kernel", "file", "right", "wrong"), PLANTED)
def test_planted_bugs_are_found(found: str, kernel: str, file: str, right: str, wrong: str, tmp_path: Path) -> None:
    for source in (ROOT / "csrc" / "cuda").glob("*.*h"):
        shutil.copy(source, tmp_path)
    text = (tmp_path / file).read_text()
    assert right in text
    (tmp_path / file).write_text(text.replace(right, wrong))
    bug = tmp_path / f"{kernel}.cu"
    body = f"namespace grank::cuda {{{ONE_KERNEL[kernel]}\n}}\n"
    bug.write_text(f'// {right} -> {wrong}\n#include "{kernel}.cuh"\n{body}')
    emulation: dict[str, Any] = {"checked": True, "settings": Settings(seed=1, preempt=0.1), "instead": (bug,)}

    def look() -> None:
        if kernel == SCORES:
            problem = scoring([0, 130, 70], 130, dtype=torch.float16)
            got, counters = scores_of(problem, plan=(2, 3), **emulation)
            assert_scores_are_right(problem, got)
        else:
            attended = attention([130, 70], 70, 1, dtype=torch.float16, history="dense")
            grad_out = grad_like_out(attended)
            results, (_, counters) = attend(attended, grad_out, **emulation)
            assert_attention_is_right(attended, grad_out, results)
        assert_no_waste(counters)

    with pytest.raises(AssertionError, match=re.compile(found, re.DOTALL)):
        look()


# ---- bits ----


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_head_of_an_empty_history_is_exact_for_whole_numbers(activation: str, dtype: torch.dtype) -> None:
    """`relu` is exact for whole numbers; silu and gelu are compared within a tolerance."""
    whole = [torch.randint(-3, 4, shape).to(dtype) for shape in ((50, 64), (0, 64), (0, 32), (2, 32), (64, 32), (32,))]
    rows, keys, values, user_hidden, item_weight, out_weight = whole
    problem = Scoring(
        torch.randint(0, 50, (2, 70)), rows, keys, values, offsets_of([0, 0]), user_hidden, item_weight, out_weight,
        activation=activation,
    )  # fmt: skip
    got, exact = problem.scores("emulated"), problem.formula(torch.float64)
    if activation == "relu":
        assert_same_bits([got], [exact.float()])
    torch.testing.assert_close(got, exact.float(), rtol=2e-6, atol=2e-4)


@pytest.mark.usefixtures("quick")
def test_a_dominant_key_gets_weight_1(dtype: torch.dtype) -> None:
    """exp2(x) is 0 for x < -150: the other keys get weight 0, in every tile."""
    L, D = 200, 32
    for best in (0, 63, 64, 130, L - 1):
        k = torch.zeros(1, L, 1, D, dtype=dtype)
        k[0, best] = 16.0
        v = torch.randint(-100, 100, (1, L, 1, D)).to(dtype)
        q = torch.ones(1, 3, 1, D, dtype=dtype)
        out, lse = gk.candidate_cross_attention(q, k, v, softmax_scale=1.0, return_lse=True, backend="emulated")
        assert_same_bits([out[0, i] for i in range(3)], [v[0, best]] * 3)
        assert bool((lse == 16.0 * D).all())


# ---- the compiled module, without a GPU ----


def parameters(text: str, function: str) -> list[str]:
    """Names of a function's parameters, from C++ or a stub file."""
    found = re.search(rf"\b{function}\((.*?)\)\s*(?:->|\{{|:)", text, re.DOTALL)
    assert found is not None
    listed = re.sub(r":\s*\w+", "", found[1])
    return [re.split(r"[\s*&]+", part.strip())[-1] for part in listed.strip().rstrip(",").split(",")]


def test_stub_bindings_and_entry_points_agree() -> None:
    stub = (ROOT / "grank_kernels" / "_cuda.pyi").read_text()
    bindings = (ROOT / "csrc" / "bindings_cuda.cpp").read_text()
    entries = (ROOT / "tests" / "csrc" / "cuda_kernels.cpp").read_text()
    scores = parameters(stub, "score_candidates")
    assert scores == parameters(bindings, "score_candidates")
    assert [*scores, "stages", "tiles_per_block"] == parameters(entries, "emulated_score_candidates")
    problem = parameters(stub, "__init__")[1:]
    assert problem == parameters(bindings, "attention")
    for function in ("candidate_cross_attention", "candidate_cross_attention_backward"):
        rest = parameters(stub, function)
        assert rest == parameters(bindings, function)
        assert problem + rest[1:] == parameters(entries, f"emulated_{function}")


def test_compiled_module_accepts_the_arguments_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 0 users launches nothing, so no device is needed."""
    compiled = pytest.importorskip("grank_kernels._cuda", reason="built without nvcc")
    monkeypatch.setattr(cuda, "_stream_of", lambda device: nullcontext(0))
    problem = scoring([], 5, dtype=torch.float16, table=torch.int8)
    rows, row_scale, *_ = problem.items.operands()  # type: ignore[union-attr]
    history = (problem.keys, problem.values, problem.cu_seqlens)
    head = (problem.user_hidden, problem.item_weight, problem.out_weight)
    scores = cuda.score_candidates(
        ScoreCandidatesProblem(problem.candidate_ids, rows, row_scale, *history, *head, 0, 1, "gelu")
    )
    assert scores.shape == (0, 5)
    q = torch.zeros(0, 3, 2, 16).half()
    bias = torch.zeros(0, 3, 2)
    nobody = CandidateCrossAttentionProblem(q, q, q, softmax_scale=1, bias_k=bias)
    out, lse = cuda.candidate_cross_attention(nobody)
    grads = cuda.candidate_cross_attention_backward(q, None, nobody, out, lse)
    assert [x.shape for x in (out, lse, *grads)] == [x.shape for x in (q, bias, q, q, q, bias)]
    with pytest.raises(ValueError, match="width is 48; it takes 16, 32, 64 or 128"):
        compiled.score_candidates(*[0] * 15, 0.0, 1.0, 0, 0.0, 0.0, 0, False, 48, 16, 0)
    with pytest.raises(ValueError, match="width is 48"):
        compiled.candidate_cross_attention(compiled.CandidateCrossAttention(*[0] * 14, 1.0, 0, 0, 0), False, 48, 0)


# ---- refused arguments ----


def test_refusals() -> None:
    rows, keys, values = (torch.zeros(4, 64).half() for _ in range(3))
    q = torch.zeros(1, 4, 1, 64).half()
    assert "items are on cpu, not on a CUDA device" in str(cuda.score_candidates_unsupported(rows, keys, values))
    assert "queries are on cpu" in str(cuda.candidate_cross_attention_unsupported(q, q, q))
    with pytest.raises(ValueError, match="backend 'cuda' cannot run: queries are on cpu"):
        gk.candidate_cross_attention(q, q, q, backend="cuda")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ((torch.zeros(4, 64), torch.zeros(4, 64), torch.zeros(4, 64)), "keys are torch.float32"),
        ((torch.zeros(4, 64), torch.zeros(4, 64).half(), torch.zeros(4, 64).half()), "items are torch.float32"),
        ((torch.zeros(4, 48).half(), torch.zeros(4, 48).half(), torch.zeros(4, 64).half()), "items have width 48"),
        ((torch.zeros(4, 64).half(), torch.zeros(4, 64).half(), torch.zeros(4, 7).half()), "values have width 7"),
        ((torch.zeros(64, 64).half().T, torch.zeros(4, 64).half(), torch.zeros(4, 64).half()), "items have strides"),
    ],
)
def test_refusals_of_scores(operands: tuple[torch.Tensor, ...], reason: str) -> None:
    assert str(cuda.score_candidates_unsupported(*operands)).startswith(reason)


@pytest.mark.usefixtures("quick")
def test_refusals_of_attention() -> None:
    q = torch.zeros(1, 4, 1, 64)
    assert str(cuda.candidate_cross_attention_unsupported(q, q, q)).startswith("q is torch.float32")
    q = torch.zeros(1, 4, 1, 24).half()
    assert str(cuda.candidate_cross_attention_unsupported(q, q, q)).startswith("q has heads of width 24")
    assert cuda.candidate_cross_attention_unsupported(*[torch.zeros(1, 4, 1, 16).bfloat16()] * 3) is None


@pytest.mark.usefixtures("quick")
def test_a_table_at_an_odd_address_is_refused() -> None:
    problem = scoring([3], 4, dtype=torch.float16)
    shifted = torch.zeros(100 * 16 + 1, dtype=torch.float16)[1:].view(100, 16)
    with pytest.raises(ValueError, match="items begin at 0x"):
        problem.but(items=shifted).scores("emulated")
