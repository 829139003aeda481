"""The log-sum-exp term of score_candidates, biases of keys, and scores without a head."""

import math
from typing import Any

import pytest
import torch
from ranker_checks import equal_bits, error_of
from ranker_oracle import Scoring, on, scoring

import grank_kernels as gk

INF = math.inf
HEADLESS = dict.fromkeys(("values", "user_hidden", "item_weight", "out_weight"))
TABLES = ["as keys", "int8"]
pytestmark = pytest.mark.usefixtures("one_thread")


def scores(problem: Scoring, backend: str, **more: Any) -> torch.Tensor:
    given = {name: on(backend, x) for name, x in {**vars(problem), **more}.items()}
    return gk.score_candidates(**given, backend=backend).cpu()


def problem_of(table: str, dtype: torch.dtype) -> Scoring:
    kind = torch.int8 if table == "int8" else dtype
    return scoring([70, 0, 3, 130], 70, 32, 16, dtype=dtype, table=kind)


@pytest.mark.parametrize("floor", [-INF, -1.0, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_lse_alone(table: str, bias: bool, floor: float, dtype: torch.dtype, backend: str) -> None:
    problem = problem_of(table, dtype)
    biases = torch.randn(len(problem.keys)).to(dtype) if bias else None
    got = scores(problem, backend, **HEADLESS, bias_k=biases, lse_weight=-0.7, lse_floor=floor)
    there = problem.candidate_ids >= 0
    want = 0.25 - 0.7 * problem.lse(biases, floor)
    assert (got[~there] == -INF).all()
    tolerance = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[there].double(), want[there], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("table", TABLES)
def test_lse_is_added_to_the_head(table: str, dtype: torch.dtype, backend: str) -> None:
    problem = problem_of(table, dtype)
    plain, more = scores(problem, backend), {"lse_weight": 1.5, "lse_floor": -2.0}
    term = scores(problem, backend, **HEADLESS, **more, out_bias=0.0)
    there = problem.candidate_ids >= 0
    both = scores(problem, backend, **more)
    torch.testing.assert_close(both[there], (plain + term)[there], rtol=4e-6, atol=4e-6)
    equal_bits(scores(problem, backend, lse_weight=0.0, lse_floor=5.0), plain)


def test_bias_of_keys_weighs_the_attention(dtype: torch.dtype, backend: str) -> None:
    """A key with bias log 2 counts as two; one with -inf does not count."""
    problem = scoring([30, 0, 5], 40, 32, 16, dtype=dtype)
    T = len(problem.keys)
    twice, masked = (torch.zeros(T).masked_fill(torch.arange(T) % 3 == 0, x) for x in (math.log(2), -INF))
    counts = torch.ones(T, dtype=torch.int64)
    for bias, n in ((twice, 2), (masked, 0)):
        repeats = counts.where(torch.arange(T) % 3 != 0, n)
        lengths = [int(x.sum()) for x in repeats.split([30, 0, 5])]
        again = problem.but(
            keys=problem.keys.repeat_interleave(repeats, 0), values=problem.values.repeat_interleave(repeats, 0),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        )  # fmt: skip
        want, got = scores(again, backend), scores(problem, backend, bias_k=bias)
        there = problem.candidate_ids >= 0
        assert error_of(got[there], want[there].double()) <= 20 * torch.finfo(dtype).eps * float(
            want[there].abs().max()
        )


@pytest.mark.parametrize("floor", [-INF, -2.0])
def test_user_without_keys_has_the_floor(floor: float, backend: str) -> None:
    """By an empty history, and by keys that are all masked."""
    problem = scoring([0, 20], 30)
    masked = torch.full((20,), -INF)
    got = scores(problem, backend, **HEADLESS, bias_k=masked, lse_weight=0.5, lse_floor=floor, out_bias=1.0)
    there = problem.candidate_ids >= 0
    assert (got[there] == 1 + 0.5 * floor).all()
    assert scores(problem, backend, bias_k=masked)[there].isfinite().all()


def test_nan_key_reaches_its_user_alone(backend: str) -> None:
    problem = scoring([20, 20], 30)
    want = scores(problem, backend, **HEADLESS, lse_weight=1.0)
    hurt = problem.but(keys=problem.keys.clone())
    hurt.keys[3] = math.nan
    got = scores(hurt, backend, **HEADLESS, lse_weight=1.0)
    equal_bits(got[1], want[1])
    assert got[0, problem.candidate_ids[0] >= 0].isnan().all()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("lse_weight must not be 0 without values", HEADLESS),
        ("lse_floor must be below infinity, got inf", {"lse_floor": INF}),
        ("lse_floor must be below infinity, got nan", {"lse_floor": math.nan}),
        (r"bias_k must be \(T,\) = \(25,\), got \(24,\)", {"bias_k": torch.zeros(24)}),
    ],
    ids=["no term", "floor", "floor nan", "bias shape"],
)
def test_errors_of_the_term(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        scores(scoring([20, 5]), "cpu", **changes)


def test_half_a_head() -> None:
    with pytest.raises(TypeError, match=r"user_hidden must be a torch.Tensor or an array, got NoneType"):
        scores(scoring([20, 5]), "cpu", user_hidden=None, lse_weight=1.0)
