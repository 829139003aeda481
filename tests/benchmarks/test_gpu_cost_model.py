"""The cost model's bytes, products and candidates against counts of the kernels in the interpreter."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_cost_model import Ranking, Search, emitted, phases, report, sample_rank
from benchmarks.gpus import CARDS
from grank_kernels.backends import triton
from grank_kernels.backends.triton.mips_topk_plan import INTERPRETER
from grank_kernels.table.quantise import quantise

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or not triton.INTERPRETED, reason="triton is not installed, or there is a GPU"
)


@pytest.fixture
def counts() -> Iterator[dict[str, Any]]:
    """Counters of the interpreter: bytes loaded from the tensors "rows", bytes loaded from others, products."""
    from emulation.triton_interpreter import strict
    from triton.runtime.interpreter import InterpreterBuilder

    found: dict[str, Any] = {"rows": []}

    with strict(), pytest.MonkeyPatch.context() as patch:
        load, dot = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_dot

        def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            of_rows = np.zeros(addresses.shape, bool)
            for rows, touched in zip(found["rows"], found["touched"], strict=True):
                here = (addresses >= rows.data_ptr()) & (addresses < rows.data_ptr() + rows.nbytes)
                touched[addresses[here] - rows.data_ptr()] = size
                of_rows |= here
            found["item_loads"] += int(of_rows.sum()) * size
            found["other_loads"] += int((~of_rows).sum()) * size
            return load(self, pointers, mask, *rest)

        def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            found["multiply_adds"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(self, a, b, *rest)

        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        yield found


def run(search: Search, counts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs a search; returns the counts of every launch, and the candidates per query after `scan`."""
    from grank_kernels.backends.triton.mips_topk_launches import Chunk, Problem, launches

    queries, items, scale = torch.randn(search.B, search.d), torch.randn(search.N, search.d), None
    if search.dtype == torch.int8:
        queries = queries.half()
        items, scale = quantise(items)
    else:
        queries, items = queries.to(search.dtype), items.to(search.dtype)
    counts["rows"] = [items] if scale is None else [items, scale]
    problem = Problem(queries, items, scale, None, search.k, None, None, None, search.dtype)
    answer = torch.empty(search.B, search.k), torch.empty(search.B, search.k, dtype=torch.int64)
    for launch in launches(problem, [Chunk(0, items, scale)], search.plan(INTERPRETER), INTERPRETER, *answer):
        counts |= {"item_loads": 0, "other_loads": 0, "multiply_adds": 0}
        counts["touched"] = [np.zeros(rows.nbytes, np.uint8) for rows in counts["rows"]]  # bytes read, by address
        launch.run()
        yield {
            "name": launch.kernel.__name__,
            "programs": int(np.prod(launch.grid)),
            "item_bytes": sum(int(touched.sum()) for touched in counts["touched"]),
            **{name: counts[name] for name in ("item_loads", "other_loads", "multiply_adds")},
            **({"emitted": launch.arguments["lists"].count.tolist()} if launch.kernel.__name__ == "scan" else {}),
        }


@needs_interpreter
@pytest.mark.parametrize(
    "search",
    [
        Search(B=20, N=3000, d=32, k=40, dtype=torch.float32),
        Search(B=17, N=1500, d=64, k=70, dtype=torch.int8),
        Search(B=3, N=600, d=300, k=80, dtype=torch.bfloat16),
        Search(B=5, N=2001, d=24, k=100, dtype=torch.float16),
        Search(B=18, N=1000, d=16, k=5, dtype=torch.float32),
        Search(B=2, N=200, d=16, k=90, dtype=torch.float16),
        pytest.param(Search(B=16, N=600_000, d=16, k=100, dtype=torch.float32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_counts(search: Search, counts: dict[str, Any]) -> None:
    """Row loads are masked, so the bytes agree exactly; products include the padding of tiles."""
    measured, derived = list(run(search, counts)), list(phases(search, INTERPRETER))
    assert [m["name"] for m in measured] == [phase.name for phase in derived]
    for m, phase in zip(measured, derived, strict=True):
        where = f"{phase.name}: {m} beside {phase}"
        for count in ("programs", "item_loads", "item_bytes", "multiply_adds"):
            if (phase.name, count) != (
                "threshold",
                "programs",
            ):  # also for the padding of queries
                assert m[count] == getattr(phase, count), where
        if phase.name == "sample":
            assert m["other_loads"] == phase.other_loads, where
        elif phase.name == "threshold":
            assert m["other_loads"] <= phase.other_loads, where
    if search.plan(INTERPRETER).sampled:
        (found,) = (m["emitted"] for m in measured if "emitted" in m)
        mean, deviation = emitted(search, search.plan(INTERPRETER))
        assert all(abs(one - mean) < 6 * deviation for one in found), (found, mean, deviation)
        assert abs(sum(found) / search.B - mean) < 6 * deviation / search.B**0.5


def test_rank_of_the_threshold() -> None:
    """With fewer groups than sampled rows, the r-th best group maximum is slightly below the r-th best row."""
    search = Search(B=1, N=4_000_000, d=128, k=5000, dtype=torch.float16)
    plan = search.plan(INTERPRETER)
    assert plan.groups < plan.sampled
    share = search.k * plan.sampled / search.N
    r = int(share + 5 * share**0.5 + 7)
    ranks = []
    for _ in range(40):
        group = torch.randperm(plan.sampled) % plan.groups  # group of each row, best row first
        first = torch.zeros(plan.groups, dtype=torch.long).scatter_reduce(
            0, group, torch.arange(plan.sampled), "amin", include_self=False
        )
        ranks.append(first.sort().values[r - 1].item() + 1)
    ranks = torch.tensor(ranks, dtype=torch.float64)
    expected = sample_rank(search, plan)
    assert expected > r
    assert abs(ranks.mean() - expected) < 5 * ranks.std() / len(ranks) ** 0.5


@pytest.mark.parametrize(("k", "launches"), [(10, 4), (500, 7)])
def test_report(k: int, launches: int) -> None:
    """One query: one read of the table at the card's bandwidth, and 1/64 of it for the sample."""
    made = report(Search(B=1, N=10_000_000, d=128, k=k, dtype=torch.float16))
    assert made["label"] == "derived"
    table = 10_000_000 * 128 * 2
    for name, milliseconds in {"A100": 1.26, "H100": 0.76, "H200": 0.53, "B200": 0.32}.items():
        card = made["cards"][name]
        assert card["seconds of reading and multiplying once"] * 1e3 == pytest.approx(milliseconds, rel=0.01)
        assert card["seconds of reading and multiplying once"] < card["seconds"] < 1.1e-3 * milliseconds
        assert card["launches"] == launches
        assert table < card["bytes"] < (1 if k == 10 else 1 + 1 / 64) * table + 5e6
        assert sum(card["share"].values()) == pytest.approx(1)
        assert card["share"]["collect" if k == 10 else "scan"] > 0.9


def test_large_batches_are_bound_by_products() -> None:
    few, many = (report(Search(B, 10_000_000, 128, 500, torch.float16))["cards"]["H100"] for B in (256, 1024))
    assert few["seconds of reading and multiplying once"] == pytest.approx(0.764e-3, rel=0.01)
    assert many["seconds of reading and multiplying once"] == pytest.approx(2.65e-3, rel=0.01)
    assert many["hits a tile"] == pytest.approx(500 / 10e6 * 128 * 128 * 3.6, rel=0.02)  # 3.6 k candidates
    assert many["multiply_adds"] == pytest.approx(1024 * 10e6 * 128 * (1 + 1 / 64), rel=0.01)


def test_ranking() -> None:
    """GRank's shape on an H100 is bound by products; 16 instructions per score take about as long."""
    ranking = Ranking(B=32, C=2000, L=1000, d=128, h=128)
    row = {"matrix_per_score": 4.0, "other_per_score": 12.0, "blocks_per_sm": 2}
    made = ranking.report(CARDS["H100"], row)
    assert made["label"] == "derived"
    limits = made["limits, seconds"]
    assert limits["products"] == pytest.approx(2 * 32 * 2000 * (1000 * 256 + 128 * 128) / 989e12, rel=1e-6)
    assert limits["exponentials"] == pytest.approx(16.6e-6, rel=0.01)
    assert limits["memory"] == pytest.approx(32 * (2000 * 268 + 512_000) / 3.35e12, rel=0.01)
    assert limits["issue"] == pytest.approx(32 * 2048 * 1024 * 16 / (128 * 132 * CARDS["H100"].clock))
    assert limits["cache"] == pytest.approx(made["bytes a candidate"] * 64_000 / (64 * 132 * CARDS["H100"].clock))
    assert made["last wave"] == pytest.approx(4 * 264 / 1024)
    slowest = max(limits["issue"], limits["cache"])
    assert made["share of the roofline, at most"] == pytest.approx(limits["products"] / slowest / made["last wave"])
    assert made["bytes a candidate"] > made["least bytes a candidate"] == pytest.approx(524, rel=0.01)
    slow = ranking.report(CARDS["H100"], row | {"other_per_score": 28.0})
    assert slow["share of the roofline, at most"] < 0.55 < 0.9 < made["share of the roofline, at most"]
