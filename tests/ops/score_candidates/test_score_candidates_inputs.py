"""Inputs of score_candidates: degenerate sizes, ids, layouts, modes of torch."""

import pytest
import torch
from ranker_checks import alike, check_scores, equal_bits, strided
from ranker_oracle import scoring

import grank_kernels as gk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("B", "C", "N", "length"), [(0, 5, 9, 0), (2, 0, 9, 3), (2, 5, 9, 0), (2, 5, 0, 3), (0, 0, 0, 0)]
)
def test_degenerate(B: int, C: int, N: int, length: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([length] * B, C, N=max(N, 1), dtype=dtype)
    if N == 0:
        problem = problem.but(candidate_ids=torch.full((B, C), -1), items=problem.items[:0])
    check_scores(problem, backend)


@pytest.mark.parametrize("id", [-1, -2, torch.iinfo(torch.int64).min])
def test_negative_ids_score_minus_infinity(id: int, backend: str) -> None:
    problem = scoring([30, 0], 40)
    problem.candidate_ids[:, ::3] = id
    check_scores(problem, backend)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([65, 2], 70, 32, 16, dtype=dtype)
    problem.keys[:, 0] = size
    problem.items[:, 0] = 1
    assert check_scores(problem.but(softmax_scale=1.0), backend)[problem.candidate_ids >= 0].isfinite().all()


def test_int32_ids_and_offsets(backend: str) -> None:
    problem = scoring([30, 0, 5], 40)
    narrow = problem.but(candidate_ids=problem.candidate_ids.int(), cu_seqlens=problem.cu_seqlens.int())
    equal_bits(narrow.scores(backend), problem.scores(backend))


def test_tables_with_external_ids(dtype: torch.dtype, backend: str) -> None:
    problem = scoring([30, 0, 5], 40, dtype=dtype)
    ids = torch.randperm(10**6)[:100] * 10**12
    table = gk.ItemTable.from_rows(problem.items, ids=ids)
    external = ids[problem.candidate_ids.clamp(min=0)].where(problem.candidate_ids >= 0, -5)
    equal_bits(problem.but(items=table, candidate_ids=external).scores(backend), problem.scores(backend))


def test_layouts(dtype: torch.dtype, backend: str) -> None:
    problem = scoring([30, 0, 5], 40, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    for name, x in vars(problem).items():
        if isinstance(x, torch.Tensor):
            for layout, same in strided(x).items():
                alike(problem.but(**{name: same}).scores(backend), want, backend)
                assert torch.equal(same, x), (name, layout)  # not modified
    for name in ("keys", "values", "user_hidden", "out_weight"):
        one = vars(problem)[name][:1]
        shape = vars(problem)[name].shape
        flat = problem.but(**{name: one.expand(shape)}).scores(backend)
        alike(flat, problem.but(**{name: one.expand(shape).contiguous()}).scores(backend), backend)


def test_tensors_with_a_lazy_negation(backend: str) -> None:
    problem = scoring([30, 5], 40)
    want = problem.scores(backend)
    for name in ("items", "keys", "values", "user_hidden", "item_weight", "out_weight"):
        x = vars(problem)[name]
        equal_bits(problem.but(**{name: torch._neg_view(-x)}).scores(backend), want)


def test_global_modes_of_torch(backend: str) -> None:
    problem = scoring([30, 5], 40)
    want = problem.scores(backend)
    torch.set_default_dtype(torch.float64)
    try:
        equal_bits(problem.scores(backend), want)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        equal_bits(problem.scores(backend), want)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        equal_bits(problem.scores(backend), want)
