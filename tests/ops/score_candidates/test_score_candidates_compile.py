"""score_candidates under torch.library.opcheck, torch.compile and torch.export."""

from typing import Any

import pytest
import torch
from ranker_checks import equal_bits
from ranker_oracle import Scoring, on, scoring

import grank_kernels as gk
from grank_kernels.ops.requests import version_of

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD: dict[str, Any] = {
    "candidate_ids": torch.tensor([[1, 2, -1]]),
    "items": torch.ones(20, 8),
    "keys": torch.ones(4, 8),
    "values": torch.ones(4, 6),
    "cu_seqlens": torch.tensor([0, 4]),
    "user_hidden": torch.ones(1, 6),
    "item_weight": torch.ones(8, 6),
    "out_weight": torch.ones(6),
}


def op_arguments(problem: Scoring, backend: str) -> tuple[Any, ...]:
    rows, row_scale, *_ = version_of(problem.items).operands()
    given = (
        problem.candidate_ids,
        rows,
        row_scale,
        *(vars(problem)[name] for name in ("keys", "values", "cu_seqlens")),
    )
    weights = (problem.user_hidden, problem.item_weight, problem.out_weight)
    return (*(on(backend, x) for x in given + weights), 0.5, None, problem.activation, None, 0.5, -1.0, backend)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param({"lengths": [5, 0, 20]}, id="plain"),
        pytest.param({"lengths": [5, 0, 20], "dtype": torch.bfloat16, "table": torch.int8}, id="int8"),
        pytest.param({"lengths": [], "C": 0, "activation": "gelu"}, id="empty"),
    ],
)
def test_opcheck(problem: dict[str, Any], backend: str) -> None:
    torch.library.opcheck(torch.ops.grank.score_candidates.default, op_arguments(scoring(**problem), backend))


def test_meta_tensors() -> None:
    """Meta tensors give shapes and dtypes without running a kernel."""
    got = gk.score_candidates(**{name: x.to("meta") for name, x in GOOD.items()})
    assert (got.shape, got.dtype, got.device.type) == ((1, 3), torch.float32, "meta")


def compiled_agrees(compiler: str, backend: str) -> None:
    torch.compiler.reset()

    def best(scale: float, *operands: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return gk.score_candidates(*operands, **more, softmax_scale=scale, backend=backend).tanh().sum(1)

    compiled = torch.compile(best, fullgraph=True, dynamic=True, backend=compiler)
    for lengths, C in (([30, 0, 5], 40), ([7, 9, 1, 0], 50), ([3, 1], 12)):
        given = vars(scoring(lengths, C).but(candidate_ids=torch.randint(0, 100, (len(lengths), C))))
        given = {name: on(backend, x) for name, x in given.items() if isinstance(x, torch.Tensor)}
        for scale in (None, 0.3):
            torch.testing.assert_close(compiled(scale, **given), best(scale, **given))


def test_compile(backend: str) -> None:
    compiled_agrees("aot_eager", backend)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by inductor
def test_compile_inductor(backend: str) -> None:
    compiled_agrees("inductor", backend)


@pytest.mark.parametrize("external", [False, True])
def test_compile_of_a_table(external: bool, backend: str) -> None:
    torch.compiler.reset()
    problem = scoring([30, 0, 5], 40)
    ids = torch.randperm(100) * (10**12 if external else 1)
    table = gk.ItemTable.from_rows(problem.items, ids=ids if external else None, dtype=torch.int8)
    candidates = ids[problem.candidate_ids.clamp(min=0)].where(problem.candidate_ids >= 0, -1)
    problem = problem.but(items=table, candidate_ids=candidates)
    compiled = torch.compile(gk.score_candidates, fullgraph=True, backend="aot_eager")
    given = {name: on(backend, x) for name, x in vars(problem).items()}
    equal_bits(compiled(**given, backend=backend).cpu(), problem.scores(backend))


def test_compile_for_export(backend: str) -> None:
    class Reranker(torch.nn.Module):
        def forward(self, candidate_ids: torch.Tensor, operands: dict[str, torch.Tensor]) -> torch.Tensor:
            return gk.score_candidates(candidate_ids, **operands, backend=backend)

    given = {name: on(backend, x) for name, x in GOOD.items()}
    ids = given.pop("candidate_ids")
    C = torch.export.Dim("C", min=2)
    shapes = {"candidate_ids": {1: C}, "operands": dict.fromkeys(given)}
    program = torch.export.export(Reranker(), (ids, given), dynamic_shapes=shapes)
    more = on(backend, torch.randint(0, 20, (1, 9)))
    torch.testing.assert_close(program.module()(more, given), Reranker()(more, given))
