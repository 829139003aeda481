"""`score_candidates` beside the torch ops that it replaces: equal operands and threads, one run.

The chain is index_select, attention, linear head: with SDPA, and on a GPU with `varlen_attn` and flash-attn (if
installed), eager, compiled and as a CUDA graph. It gets the folded operands and the histories as a dense batch, which
is not timed, without a mask if all have equal length. Scores are checked against float64 before they are timed: at
most twice the error of the eager chain in its dtype, as in the tests.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

import grank_kernels as gk
from benchmarks.measure import TURNS, measure
from benchmarks.ranker import DEVICE, Run, as_graph, check, extra_bytes

pytestmark = pytest.mark.filterwarnings("default")  # warnings of the compiler


class Shape(NamedTuple):
    B: int
    C: int
    L: int
    d: int
    h: int
    ragged: bool = False  # lengths between 1 and L, instead of L

    def __str__(self) -> str:
        lengths = f"1..{self.L}" if self.ragged else self.L
        return f"B={self.B} C={self.C} L={lengths} d={self.d} h={self.h}"

    def id(self) -> str:
        """The case's id."""
        return f"B{self.B}-C{self.C}-L{self.L}-d{self.d}-h{self.h}{'-ragged' * self.ragged}"


SHAPES = [  # GRank's own (C = 2000, L = 1000, d = 128), for one user and a batch; and a smaller one
    Shape(8, 2000, 1000, 128, 128),
    Shape(1, 2000, 1000, 128, 128),
    Shape(32, 500, 200, 64, 64),
    Shape(32, 500, 200, 64, 64, ragged=True),
]
N = 500_000


class Problem:
    """The operands of one shape in one dtype, their scores in float64 and by the eager chain."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        torch.manual_seed(0)
        B, C, L, d, h, ragged = shape
        lengths = torch.randint(1, L + 1, (B,)) if ragged else torch.full((B,), L)
        self.shape, self.dtype = shape, dtype
        self.ids = torch.randint(N, (B, C)).to(DEVICE)
        self.rows = (torch.randn(N, d) * d**-0.25).to(dtype).to(DEVICE)
        self.mask = torch.arange(L, device=DEVICE) < lengths.to(DEVICE)[:, None]
        self.keys, self.values = (torch.randn(B, L, n).to(dtype).to(DEVICE) for n in (d, h))
        self.operands = {
            "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE),
            "user_hidden": torch.randn(B, h).to(dtype).to(DEVICE),
            "item_weight": (torch.randn(d, h) * d**-0.5).to(dtype).to(DEVICE),
            "out_weight": torch.randn(h).to(dtype).to(DEVICE),
        }
        self.flat_keys, self.flat_values = self.keys[self.mask], self.values[self.mask]
        self.plain = chain(self, self.rows, attend_sdpa)()
        self.table = lru_cache(maxsize=None)(self._table)

    def _table(self, dtype: torch.dtype) -> "tuple[torch.Tensor | gk.ItemTable, torch.Tensor]":
        """A table in a dtype, and the float64 scores of its rows."""
        if dtype != torch.int8:
            return self.rows, self.scores_in_float64(self.rows[self.ids])
        table = gk.ItemTable.from_rows(self.rows.float(), dtype=torch.int8)
        return table, self.scores_in_float64(table.rows(self.ids))

    def scores_in_float64(self, candidates: torch.Tensor) -> torch.Tensor:
        cu, user_hidden, weight, out = (x.cpu() for x in self.operands.values())
        keys, values = self.flat_keys.cpu().double(), self.flat_values.cpu().double()
        scores = []
        for b, (start, stop) in enumerate(pairwise(cu.tolist())):
            e = candidates[b].cpu().double()
            a = (e @ keys[start:stop].T * self.shape.d**-0.5).softmax(1)
            hidden = a @ values[start:stop] + e @ weight.double() + user_hidden[b].double()
            scores.append(hidden.relu() @ out.double())
        return torch.stack(scores)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of candidate rows, histories and ids, read once, and scores, written once."""
        s = self.shape
        return s.B * s.C * (s.d * itemsize + 12) + len(self.flat_keys) * (s.d + s.h) * self.dtype.itemsize

    def operations(self) -> int:
        """Multiplications and additions, without one exponential per logit."""
        s = self.shape
        return 2 * s.C * (len(self.flat_keys) * (s.d + s.h) + s.B * s.h * (s.d + 1))


def ours(problem: Problem, items: "torch.Tensor | gk.ItemTable") -> Run:
    keys, values = problem.flat_keys, problem.flat_values
    return lambda: gk.score_candidates(problem.ids, items, keys, values, **problem.operands)


def chain(problem: Problem, rows: torch.Tensor, attend: Callable[[Problem, torch.Tensor], torch.Tensor]) -> Run:
    p = problem.operands

    def run() -> torch.Tensor:
        e = F.embedding(problem.ids, rows)
        hidden = attend(problem, e) + e @ p["item_weight"] + p["user_hidden"][:, None]
        return (hidden.relu() @ p["out_weight"]).float()

    return run


def attend_sdpa(problem: Problem, e: torch.Tensor) -> torch.Tensor:
    mask = problem.mask[:, None, None] if problem.shape.ragged else None
    return F.scaled_dot_product_attention(e[:, None], problem.keys[:, None], problem.values[:, None], mask)[:, 0]


def attend_varlen(problem: Problem, e: torch.Tensor) -> torch.Tensor:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    return _ragged(problem, e, varlen.varlen_attn)


def attend_flash(problem: Problem, e: torch.Tensor) -> torch.Tensor:
    flash = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    return _ragged(problem, e, flash.flash_attn_varlen_func)


def _ragged(problem: Problem, e: torch.Tensor, attention: Callable[..., torch.Tensor]) -> torch.Tensor:
    B, C, L, *_ = problem.shape
    offsets = torch.arange(0, B * C + 1, C, dtype=torch.int32, device=DEVICE), problem.operands["cu_seqlens"].int()
    keys, values = problem.flat_keys[:, None], problem.flat_values[:, None]
    return attention(e.reshape(B * C, 1, -1), keys, values, *offsets, C, L)[:, 0].reshape(B, C, -1)


class Method(NamedTuple):
    dtype: torch.dtype  # dtype of the operands
    table: torch.dtype  # dtype of the rows
    build: Callable[[Problem, Any], Run]


def methods() -> dict[str, Method]:
    """Methods by name; those with a graph, `varlen_attn` or flash-attn only on a GPU."""
    sdpa, varlen, flash = (partial(chain, attend=attend) for attend in (attend_sdpa, attend_varlen, attend_flash))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        builds: dict[str, Callable[[Problem, Any], Run]] = {"score_candidates": ours}
        if DEVICE == "cuda" or dtype != torch.float16:  # torch's float16 is slow on CPUs
            builds |= {"torch eager": sdpa, "torch compiled": lambda p, rows: torch.compile(sdpa(p, rows))}
        if DEVICE == "cuda" and dtype != torch.float32:
            builds |= {
                "score_candidates graph": lambda p, rows: as_graph(ours(p, rows)),
                "varlen_attn eager": varlen,
                "varlen_attn compiled": lambda p, rows: torch.compile(varlen(p, rows)),
                "varlen_attn graph": lambda p, rows: as_graph(varlen(p, rows)),
                "flash-attn eager": flash,
            }
        name = str(dtype).removeprefix("torch.")
        found |= {f"{build} {name}": Method(dtype, dtype, builds[build]) for build in builds}
        if dtype == torch.bfloat16:
            found["score_candidates int8 table, bfloat16"] = Method(dtype, torch.int8, ours)
    return found


METHODS = methods()


@pytest.fixture(scope="session")
def problems() -> Callable[[Shape, torch.dtype], Problem]:
    """The problems of one shape, one per dtype."""
    return lru_cache(maxsize=3)(Problem)


@pytest.fixture(scope="session")
def runs(problems: Callable[[Shape, torch.dtype], Problem]) -> Callable[[Shape, str], tuple[Run, float]]:
    """The call of a method, run and checked once, and its error."""

    def checked(shape: Shape, name: str) -> tuple[Run, float]:
        dtype, table, build = METHODS[name]
        problem = problems(shape, dtype)
        items, exact = problem.table(table)
        run = build(problem, items)
        return run, check(run(), exact, problem.plain, dtype)

    return lru_cache(maxsize=len(METHODS))(checked)


@pytest.mark.parametrize(
    ("shape", "turn", "name"),
    [
        pytest.param(shape, turn, name, id=f"{shape.id()}-{name}-{turn}")
        for shape in SHAPES
        for turn in TURNS
        for name in METHODS
    ],
)
@torch.no_grad()
def test_score_candidates(
    benchmark: Any,
    problems: Callable[[Shape, torch.dtype], Problem],
    runs: Callable[[Shape, str], tuple[Run, float]],
    shape: Shape,
    turn: int,
    name: str,
) -> None:
    dtype, table, _ = METHODS[name]
    run, error = runs(shape, name)
    problem = problems(shape, dtype)
    measure(
        benchmark,
        run,
        op="score_candidates",
        method=name,
        case=str(shape),
        dtype=str(dtype).removeprefix("torch."),
        device=DEVICE,
        nbytes=problem.nbytes(table.itemsize),
        operations=problem.operations(),
        error=error,
        **{"extra bytes": extra_bytes(run)},
    )
