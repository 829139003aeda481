"""`ShardedItemTable`: one table over the processes of a torch.distributed group, each of which has a part of the rows.

A score depends on its query and its row alone, so the best of all rows are the best of what the shards find. A search:

1. Every rank says what it was called with, or that it refuses: an all-gather of 56 bytes, under way during 2.
2. Every rank searches its shard for the k best.
3. One all-gather of the first s of them, `s = k / G + 5 sqrt(k / G) + 6` for G shards: of rows that lie at random, one
   shard has more than s of the k best with a probability below 1e-6. One merge, by (score descending, id ascending).
4. Where the last of a shard's s is among the k best, more of its rows may be. All ranks see for which queries that is,
   and exchange the rest of these lists. So the result is exact however the rows are spread.

With `scatter_queries` every rank brings queries of its own: all ranks receive all queries between 1 and 2, and in 3 an
all-to-all brings every rank the lists of its own.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch.distributed.device_mesh import DeviceMesh

from grank_kernels.common.checks import FLOATS, shape_of
from grank_kernels.distributed.ranks import Ranks, ShardError, attempt
from grank_kernels.ops.mapped_search import best_of, within
from grank_kernels.ops.mips_topk import search
from grank_kernels.ops.requests import SearchRequest
from grank_kernels.table.item_table import ItemTable

__all__ = ["ShardError", "ShardedItemTable"]

_DTYPES = (*FLOATS, torch.int8)
_MOST = (1 << 63) - 1  # what an int64 holds
Lists = tuple[torch.Tensor, torch.Tensor]  # values and ids


class ShardedItemTable:
    """The rows of all ranks of a process group as one table: `items` of `mips_topk`, which every rank calls.

    Every rank gets the result that one table of all rows gives, bit for bit. Calls are collective: all ranks of the
    group make the same ones in the same order, one at a time.

    A search sees of every shard the version that is there when its rank begins. A rank may update its shard at any
    time, if the shards have ids of their own. Searches have no gradient.
    """

    def __init__(
        self,
        local_table: ItemTable,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        scatter_queries: bool = False,
    ):
        """Joins the ranks' tables.

        Args:
            local_table: this rank's rows, any number of them, none included. Either all shards that have rows have ids
                of their own, unique over all shards (which is not checked), or none has: then the rows are numbered
                through in the order of the ranks, and take no updates.
            group: a process group, a one-dimensional mesh (`mesh["shard"]` of one of replicas and shards), or None for
                all processes. Its timeout is how long a rank waits for another.
            scatter_queries: every rank brings queries of its own, as many as it has, and gets their result. If False,
                all ranks search for the same queries.

        Raises:
            TypeError: local_table is no ItemTable.
            ValueError: there is no process group; or, on every rank, the shards differ in width, dtype or having ids.
            ShardError: another rank raised or is lost.
        """
        self._ranks = Ranks(group)
        self._table = local_table
        self._scatters = scatter_queries
        facts = self._ranks.agree("joining the shards", attempt(_facts, local_table))
        lengths, widths, dtypes, have_ids, *_ = zip(*facts, strict=True)
        _check_same("local_table: the shards' widths", widths)
        _check_same("local_table: the shards' dtypes", [_DTYPES[code] for code in dtypes])
        with_ids = [bool(has) for has, length in zip(have_ids, lengths, strict=True) if length]
        _check_same("local_table: whether the shards with rows have ids", with_ids)
        self._length: int = sum(lengths)
        self._first = None if True in with_ids else sum(lengths[: self._ranks.rank])  # number of the shard's first row

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        mmap: bool = False,
        verify: bool = True,
        scatter_queries: bool = False,
    ) -> "ShardedItemTable":
        """One saved table, of which each of G ranks takes a part: rank r the rows from N r // G to N (r + 1) // G.

        Args:
            path: of a file that `ItemTable.save` or `ItemTable.write` has written; every rank must see it.
            group: as for the constructor.
            mmap: leave the rows in the file, as for `ItemTable.load`.
            verify: compare the checksums, for which every rank reads the whole file once.
            scatter_queries: as for the constructor.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is no table, or corrupted; the message says in what.
            ShardError: another rank raised or is lost.
        """
        ranks = Ranks(group)
        part = (ranks.rank, ranks.size)
        table = ranks.together("reading the table", lambda: ItemTable.load(path, mmap=mmap, verify=verify, part=part))
        return cls(table, group=group, scatter_queries=scatter_queries)

    @property
    def local(self) -> ItemTable:
        """The shard of this rank."""
        return self._table

    @property
    def bytes_received(self) -> int:
        """From other ranks, by all searches so far."""
        return self._ranks.bytes_received

    def __len__(self) -> int:
        """Rows of all shards, as they were when they were joined."""
        return self._length

    def __repr__(self) -> str:
        ranks = self._ranks
        return f"ShardedItemTable({len(self):_} rows, of which rank {ranks.rank} of {ranks.size} has {self._table!r})"

    @property
    def num_ids(self) -> int | None:
        """Number of rows of all shards if their ids are positions; None if the shards have ids of their own."""
        return None if self._first is None else self._length

    def search(self, request: SearchRequest | Exception) -> Lists:
        """The result of `mips_topk`, without a gradient.

        Args:
            request: the validated arguments of this rank, `allow` one entry a row of this rank's shard; or the
                exception that one of them caused, which is then raised on this rank.

        Raises:
            ValueError: on every rank, if k or the queries differ; on this rank, what a sharded search cannot take.
            ShardError: another rank raised or is lost.
        """
        step, call = "comparing the arguments", attempt(self._call, request)
        agreed = self._ranks.start_agreeing(step, call.facts if isinstance(call, _Call) else call)
        if isinstance(call, _Call) and self._scatters:
            call = self._joint(call, self._compared(agreed()))
        found = attempt(self._local, call.request) if isinstance(call, _Call) else call
        calls = self._compared(agreed())
        values, ids = self._merged(found, calls)
        return (values[0], ids[0]) if isinstance(request, SearchRequest) and request.one else (values, ids)

    # ---- before the search ----

    def _call(self, request: SearchRequest | Exception) -> "_Call":
        """The request as a shard takes it."""
        if isinstance(request, Exception):
            raise request
        queries, version = request.queries, request.version
        if queries.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "queries must not require a gradient, which a search of a ShardedItemTable does not have: "
                "queries.detach(), or torch.no_grad()"
            )
        if self._scatters and request.allow is not None and request.allow.dim() != 1:
            raise ValueError(f"allow must be (n,) where each rank brings its queries, got {shape_of(request.allow)}")
        if self._first is not None and version.num_rows and version.columns.ids is not None:
            raise ValueError("items must have ids of their own to be updated, got a shard without, updated")
        return _Call(request._replace(one=False))

    def _compared(self, facts: list[list[int]]) -> list["_Facts"]:
        """What all ranks were called with, which must agree; all see the same, so all raise or none."""
        calls = [_Facts(*of_rank) for of_rank in facts]
        _check_same("k", [call.k for call in calls])
        _check_same("the queries' dtypes", [_DTYPES[call.dtype] for call in calls])
        if not self._scatters:
            _check_same("the numbers of queries", [call.num_queries for call in calls])
            if len({call.checksum for call in calls}) > 1:
                raise ValueError("queries differ between ranks; tables with scatter_queries=True take that")
        return calls

    def _joint(self, call: "_Call", calls: Sequence["_Facts"]) -> "_Call":
        """The queries of all ranks, in their order, and what each excludes."""
        queries, offsets, excluded = call.request.queries, call.request.exclude_offsets, call.request.exclude_ids
        B, d = queries.shape
        if offsets is None or excluded is None:
            offsets, excluded = torch.zeros(B + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        parts = [offsets, excluded, _words(queries)]
        longest = max(of.num_queries + 1 + of.num_excluded + _num_words(of.num_queries, queries) for of in calls)
        message = torch.cat([x.to(self._ranks.device) for x in parts])
        gathered = self._ranks.gather("sharing the queries", F.pad(message, (0, longest - len(message))))
        joint_queries, joint_offsets, joint_excluded, before = [], [], [], 0
        for of, received in zip(calls, gathered.to(queries.device), strict=True):
            lengths = [of.num_queries + 1, of.num_excluded, _num_words(of.num_queries, queries)]
            offsets, excluded, words, _ = received.split([*lengths, longest - sum(lengths)])
            numbers = words.view(queries.dtype)[: of.num_queries * d]
            joint_queries.append(numbers.view(of.num_queries, d))
            joint_offsets.append(offsets[:-1].clamp(0, of.num_excluded) + before)
            joint_excluded.append(excluded)
            before += of.num_excluded
        ends = torch.cat([*joint_offsets, offsets.new_tensor([before])])
        joint = call.request._replace(queries=torch.cat(joint_queries), exclude_offsets=None, exclude_ids=None)
        if before:
            joint = joint._replace(exclude_offsets=ends, exclude_ids=torch.cat(joint_excluded))
        return _Call(joint)

    # ---- the search and after it ----

    def _local(self, request: SearchRequest) -> Lists:
        """The best of this shard, as many as it may have."""
        n, first, excluded = request.version.num_rows, self._first, request.exclude_ids
        if excluded is not None and first is not None:
            excluded = within(excluded, slice(first, first + n))
        values, ids, _ = search(request._replace(k=min(request.k, max(n, 1)), exclude_ids=excluded))
        return values, ids if first is None else torch.where(ids >= 0, ids + first, -1)

    def _merged(self, found: Lists | Exception, calls: Sequence["_Facts"]) -> Lists:
        """The best of all shards, or the exception that is on any rank."""
        counts = [call.num_queries for call in calls] if self._scatters else [calls[0].num_queries]
        error = None
        if isinstance(found, Exception):
            error, nothing = found, torch.empty(sum(counts), 0)
            found = nothing, nothing.long()
        k = calls[0].k
        kept = min(k, sum(call.num_rows for call in calls))
        short = short_list(kept, self._ranks.size)
        values, ids = self._exchanged(_columns(found, 0, short), counts, error)
        top = merge(values, ids, kept)
        if short < kept:
            self._complete(top, (values, ids), _columns(found, short, kept), counts)
        return _columns(top, 0, k)

    def _exchanged(self, lists: Lists, counts: list[int], error: Exception | None = None) -> Lists:
        """Of every query of this rank the lists of all shards, (B, G s) each."""
        values, ids = lists
        step, failed = "exchanging results", error is not None
        by_rank = zip(torch.split(values, counts), torch.split(ids, counts), strict=True)
        messages = [_packed(*of_rank, failed) for of_rank in by_rank]
        received = self._ranks.deliver(step, messages) if self._scatters else self._ranks.gather(step, messages[0])
        self._ranks.check("searching", received[:, 0].tolist(), error)
        B = counts[self._ranks.rank if self._scatters else 0]
        return _unpacked(received.to(values.device), B, values.shape[1])

    def _complete(self, top: Lists, first: Lists, rest: Lists, counts: list[int]) -> None:
        """Puts in order, within `top`, the queries for which `rest` may hold rows that belong there."""
        (values, ids), (best_values, best_ids) = first, top
        s = values.shape[1] // self._ranks.size
        last_value, last_id = values[:, s - 1 :: s], ids[:, s - 1 :: s]
        kth_value, kth_id = best_values[:, -1:], best_ids[:, -1:]
        reached = (last_value > kth_value) | ((last_value == kth_value) & ((last_id <= kth_id) | (kth_id < 0)))
        own = ((last_id >= 0) & reached).any(1)
        masks = [own]
        if self._scatters:
            padded = F.pad(own.to(torch.uint8), (0, max(counts) - len(own)))
            gathered = self._ranks.gather("completing lists", padded).to(own.device).bool()
            masks = [mask[:count] for mask, count in zip(gathered, counts, strict=True)]
        everybodys = torch.cat(masks)
        if bool(everybodys.any()):
            lists = rest[0][everybodys], rest[1][everybodys]
            more_values, more_ids = self._exchanged(lists, [int(mask.sum()) for mask in masks])
            best_values[own], best_ids[own] = merge(
                torch.cat([values[own], more_values], 1), torch.cat([ids[own], more_ids], 1), best_values.shape[1]
            )


class _Facts(NamedTuple):
    """What a rank was called with, in numbers.

    Attributes:
        num_rows: of its shard.
        num_queries: that it brings.
        k: as it was called.
        dtype: of the queries, an index into `_DTYPES`.
        checksum: of the queries; 0 on a GPU, for which one would have to wait.
        num_excluded: ids, of all its queries.
    """

    num_rows: int
    num_queries: int
    k: int
    dtype: int
    checksum: int
    num_excluded: int


@dataclass
class _Call:
    """A request, of one rank or of all of them, and the facts that the other ranks receive."""

    request: SearchRequest

    def __post_init__(self) -> None:
        """Computes the facts."""
        queries, excluded = self.request.queries, self.request.exclude_ids
        checksum = xxhash.xxh3_64_intdigest(_bytes(queries).numpy().data) & _MOST if queries.is_cpu else 0
        code, num_excluded = _DTYPES.index(queries.dtype), 0 if excluded is None else len(excluded)
        self.facts = _Facts(self.request.version.num_rows, len(queries), self.request.k, code, checksum, num_excluded)


def short_list(k: int, num_shards: int) -> int:
    """How many of its best a shard sends at first: k / G of the k best are expected there, not 5 deviations more."""
    expected = k / num_shards
    return min(k, math.ceil(expected + 5 * math.sqrt(expected) + 6))


def merge(values: torch.Tensor, ids: torch.Tensor, k: int) -> Lists:
    """`best_of`, with one sort instead of two for queries of which no two scores are equal.

    A stable sort by score is the right order if ids ascend wherever scores are equal; where they do not, both sort.
    """
    by_value, order = values.sort(dim=1, descending=True, stable=True)
    by_value_ids = ids.gather(1, order)
    ranks = by_value_ids.where(by_value_ids >= 0, _MOST)  # what is none comes last
    wrong = ((by_value[:, 1:] == by_value[:, :-1]) & (ranks[:, 1:] < ranks[:, :-1])).any(1)
    top_values, top_ids = by_value[:, :k].contiguous(), by_value_ids[:, :k].contiguous()
    if bool(wrong.any()):
        top_values[wrong], top_ids[wrong] = best_of(values[wrong], ids[wrong], k)
    return top_values, top_ids


def _facts(table: Any) -> tuple[int, int, int, int]:
    """Of a shard: rows, width, dtype, whether it has ids."""
    if not isinstance(table, ItemTable):
        raise TypeError(f"local_table must be an ItemTable, got {type(table).__name__}")
    return len(table), table.dim, _DTYPES.index(table.dtype), int(table.operands()[2] is not None)


def _check_same(what: str, by_rank: Sequence[object]) -> None:
    if len(set(by_rank)) > 1:
        raise ValueError(f"{what} must be the same on all ranks, got by rank {list(by_rank)}")


def _columns(lists: Lists, begin: int, end: int) -> Lists:
    """Places of every list, those that it does not have being -infinity and -1."""
    values, ids = (x[:, begin:end] for x in lists)
    missing = (0, end - begin - values.shape[1])
    return F.pad(values, missing, value=-torch.inf), F.pad(ids, missing, value=-1)


def _packed(values: torch.Tensor, ids: torch.Tensor, failed: bool) -> torch.Tensor:
    """Lists (B, s) in one message of int64."""
    return torch.cat([ids.new_tensor([failed]), ids.reshape(-1), _words(values)])


def _unpacked(messages: torch.Tensor, B: int, s: int) -> Lists:
    """The lists of G messages, (B, G s) each."""
    G = len(messages)
    ids, values = messages[:, 1 : 1 + B * s], messages[:, 1 + B * s :].view(torch.float32)[:, : B * s]
    values, ids = (x.reshape(G, B, s).transpose(0, 1).reshape(B, G * s) for x in (values, ids))
    return values, ids


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _words(x: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as int64, filled up with zeros."""
    data = _bytes(x)
    return F.pad(data, (0, -len(data) % 8)).view(torch.int64)


def _num_words(num_queries: int, queries: torch.Tensor) -> int:
    """Words that as many queries of this width and dtype take."""
    return -(-num_queries * queries.shape[1] * queries.itemsize // 8)
