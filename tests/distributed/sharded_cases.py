"""Cases of `test_sharded.py`, run by a process on every rank: each compares shards with one table.

    python tests/sharded_cases.py RANK WORLD_SIZE STORE RESULTS

RESULTS.RANK receives {name of the case: "" or its traceback}. Random numbers are the same on all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launches import Case, run_cases
from oracle import KINDS, assert_same, integers
from torch.distributed.device_mesh import init_device_mesh

import grank_kernels as gk
from benchmarks.sharded_model import received as bytes_received
from grank_kernels.distributed.sharded_table import ShardError, short_list

CASES: dict[str, Case] = {}


def case(run: Case) -> Case:
    CASES[run.__name__] = run
    return run


def parts(n: int, world: int) -> list[slice]:
    """Random parts of the rows, some of them empty."""
    cuts = [0, *sorted(torch.randint(0, n + 1, (world - 1,)).tolist()), n]
    return [slice(*ends) for ends in pairwise(cuts)]


def tables(
    rows: torch.Tensor,
    of_ranks: list[slice],
    ids: torch.Tensor | None = None,
    scatter_queries: bool = False,
    **options: Any,
) -> tuple[gk.ItemTable, gk.ShardedItemTable]:
    """A table, and the same rows in shards."""
    mine = of_ranks[dist.get_rank()]
    local = gk.ItemTable.from_rows(rows[mine], ids=None if ids is None else ids[mine], **options)
    sharded = gk.ShardedItemTable(local, scatter_queries=scatter_queries)
    return gk.ItemTable.from_rows(rows, ids=ids, **options), sharded


@contextmanager
def raises(kind: type[Exception], *texts: str) -> Iterator[None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.type is kind
    assert all(text in str(raised.value) for text in texts), str(raised.value)


# ---- the same bits as one table ----


@case
def same_bits(rank: int, world: int, folder: Path) -> None:
    options: list[dict[str, Any]] = [{"dtype": getattr(torch, kind)} for kind in KINDS]
    options.append({"dtype": torch.float32, "coarse": torch.int8})
    for turn in range(40):
        n, d, k, B = (int(torch.randint(0, most, ())) for most in (400, 20, 300, 5))
        with_ids, ties = bool(turn % 2), bool(turn % 3)
        rows, queries = (integers(m, d).float() if ties else torch.randn(m, d) for m in (n, B))
        ids = torch.randperm(9 * n)[:n] if with_ids else None
        shards = parts(n, world)
        one, sharded = tables(rows, shards, ids, **options[turn % 5])
        assert len(sharded) == n
        seen = one.ids[torch.randint(0, max(n, 1), (B, 7))] if n else torch.full((B, 7), -1)
        filters: list[dict[str, Any]] = [{}, {"exclude": seen}, {"allow": torch.rand(n) < 0.4}]
        filters.append({"allow": torch.rand(B, n) < 0.4, "exclude": (torch.arange(B + 1) * 7, seen.reshape(-1))})
        for given in filters:
            mine = {name: x[..., shards[rank]] if name == "allow" else x for name, x in given.items()}
            got, want = gk.mips_topk(queries, sharded, k + 1, **mine), gk.mips_topk(queries, one, k + 1, **given)
            assert_same(got, want, f"turn {turn}: n={n} d={d} k={k + 1} B={B} {shards} {list(given)}")


@case
def infinities_nan_and_zeros(rank: int, world: int, folder: Path) -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45])
    for _ in range(10):
        rows = torch.randn(50, 3)
        rows.view(-1)[torch.randint(0, 150, (30,))] = special[torch.randint(0, 6, (30,))]
        one, sharded = tables(rows, parts(50, world), torch.randperm(50))
        for k in (1, 20, 60):
            queries = torch.randn(4, 3)
            assert_same(gk.mips_topk(queries, sharded, k), gk.mips_topk(queries, one, k))


@case
def one_query_and_out(rank: int, world: int, folder: Path) -> None:
    one, sharded = tables(torch.randn(90, 4), parts(90, world))
    query, seen = torch.randn(4), torch.tensor([3, 80, -1])
    assert_same(gk.mips_topk(query, sharded, 9, exclude=seen), gk.mips_topk(query, one, 9, exclude=seen))
    out = torch.empty(9), torch.empty(9, dtype=torch.int64)
    gk.mips_topk(query, sharded, 9, out=out)
    assert_same(gk.TopK(*out), gk.mips_topk(query, one, 9))


@case
def each_rank_its_queries(rank: int, world: int, folder: Path) -> None:
    for turn in range(16):
        n, d = (int(torch.randint(0, most, ())) for most in (300, 9))
        shards, k = parts(n, world), 1 + turn * 13
        ids = torch.randperm(9 * n)[:n] if turn % 2 else None
        one, sharded = tables(integers(n, d).float(), shards, ids, scatter_queries=True)
        allow = torch.rand(n) < 0.5
        counts = torch.randint(0, 4, (world,)).tolist()
        dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
        queries = torch.split(integers(sum(counts), d).to(dtype), counts)[rank]
        given: dict[str, Any] = {}
        if n and (turn + rank) % 3:  # one rank in three excludes nothing
            random = torch.Generator().manual_seed(world * turn + rank)
            given["exclude"] = one.ids[torch.randint(0, n, (len(queries), turn), generator=random)]
        want = gk.mips_topk(queries, one, k, allow=allow, **given)
        assert_same(gk.mips_topk(queries, sharded, k, allow=allow[shards[rank]], **given), want, f"turn {turn}")
    query = torch.randn(world, d)[rank]
    assert_same(gk.mips_topk(query, sharded, 5), gk.mips_topk(query, one, 5))


# ---- network traffic ----


def received(sharded: gk.ShardedItemTable, *search: Any) -> tuple[gk.TopK, int]:
    before = sharded.bytes_received
    top = gk.mips_topk(search[0], sharded, *search[1:])
    return top, sharded.bytes_received - before


@case
def short_lists_suffice_for_rows_at_random(rank: int, world: int, folder: Path) -> None:
    n, B, k = 1000 * world, 3, 600
    one, sharded = tables(torch.randn(n, 8), [slice(n * r // world, n * (r + 1) // world) for r in range(world)])
    queries = torch.randn(B, 8)
    top, nbytes = received(sharded, queries, k)
    assert_same(top, gk.mips_topk(queries, one, k))
    assert short_list(k, world) < k
    assert nbytes == bytes_received(B, k, world)


@case
def lists_are_completed_where_rows_are_sorted(rank: int, world: int, folder: Path) -> None:
    n, k = 400 * world, 300
    rows = torch.randn(n, 1)
    rows[:, 0] = rows[:, 0].sort(descending=True).values  # the best of a positive query are all on rank 0
    of_ranks = [slice(n * r // world, n * (r + 1) // world) for r in range(world)]
    for scatter_queries in (False, True):
        one, sharded = tables(rows, of_ranks, torch.randperm(n), scatter_queries)
        spread = torch.zeros(1, 1)  # equal scores: smaller ids first, on whatever rank
        queries = torch.cat([torch.rand(2, 1), spread, torch.rand(rank if scatter_queries else 1, 1)])
        top, nbytes = received(sharded, queries, k)
        assert_same(top, gk.mips_topk(queries, one, k))
        if not scatter_queries:
            assert nbytes == bytes_received(4, k, world, completed=3)  # without the query with equal scores
        complete, sharded._complete = sharded._complete, lambda *_: None  # checks that the case needs a second exchange
        with raises(AssertionError, "places differ"):
            assert_same(gk.mips_topk(queries, sharded, k), gk.mips_topk(queries, one, k))
        sharded._complete = complete


# ---- errors: on all ranks or on none ----


@case
def an_argument_is_wrong_on_one_rank(rank: int, world: int, folder: Path) -> None:
    queries = torch.randn(2, 4)
    outside = torch.tensor([[60], [-1]])
    wrong: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
        (TypeError, "queries must be a torch.Tensor", (None, 3), {}),
        (
            ValueError,
            "queries must have the items' width, 4, as last dimension, got",
            (torch.randn(2, 5), 3),
            {},
        ),
        (ValueError, "k must be 1 or more", (queries, 0), {}),
        (TypeError, "k must be an int", (queries, 2.5), {}),
        (ValueError, "k must be below 2^63, got 9223372036854775808", (queries, 1 << 63), {}),
        (ValueError, "queries must not require a gradient", (queries.clone().requires_grad_(), 3), {}),
        (ValueError, "exclude must hold ids in [-1, 60), -1 for none, got 60", (queries, 3), {"exclude": outside}),
        (
            ValueError,
            "exclude must be (2, E) for 2 queries",
            (queries, 3),
            {"exclude": torch.tensor([[1]])},
        ),
        (ValueError, "allow must be (", (queries, 3), {"allow": torch.ones(2, 1000, dtype=torch.bool)}),
        (ValueError, "backend must be None, ", (queries, 3), {"backend": "gpu"}),
    ]
    for scatter_queries in (False, True):
        one, sharded = tables(torch.randn(60, 4), parts(60, world), scatter_queries=scatter_queries)
        for at in (0, world - 1):
            for kind, text, arguments, more in wrong:
                if rank == at:
                    with raises(kind, text):
                        gk.mips_topk(arguments[0], sharded, arguments[1], **more)
                else:
                    with raises(ShardError, f"rank {rank} of {world}", f"rank {at} raised {kind.__name__}: {text}"):
                        gk.mips_topk(queries, sharded, 3)
                assert_same(gk.mips_topk(queries, sharded, 3), gk.mips_topk(queries, one, 3), "the group goes on")


@case
def ranks_call_with_different_arguments(rank: int, world: int, folder: Path) -> None:
    _, sharded = tables(torch.randn(60, 4), parts(60, world))
    queries = torch.randn(3, 4)
    with raises(ValueError, "k must be the same on all ranks, got by rank [5, "):
        gk.mips_topk(queries, sharded, 5 + rank)
    with raises(ValueError, "numbers of queries must be the same"):
        gk.mips_topk(queries[: 1 + rank % 2], sharded, 5)
    with raises(ValueError, "queries must be the same on all ranks, or the table made with scatter_queries=True"):
        gk.mips_topk(queries + rank, sharded, 5)
    with raises(ValueError, "dtypes must be the same"):
        gk.mips_topk(queries.half() if rank else queries, sharded, 5)


@case
def filters_differ(rank: int, world: int, folder: Path) -> None:
    one, sharded = tables(torch.randn(60, 4), parts(60, world))
    queries, best = torch.randn(3, 4), torch.arange(6).repeat(3, 1)
    with raises(ValueError, "exclude's numbers of ids must be the same on all ranks, got by rank [0, 18"):
        gk.mips_topk(queries, sharded, 5, exclude=best if rank else None)
    with raises(ValueError, "exclude must be the same on all ranks, got different ids"):
        gk.mips_topk(queries, sharded, 5, exclude=best + rank)
    with raises(ValueError, "whether allow is given must be the same on all ranks, got by rank [False, True"):
        gk.mips_topk(queries, sharded, 5, allow=torch.ones(len(sharded.local), dtype=torch.bool) if rank else None)
    with raises(ValueError, "backend must be the same on all ranks, got by rank ['reference', 'cpu'"):
        gk.mips_topk(queries, sharded, 5, backend="cpu" if rank else "reference")
    assert_same(gk.mips_topk(queries, sharded, 5), gk.mips_topk(queries, one, 5), "the group goes on")


@case
def ranks_make_different_calls(rank: int, world: int, folder: Path) -> None:
    one, sharded = tables(torch.randn(60, 4), parts(60, world))
    _, other = tables(torch.randn(60, 4), parts(60, world))
    queries = torch.randn(3, 4)
    with raises(ValueError, "items must be the same table on all ranks"):
        gk.mips_topk(queries, other if rank else sharded, 5)
    with raises(ShardError, "ranks must make the same calls", "['comparing the arguments', 'joining the shards'"):
        gk.ShardedItemTable(sharded.local) if rank else gk.mips_topk(queries, sharded, 5)
    with raises(ValueError, "scatter_queries must be the same on all ranks, got by rank [False, True"):
        gk.ShardedItemTable(sharded.local, scatter_queries=rank > 0)
    assert_same(gk.mips_topk(queries, sharded, 5), gk.mips_topk(queries, one, 5), "the group goes on")


@case
def subnormal_scores_are_ordered(rank: int, world: int, folder: Path) -> None:
    """Even if the process flushes subnormal numbers to 0."""
    n = 40 * world
    one, sharded = tables(torch.randperm(n)[:, None] * 1e-44, parts(n, world))
    torch.set_flush_denormal(True)
    try:
        assert_same(gk.mips_topk(torch.ones(1, 1), sharded, 30), gk.mips_topk(torch.ones(1, 1), one, 30))
    finally:
        torch.set_flush_denormal(False)


@case
def masks_by_id(rank: int, world: int, folder: Path) -> None:
    rows, ids = torch.randn(80, 4), torch.arange(80) * 3
    shards = parts(80, world)
    one, sharded = tables(rows, shards, ids)
    mask, gone = sharded.local.mask(ids[::2]), [ids[shard][:1] for shard in shards]
    sharded.local.remove(gone[rank])
    one.remove(torch.cat(gone))
    got = gk.mips_topk(torch.ones(2, 4), sharded, 50, allow=mask)
    assert_same(got, gk.mips_topk(torch.ones(2, 4), one, 50, allow=one.mask(ids[::2])))


@case
def shards_do_not_fit(rank: int, world: int, folder: Path) -> None:
    rows = torch.randn(5, 4)
    last = rank == world - 1
    with raises(ValueError, "widths must be the same"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(rows[:, :3] if last else rows))
    with raises(ValueError, "dtypes must be the same"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(rows, dtype=torch.int8 if last else None))
    with raises(ValueError, "have ids must be the same"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(rows, ids=torch.arange(5) if last else None))
    with raises(TypeError if last else ShardError, "local_table must be an ItemTable, got Tensor"):
        gk.ShardedItemTable(rows if last else gk.ItemTable.from_rows(rows))  # type: ignore[arg-type]
    with raises(TypeError, "group must be a ProcessGroup"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(rows), group="all")  # type: ignore[arg-type]
    empty = gk.ItemTable.from_rows(rows[:0])  # has no ids to miss
    assert len(gk.ShardedItemTable(empty if last else gk.ItemTable.from_rows(rows, ids=torch.arange(5)))) == 5 * (
        world - 1
    )


# ---- updates, files, meshes ----


@case
def shards_are_updated(rank: int, world: int, folder: Path) -> None:
    rows, ids = torch.randn(80, 4), torch.randperm(500)[:80]
    shards = parts(80, world)
    one, sharded = tables(rows, shards, ids)
    queries, changed = torch.randn(3, 4), torch.randn(10, 4)
    one.remove(ids[20:30])
    one.upsert(ids[:10], changed)
    mine = torch.arange(80)[shards[rank]]
    sharded.local.remove(ids[mine[(mine >= 20) & (mine < 30)]])
    sharded.local.upsert(ids[mine[mine < 10]], changed[mine[mine < 10]])
    assert_same(gk.mips_topk(queries, sharded, 75), gk.mips_topk(queries, one, 75))
    _, numbered = tables(rows, [slice(80 * r // world, 80 * (r + 1) // world) for r in range(world)])
    if rank == world - 1:
        numbered.local.upsert(torch.tensor([0]), rows[:1])
    with raises(ValueError if rank == world - 1 else ShardError, "items must have ids of their own to be updated"):
        gk.mips_topk(queries, numbered, 3)


@case
def a_saved_table_is_loaded_in_parts(rank: int, world: int, folder: Path) -> None:
    rows, queries = torch.randn(101, 6), torch.randn(3, 6)
    for turn, with_ids in enumerate((False, True)):
        for options in ({}, {"dtype": torch.int8}, {"coarse": torch.int8}):
            one = gk.ItemTable.from_rows(rows, ids=torch.randperm(400)[:101] if with_ids else None, **options)
            path = folder / f"table{turn}{len(options)}"
            if rank == 0:
                one.save(path)
            dist.barrier()
            for mmap in (False, True):
                sharded = gk.ShardedItemTable.load(path, mmap=mmap, verify=not mmap)
                assert len(sharded.local) == 101 * (rank + 1) // world - 101 * rank // world
                assert_same(gk.mips_topk(queries, sharded, 30), gk.mips_topk(queries, one, 30))
            dist.barrier()
    missing = folder / "none"
    with raises(FileNotFoundError if rank else ShardError, "No such file"):
        gk.ShardedItemTable.load(missing if rank else path)


@case
def replicas_of_shards(rank: int, world: int, folder: Path) -> None:
    shards = 2 if world % 2 == 0 else world
    mesh = init_device_mesh("cpu", (world // shards, shards), mesh_dim_names=("replica", "shard"))
    rows, which = torch.randn(70, 4), mesh.get_local_rank("shard")
    one = gk.ItemTable.from_rows(rows)
    local = gk.ItemTable.from_rows(rows[70 * which // shards : 70 * (which + 1) // shards])
    sharded = gk.ShardedItemTable(local, group=mesh["shard"])
    queries = torch.randn(world // shards, 2, 4)[mesh.get_local_rank("replica")]  # each replica has its own queries
    assert_same(gk.mips_topk(queries, sharded, 20), gk.mips_topk(queries, one, 20))
    group = gk.ShardedItemTable(local, group=mesh.get_group("shard"))
    assert_same(gk.mips_topk(queries, group, 20), gk.mips_topk(queries, one, 20))


@case
def no_gradient_where_none_is_asked_for(rank: int, world: int, folder: Path) -> None:
    one, sharded = tables(torch.randn(40, 4), parts(40, world))
    queries = torch.randn(2, 4, requires_grad=True)
    with torch.no_grad():
        assert_same(gk.mips_topk(queries, sharded, 7), gk.mips_topk(queries, one, 7))
    assert f"rank {rank} of {world}" in repr(sharded)


if __name__ == "__main__":
    run_cases(CASES)
