"""`ShardedItemTable`: one table in shards, one on every rank of a torch.distributed group.

A score depends on its query and its row alone, so the best rows of the table are among the best of the shards.
A search:

1. All ranks exchange the facts of their call, or the error that an argument caused: an all-gather of 56 bytes,
   concurrent with step 2. Arguments must agree.
2. Every rank searches its shard for the k best.
3. One all-gather of the first s results, `s = k / G + 5 sqrt(k / G) + 6` for G shards, and one merge by (score
   descending, id ascending). If rows are spread at random, a shard has more than s of the k best with a probability
   below 1e-6.
4. If a shard's s-th row is in the merged top k, its rows s + 1, ... may be too. All ranks see for which queries, and
   exchange the rest of these lists. So the result is exact however the rows are spread.

With `scatter_queries` every rank brings its own queries: all ranks receive all queries between steps 1 and 2, and in
step 3 an all-to-all brings every rank the lists of its queries.
"""

import math
import os
import secrets
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch.distributed.device_mesh import DeviceMesh

from grank_kernels.backends import BACKENDS
from grank_kernels.common.checks import FLOATS, shape_of
from grank_kernels.distributed.ranks import FACTS, Ranks, ShardError, attempt
from grank_kernels.ops.mapped_search import best_of, order_key, within
from grank_kernels.ops.mips_topk import search
from grank_kernels.ops.requests import SearchRequest
from grank_kernels.table.item_table import ItemTable

__all__ = ["ShardError", "ShardedItemTable"]

_DTYPES = (*FLOATS, torch.int8)
_BACKENDS = tuple(BACKENDS)
_LAST = (1 << 63) - 1  # above all ids
Lists = tuple[torch.Tensor, torch.Tensor]  # values and ids


class ShardedItemTable:
    """One table in shards on the ranks of a process group: `items` of `mips_topk`, which every rank calls.

    Every rank gets the result of one table of all rows, bit for bit. Calls are collective: all ranks of the group make
    the same calls in the same order, one at a time.

    A search sees the version of each shard that is current when its rank starts. A rank may update its shard at any
    time if the shards have ids. Searches have no gradient.
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
            local_table: the shard of this rank, which may be empty. Either all shards with rows have ids, unique over
                all shards (which is not checked), or none has: then rows are numbered in the order of the ranks, and
                take no updates.
            group: a process group, a one-dimensional mesh (`mesh["shard"]` of a mesh of replicas and shards), or None
                for all processes. Its timeout is how long a rank waits for another.
            scatter_queries: every rank brings its own queries, any number of them, and gets their result. If False, all
                ranks search for the same queries.

        Raises:
            TypeError: local_table is not an ItemTable.
            ValueError: there is no process group; or, on every rank, `scatter_queries`, or the shards' widths, dtypes
                or having ids, differ.
            ShardError: another rank raised, is lost, or makes another call.
        """
        self._ranks = Ranks(group)
        self._table = local_table
        self._scatters = scatter_queries
        facts = self._ranks.agree("joining the shards", attempt(_facts, local_table, scatter_queries))
        lengths, widths, dtypes, have_ids, scatters, numbers = zip(*facts, strict=True)
        _check_same("local_table's widths", widths)
        _check_same("local_table's dtypes", [_DTYPES[code] for code in dtypes])
        _check_same("scatter_queries", list(map(bool, scatters)))
        with_ids = [bool(has) for has, length in zip(have_ids, lengths, strict=True) if length]
        _check_same("whether shards with rows have ids", with_ids)
        self._number: int = numbers[0]  # of rank 0, at random: by it ranks see that they search the same table
        self._length: int = sum(lengths)
        self._first = None if True in with_ids else sum(lengths[: self._ranks.rank])  # the shard's first id

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
        """Loads a saved table, of N rows, in shards: rank r of G takes the rows N r // G to N (r + 1) // G.

        Args:
            path: a file of `ItemTable.save` or `ItemTable.write`, which every rank can read.
            group: as for the constructor.
            mmap: leave the rows in the file, as for `ItemTable.load`.
            verify: compare the checksums; every rank reads the whole file once.
            scatter_queries: as for the constructor.

        Raises:
            OSError: the file does not exist or cannot be read.
            ValueError: the file is not a table, or corrupted; the message says why.
            ShardError: another rank raised, is lost, or makes another call.
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
        """Bytes received from other ranks by all searches."""
        return self._ranks.bytes_received

    def __len__(self) -> int:
        """Number of rows of all shards at the time they were joined."""
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
            request: the validated arguments of this rank, of which `allow` is by position of this rank's shard; or the
                exception that an argument caused, which is raised.

        Raises:
            ValueError: on every rank, if `items`, `k`, `queries`, `exclude`, `allow` being given, or the backend
                differ; on this rank, if a sharded search does not support an argument.
            ShardError: another rank raised, is lost, or makes another call.
        """
        step, call = "comparing the arguments", attempt(self._call, request)
        agreed = self._ranks.start_agreeing(step, call.facts.packed() if isinstance(call, _Call) else call)
        if isinstance(call, _Call):
            joint = self._joint(call.request, self._compared(agreed())) if self._scatters else call.request
            found = attempt(self._local, joint)
        else:
            found = call
        calls = self._compared(agreed())
        values, ids = self._merged(found, calls)
        return (values[0], ids[0]) if isinstance(request, SearchRequest) and request.one else (values, ids)

    # ---- before the search ----

    def _call(self, request: SearchRequest | Exception) -> "_Call":
        """The request, checked for what a sharded search does not support, and its facts."""
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
        return _Call(request._replace(one=False), _Facts.of(request, self._number))

    def _compared(self, facts: list[list[int]]) -> list["_Facts"]:
        """The facts of all ranks, checked to agree. All ranks see the same facts, so all raise or none."""
        calls = [_Facts.unpacked(of_rank) for of_rank in facts]
        if len({call.table for call in calls}) > 1:
            raise ValueError("items must be the same table on all ranks, got different ones")
        _check_same("k", [call.k for call in calls])
        _check_same("backend", [_BACKENDS[call.backend] for call in calls])
        _check_same("the queries' dtypes", [_DTYPES[call.dtype] for call in calls])
        _check_same("whether allow is given", [call.has_allow for call in calls])
        if not self._scatters:
            _check_same("the numbers of queries", [call.num_queries for call in calls])
            if len({call.queries for call in calls}) > 1:
                raise ValueError("queries must be the same on all ranks, or the table made with scatter_queries=True")
            _check_same("exclude's numbers of ids", [call.num_excluded for call in calls])
            if len({call.exclude for call in calls}) > 1:
                raise ValueError("exclude must be the same on all ranks, got different ids")
        return calls

    def _joint(self, request: SearchRequest, calls: Sequence["_Facts"]) -> SearchRequest:
        """The request for the queries of all ranks, in the order of the ranks, with the exclusions of each."""
        queries, offsets, excluded = request.queries, request.exclude_offsets, request.exclude_ids
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
        joint = request._replace(queries=torch.cat(joint_queries), exclude_offsets=None, exclude_ids=None)
        return joint._replace(exclude_offsets=ends, exclude_ids=torch.cat(joint_excluded)) if before else joint

    # ---- the search and after it ----

    def _local(self, request: SearchRequest) -> Lists:
        """The k best of this shard, or all its rows."""
        n, first, excluded = request.version.num_rows, self._first, request.exclude_ids
        if excluded is not None and first is not None:
            excluded = within(excluded, slice(first, first + n))
        values, ids, _ = search(request._replace(k=min(request.k, max(n, 1)), exclude_ids=excluded))
        return values, ids if first is None else torch.where(ids >= 0, ids + first, -1)

    def _merged(self, found: Lists | Exception, calls: Sequence["_Facts"]) -> Lists:
        """The k best of all shards; raises if a rank has an exception."""
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
        """The lists of all shards for every query of this rank, (B, G s) each."""
        values, ids = lists
        step, failed = "exchanging results", error is not None
        by_rank = zip(torch.split(values, counts), torch.split(ids, counts), strict=True)
        messages = [_packed(*of_rank, failed) for of_rank in by_rank]
        received = self._ranks.deliver(step, messages) if self._scatters else self._ranks.gather(step, messages[0])
        self._ranks.check("searching", received[:, 0].tolist(), error)
        B = counts[self._ranks.rank if self._scatters else 0]
        return _unpacked(received.to(values.device), B, values.shape[1])

    def _complete(self, top: Lists, first: Lists, rest: Lists, counts: list[int]) -> None:
        """Corrects `top` in place for queries of which `rest` may hold rows of the top k."""
        (values, ids), (best_values, best_ids) = first, top
        s = values.shape[1] // self._ranks.size
        last, last_id = order_key(values[:, s - 1 :: s]), ids[:, s - 1 :: s]
        kth, kth_id = order_key(best_values[:, -1:]), best_ids[:, -1:]
        reached = (last > kth) | ((last == kth) & ((last_id <= kth_id) | (kth_id < 0)))
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
    """The call of a rank, in `FACTS` numbers of 8 bytes. Digests are 0 on a GPU: reading would cost a synchronisation.

    Attributes:
        num_rows: rows of the shard.
        num_queries: queries of this rank.
        k: argument of the search.
        num_excluded: excluded ids of all queries of this rank.
        table: number of the table.
        queries: digest.
        exclude: digest of offsets and ids; 0 for None.
        dtype: of the queries, an index of `_DTYPES`.
        backend: index of `_BACKENDS`.
        has_allow: whether `allow` was given.
    """

    num_rows: int
    num_queries: int
    k: int
    num_excluded: int
    table: int
    queries: int
    exclude: int
    dtype: int
    backend: int
    has_allow: bool

    @staticmethod
    def of(request: SearchRequest, table: int) -> "_Facts":
        """The facts of a request."""
        offsets, excluded = request.exclude_offsets, request.exclude_ids
        return _Facts(
            num_rows=request.version.num_rows,
            num_queries=len(request.queries),
            k=request.k,
            num_excluded=0 if excluded is None else len(excluded),
            table=table,
            queries=_digest(request.queries),
            exclude=_digest(offsets, excluded),
            dtype=_DTYPES.index(request.queries.dtype),
            backend=_BACKENDS.index(request.backend),
            has_allow=request.has_allow,
        )

    def packed(self) -> tuple[int, ...]:
        """As `FACTS` int64."""
        return struct.unpack(f"<{FACTS}q", struct.pack(_FACTS, *self))

    @staticmethod
    def unpacked(numbers: Sequence[int]) -> "_Facts":
        """From `FACTS` int64."""
        return _Facts(*struct.unpack(_FACTS, struct.pack(f"<{FACTS}q", *numbers)))


_FACTS = "<4q3I2B?x"  # the fields of `_Facts`


class _Call(NamedTuple):
    """The request of this rank and the facts that the other ranks receive."""

    request: SearchRequest
    facts: _Facts


def _digest(*tensors: torch.Tensor | None) -> int:
    """32 bits of the bytes of tensors on the CPU."""
    digest = xxhash.xxh3_64()
    for x in tensors:
        if x is not None and x.is_cpu:
            digest.update(_bytes(x).numpy().data)
    return digest.intdigest() & 0xFFFFFFFF


def short_list(k: int, num_shards: int) -> int:
    """Results that a shard sends at first: the k / G that are expected in the top k, and 5 standard deviations."""
    expected = k / num_shards
    return min(k, math.ceil(expected + 5 * math.sqrt(expected) + 6))


def merge(values: torch.Tensor, ids: torch.Tensor, k: int) -> Lists:
    """`best_of`, with one sort instead of two for queries without equal scores.

    A stable sort by score is the right order if ids ascend wherever scores are equal; otherwise `best_of` sorts.
    """
    by_key, order = order_key(values).sort(dim=1, descending=True, stable=True)
    by_key_ids = ids.gather(1, order)
    ranks = by_key_ids.where(by_key_ids >= 0, _LAST)  # fillers come last
    wrong = ((by_key[:, 1:] == by_key[:, :-1]) & (ranks[:, 1:] < ranks[:, :-1])).any(1)
    top_values, top_ids = values.gather(1, order[:, :k]), by_key_ids[:, :k].contiguous()
    if bool(wrong.any()):
        top_values[wrong], top_ids[wrong] = best_of(values[wrong], ids[wrong], k)
    return top_values, top_ids


def _facts(table: Any, scatter_queries: bool) -> tuple[int, ...]:
    """A shard for the other ranks: rows, width, dtype, having ids; scatter_queries; a number for the table."""
    if not isinstance(table, ItemTable):
        raise TypeError(f"local_table must be an ItemTable, got {type(table).__name__}")
    if not isinstance(scatter_queries, bool):
        raise TypeError(f"scatter_queries must be a bool, got {type(scatter_queries).__name__}")
    have_ids = table.operands()[2] is not None
    return len(table), table.dim, _DTYPES.index(table.dtype), have_ids, scatter_queries, secrets.randbits(32)


def _check_same(what: str, by_rank: Sequence[object]) -> None:
    """That all ranks have the same; all raise or none."""
    if len(set(by_rank)) > 1:
        raise ValueError(f"{what} must be the same on all ranks, got by rank {list(by_rank)}")


def _columns(lists: Lists, begin: int, end: int) -> Lists:
    """Places `begin` to `end` of every list, filled up with -infinity and -1."""
    values, ids = (x[:, begin:end] for x in lists)
    missing = (0, end - begin - values.shape[1])
    return F.pad(values, missing, value=-torch.inf), F.pad(ids, missing, value=-1)


def _packed(values: torch.Tensor, ids: torch.Tensor, failed: bool) -> torch.Tensor:
    """Lists (B, s) as one int64 message."""
    return torch.cat([ids.new_tensor([failed]), ids.reshape(-1), _words(values)])


def _unpacked(messages: torch.Tensor, B: int, s: int) -> Lists:
    """The lists in G messages, (B, G s) each."""
    G = len(messages)
    ids, values = messages[:, 1 : 1 + B * s], messages[:, 1 + B * s :].view(torch.float32)[:, : B * s]
    values, ids = (x.reshape(G, B, s).transpose(0, 1).reshape(B, G * s) for x in (values, ids))
    return values, ids


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _words(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as int64, padded with zeros."""
    data = _bytes(x)
    return F.pad(data, (0, -len(data) % 8)).view(torch.int64)


def _num_words(num_queries: int, queries: torch.Tensor) -> int:
    """Int64 words of `num_queries` queries of this width and dtype."""
    return -(-num_queries * queries.shape[1] * queries.itemsize // 8)
