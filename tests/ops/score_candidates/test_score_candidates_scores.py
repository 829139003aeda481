"""Scores of score_candidates: against float64, and exact if every sum is exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranker_checks import alike, check_scores, equal_bits, whole
from ranker_oracle import FLOATS, HEAD, Scoring, backends_of, offsets_of, scoring

import grank_kernels as gk
from grank_kernels.backends import BACKENDS as BY_NAME

INF = math.inf
BACKENDS = backends_of("score_candidates")
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200]  # lengths of histories
COUNTS = [1, 2, 5, 15, 16, 17, 63, 64, 65, 100, 257]  # candidates per user
WIDTHS = [16, 32, 64, 128]


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- meaning ----


@pytest.mark.parametrize("i", range(24))
def test_error_is_at_most_twice_that_of_torch(i: int, dtype: torch.dtype, backend: str) -> None:
    """Random combinations of every length, count and width, with three users, some with an empty history."""
    lengths = [LENGTHS[(5 * i + j) % len(LENGTHS)] for j in range(3)]
    d, h = WIDTHS[i % 4], WIDTHS[(i // 4) % 4]
    problem = scoring(lengths, COUNTS[i % len(COUNTS)], d, h, dtype=dtype, activation=list(HEAD)[i % 3])
    check_scores(problem, backend)


@pytest.mark.parametrize(("d", "h"), [(1, 1), (3, 5), (24, 40), (130, 20), (20, 200), (300, 7)])
def test_other_widths(d: int, h: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([70, 0, 3], 66, d, h, dtype=dtype)
    reason = BY_NAME[backend].score_candidates_unsupported(problem.items, problem.keys, problem.values)
    if reason is None:
        check_scores(problem, backend)
    else:  # only GPU kernels have fixed widths
        assert backend == "cuda"
        with pytest.raises(ValueError, match="width"):
            problem.scores(backend)


@pytest.mark.parametrize("table", [*FLOATS, torch.int8], ids=lambda dtype: str(dtype)[6:])
def test_tables_of_another_dtype_than_the_keys(table: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    check_scores(scoring([40, 0, 7], 70, 32, 64, dtype=dtype, table=table), backend)


@pytest.mark.parametrize("activation", HEAD)
def test_scale_and_bias(activation: str, backend: str) -> None:
    problem = scoring([30, 5], 40, activation=activation)
    base = check_scores(problem, backend)
    assert not torch.equal(check_scores(problem.but(softmax_scale=0.7), backend), base)
    there = problem.candidate_ids >= 0
    moved = check_scores(problem.but(out_bias=-3), backend)
    torch.testing.assert_close(moved[there], base[there] - 3.25)


def test_default_backend(backend: str) -> None:
    problem = scoring([30, 5])
    torch.testing.assert_close(problem.scores(None), problem.scores(backend))


# ---- bits ----


@pytest.mark.parametrize("length", [0, 1, 2, 32, 64, 256])
@pytest.mark.parametrize("C", [1, 17, 65])
def test_equal_logits_average_exactly(length: int, C: int, dtype: torch.dtype, backend: str) -> None:
    """Whole numbers, and L a power of two: every sum is exact in any order."""
    B, d, h = 2, 32, 16
    problem = Scoring(
        torch.randint(-1, 50, (B, C)),
        whole(50, d).to(dtype),
        torch.zeros(B * length, d).to(dtype),
        whole(B * length, h).to(dtype),
        offsets_of([length] * B),
        whole(B, h).to(dtype),
        whole(d, h, most=1).to(dtype),
        whole(h).to(dtype),
    )
    equal_bits(problem.scores(backend), problem.formula(torch.float64).float())


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_dominant_logit_gets_weight_1(scale: float, dtype: torch.dtype, backend: str) -> None:
    """Row i of the table matches key i only. Weights may be summed with more precision than they are multiplied."""
    L, h = 64, 32
    problem = scoring([L, L], 65, L, h, N=L, dtype=dtype)
    problem = problem.but(
        items=(1000 * torch.eye(L)).to(dtype),
        keys=(torch.eye(L)).repeat(2, 1).to(dtype),
        values=whole(2 * L, h).to(dtype),
        user_hidden=whole(2, h).to(dtype),
        item_weight=torch.zeros(L, h).to(dtype),
        out_weight=whole(h).to(dtype),
        softmax_scale=scale,
    )
    ids, there = problem.candidate_ids, problem.candidate_ids >= 0
    users = torch.arange(2)[:, None]
    hidden = problem.values.float()[L * users + ids.clamp(min=0)] + problem.user_hidden.float()[:, None]
    out = problem.out_weight.float()
    error = (problem.scores(backend) - (hidden.relu() @ out + 0.25)).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * (hidden.relu() @ out.abs()))[there].all()


def test_int8_table_is_its_rows_times_their_scale(dtype: torch.dtype, backend: str) -> None:
    """127 in every row makes the scale 1, so the table stores the whole numbers unchanged."""
    rows = whole(80, 32, most=127)
    rows[:, 0] = 127
    problem = scoring([50, 0, 64], 65, 32, 16, N=80, dtype=dtype)
    problem = problem.but(keys=torch.zeros_like(problem.keys), values=torch.ones_like(problem.values))
    problem = problem.but(item_weight=whole(32, 16, most=1).to(dtype), out_weight=whole(16).to(dtype))
    problem = problem.but(user_hidden=whole(3, 16).to(dtype))
    table = gk.ItemTable.from_rows(rows, dtype=torch.int8)
    want = problem.but(items=rows).formula(torch.float64)
    got = problem.but(items=table).scores(backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)  # the average of 50 ones may be rounded


# ---- a score depends on its row and its user only ----


@pytest.mark.parametrize("table", [torch.float32, torch.int8])
def test_candidates_do_not_see_each_other(table: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([70, 0, 3, 64], 130, 32, 16, dtype=dtype, table=table)
    got = problem.scores(backend)
    order = torch.randperm(130)
    for ids, want in (
        (problem.candidate_ids[:, order], got[:, order]),
        (problem.candidate_ids[:, 5:6], got[:, 5:6]),
        (problem.candidate_ids[:, :67], got[:, :67]),
        (problem.candidate_ids[:, [7] * 40], got[:, [7] * 40]),
    ):
        again = problem.but(candidate_ids=ids).scores(backend)
        alike(again, want, backend)
    for b in range(4):
        start, stop = problem.cu_seqlens[b : b + 2].tolist()
        alone = problem.but(
            candidate_ids=problem.candidate_ids[b : b + 1],
            keys=problem.keys[start:stop],
            values=problem.values[start:stop],
            cu_seqlens=torch.tensor([0, stop - start]),
            user_hidden=problem.user_hidden[b : b + 1],
        )
        equal_bits(alone.scores(backend), got[b : b + 1])


def test_repeated_ids_score_alike(dtype: torch.dtype, backend: str) -> None:
    ids = torch.randint(0, 3, (2, 130))
    got = scoring([70, 3], 130, dtype=dtype).but(candidate_ids=ids).scores(backend)
    for b in range(2):
        for i in range(3):
            repeated = got[b, ids[b] == i]
            torch.testing.assert_close(repeated, repeated[:1].expand_as(repeated))


@pytest.mark.parametrize("b", [0, 1, 2, 3])
def test_nan_of_one_user_stays_there(b: int, dtype: torch.dtype, backend: str) -> None:
    problem = scoring([65, 17, 130, 64], 70, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    start, stop = problem.cu_seqlens[b : b + 2].tolist()
    for bad in (math.nan, INF):
        keys, values, hidden = (x.clone() for x in (problem.keys, problem.values, problem.user_hidden))
        keys[start:stop], values[start:stop], hidden[b] = bad, bad, bad
        got = problem.but(keys=keys, values=values, user_hidden=hidden).scores(backend)
        others = torch.arange(4) != b
        equal_bits(got[others], want[others])
        there = problem.candidate_ids[b] >= 0
        assert got[b, there].isnan().all() or bad == INF
        assert (got[b, ~there] == -INF).all()


def test_rows_of_no_user_are_not_read(dtype: torch.dtype, backend: str) -> None:
    """NaN rows before the first user, after the last one, and in the table."""
    problem = scoring([17, 0, 65], 70, 32, 16, dtype=dtype)
    want = problem.scores(backend)
    keys, values = (torch.cat([x[:3] * math.nan, x, x[:4] * math.nan]) for x in (problem.keys, problem.values))
    got = problem.but(keys=keys, values=values, cu_seqlens=problem.cu_seqlens + 3).scores(backend)
    equal_bits(got, want)
    used = torch.isin(torch.arange(100), problem.candidate_ids)
    rows = problem.items.masked_fill(~used[:, None], math.nan)
    equal_bits(problem.but(items=rows).scores(backend), want)
    nothing = problem.but(items=rows * math.nan, candidate_ids=torch.full((3, 70), -1))
    assert (nothing.scores(backend) == -INF).all()


def test_nan_row_scores_nan(backend: str) -> None:
    problem = scoring([17, 0], 70)
    want = problem.scores(backend)
    problem.items[7] = math.nan
    bad = problem.candidate_ids == 7
    assert bad.any()
    got = problem.scores(backend)
    assert got[bad].isnan().all()
    equal_bits(got[~bad], want[~bad])


# ---- properties ----


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_hypothesis_problems(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    widths = st.sampled_from(WIDTHS) if backend == "cuda" else st.integers(1, 140)
    dtype, table = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([*FLOATS, torch.int8]))
    problem = scoring(
        draw(st.lists(st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 300)), max_size=5)),
        draw(st.one_of(st.integers(0, 20), st.integers(60, 140))),
        draw(widths),
        draw(widths),
        draw(st.integers(1, 300)),
        dtype=dtype,
        table=table,
        activation=draw(st.sampled_from(list(HEAD))),
        softmax_scale=draw(st.sampled_from([None, 0.0, -0.5, 1e-30, 30.0])),
        out_bias=draw(st.sampled_from([0, -1.5, 1e30])),
    )
    got, exact = problem.scores(backend), problem.formula(torch.float64)
    there = problem.candidate_ids >= 0
    assert torch.equal(got == -INF, ~there)
    assert ((got.double() - exact).abs()[there] <= problem.sizes()[1][there]).all()
