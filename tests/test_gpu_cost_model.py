"""The cost model's bytes, products and candidates beside those counted in runs of the kernels in the interpreter."""

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from oracle import run_python

from benchmarks.gpu_cost_model import Search, emitted, phases, report, sample_rank
from grank_kernels.backends.triton.mips_topk_plan import INTERPRETER

# Runs the launches of one search and prints, for each, the bytes that were loaded from the rows (and their scales) and
# from elsewhere, how many of the first are distinct, the multiply-adds, and, after `scan`, the counts of candidates.
COUNT = """
import json
import numpy as np
import torch
from triton.runtime import interpreter
from grank_kernels.backends.triton.mips_topk_launches import Problem, launches
from grank_kernels.backends.triton.mips_topk_plan import INTERPRETER, make_plan
from grank_kernels.quantise import quantise

B, N, d, k, dtype = {B}, {N}, {d}, {k}, {dtype}
torch.manual_seed({seed})
items, scale = torch.randn(N, d), None
queries = torch.randn(B, d)
if dtype == torch.int8:
    queries = queries.half()
    items, scale = quantise(items)
else:
    queries, items = queries.to(dtype), items.to(dtype)
rows = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (items, scale) if t is not None]
builder = type(interpreter.interpreter_builder)
load, dot = builder.create_masked_load, builder.create_dot
counts = dict()

def counted_load(self, ptrs, mask, *rest):
    addresses = ptrs.data[mask.data.astype(bool)] if mask.data.shape == ptrs.data.shape else ptrs.data
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    here = np.zeros(addresses.shape, bool)
    for begin, end in rows:
        here |= (addresses >= begin) & (addresses < end)
    counts["item_loads"] += int(here.sum()) * size
    counts["other_loads"] += int((~here).sum()) * size
    counts["touched"].append(np.unique(addresses[here]) * 8 + size)
    return load(self, ptrs, mask, *rest)

def counted_dot(self, a, b, *rest):
    counts["multiply_adds"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
    return dot(self, a, b, *rest)

builder.create_masked_load, builder.create_dot = counted_load, counted_dot
plan = make_plan(INTERPRETER, B, N, d, k, dtype, 0)
values, positions = torch.empty(B, k), torch.empty(B, k, dtype=torch.int64)
problem = Problem(queries, items, scale, None, k, None, None, None, dtype)
for launch in launches(problem, plan, INTERPRETER, values, positions):
    counts.update(item_loads=0, other_loads=0, multiply_adds=0, touched=[np.zeros(0, np.uint64)])
    launch.run()
    distinct = np.unique(np.concatenate(counts.pop("touched")))
    name, programs = launch.kernel.__name__, int(np.prod(launch.grid))
    found = dict(counts, name=name, programs=programs, item_bytes=int((distinct % 8).sum()))
    if name == "scan":
        found["emitted"] = launch.arguments["count"].tolist()
    print(json.dumps(found))
"""


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install triton")


def run(search: Search, seed: int) -> list[dict[str, Any]]:
    done = run_python(COUNT.format(**search._asdict(), seed=seed), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.parametrize(
    "search",
    [
        Search(B=20, N=3000, d=32, k=40, dtype=torch.float32),
        Search(B=17, N=1500, d=64, k=70, dtype=torch.int8),
        Search(B=3, N=600, d=300, k=80, dtype=torch.bfloat16),
        pytest.param(Search(B=5, N=2001, d=24, k=100, dtype=torch.float16), marks=pytest.mark.slow),
        pytest.param(Search(B=18, N=1000, d=16, k=5, dtype=torch.float32), marks=pytest.mark.slow),
        pytest.param(Search(B=2, N=200, d=16, k=90, dtype=torch.float16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_counts(search: Search) -> None:
    """Rows are loaded behind masks, so that bytes agree to the byte; products include the padding of tiles."""
    measured, derived = run(search, seed=0), list(phases(search, INTERPRETER))
    assert [m["name"] for m in measured] == [phase.name for phase in derived]
    for m, phase in zip(measured, derived, strict=True):
        where = f"{phase.name}: {m} beside {phase}"
        for count in ("programs", "item_loads", "item_bytes", "multiply_adds"):
            if (phase.name, count) != ("threshold", "programs"):  # which has programs for the padding of queries, too
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
    """Where the sample is larger than its groups, their r-th best maximum is a little below its r-th best row."""
    search = Search(B=1, N=4_000_000, d=128, k=5000, dtype=torch.float16)
    plan = search.plan(INTERPRETER)
    assert plan.groups < plan.sampled
    share = search.k * plan.sampled / search.N
    r = int(share + 5 * share**0.5 + 7)
    ranks = []
    for _ in range(40):
        group = torch.randperm(plan.sampled) % plan.groups  # of the rows, best first
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
    """A search for one query reads the table once, at the bandwidth of the card, and 1/64 more for the sample."""
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
    assert many["multiply_adds"] == pytest.approx(1024 * 10e6 * 128 * (1 + 1 / 64), rel=0.01)
