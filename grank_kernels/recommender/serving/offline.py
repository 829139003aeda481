"""Every user of a data set at once: the k2 best items of each, as a folder of Parquet files.

Users come in parts, a file each, and parts in batches. A file gets its name when it is whole, so what is there need not
be done again. User vectors may differ in their last bits with the batch that they are computed in, so a batch is of the
same users whatever was done before, and by whom: the files are the same, byte for byte, however often a run was killed
and whatever number of processes took part, as long as each has as many threads.

With several processes, of torch.distributed, each takes every so-many-th part. What is kept where:

- The model is on every rank: its Generator, and the second stages of UniGRF and of GRank without a Ranker, read its own
  matrix of items.
- Searches go over a `ShardedItemTable`. Every rank has its share of the rows in memory, all have a search at the same
  time, each for users of its own, and get the result that one table gives.
- Second stages that read rows of the table (`Recommender.rank_rows`) want those of any candidate and of histories,
  whoever has searched them. They are looked up in the table of the retriever: load it with `mmap=True`, and it is a
  file of which a host has one copy in its page cache, whatever the number of ranks, and only the rows that are read. A
  retriever made from a run has no file, and its table is in the memory of every rank.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from grank_kernels.distributed.ranks import Ranks, leave
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.mips_topk import TopK
from grank_kernels.recommender.data import Histories, Interactions, all_histories
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import Retriever, Serving, check_at_least_1, check_histories, to_disk
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.versions import Version

MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names that begin with _ or a point
_MOST = (1 << 31) - 1  # entries of the lists of one file
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What is asked for every user, and how the work is cut.

    Attributes:
        k1: items to retrieve.
        k2: items to rank and write, at most k1.
        users_per_part: of one file.
        batch: users at a time.
    """

    k1: int = 2000
    k2: int = 500
    users_per_part: int = 1024
    batch: int = 256

    def __post_init__(self) -> None:
        """Checks the sizes."""
        check_at_least_1(**asdict(self))
        if self.k2 > self.k1:
            raise ValueError(f"k2 must be at most k1, got {self.k2} of {self.k1}")
        if self.k2 * self.users_per_part > _MOST:
            raise ValueError(f"k2 times users_per_part must be at most {_MOST}, got {self.k2} * {self.users_per_part}")


@dataclass(frozen=True)
class Users:
    """Whom to retrieve for.

    Attributes:
        ids: (U,) external ids, integers or strings, ascending.
        histories: of the U users: item numbers of the catalogue. Nobody gets what is there.
    """

    ids: npt.NDArray[Any]
    histories: Histories

    @classmethod
    def of(cls, interactions: Interactions, catalogue: Catalogue, positive: float) -> "Users":
        """All users of a data set, each with the whole history.

        Args:
            interactions: the data set.
            catalogue: of the items that are retrieved.
            positive: the least rating that is positive feedback.

        Raises:
            ValueError: an item of the data set is not in the catalogue.
        """
        numbers = catalogue.find(interactions.item_ids)
        if bool((numbers < 0).any()):
            unknown = interactions.item_ids[numbers < 0][0]
            raise ValueError(f"interactions: item {unknown!r} is not in the catalogue of what is retrieved")
        own = all_histories(interactions, positive)
        histories = Histories(own.offsets, torch.from_numpy(numbers)[own.items], own.feedback)
        return cls(interactions.user_ids, histories)


@contextmanager
def launched() -> Iterator[Ranks | None]:
    """The processes that `torchrun` has started, over gloo, or None for one that was started alone."""
    if not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        leave()


@torch.inference_mode()
def retrieve_all(
    retriever: Retriever,
    users: Users,
    folder: str | Path,
    request: Request,
    *,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Path]:
    """Write the best items of all users, or what is missing of them.

    The files have columns `user`, `items` and `scores`: an external id, the items' external ids, best first, and as
    many float32 numbers; fewer than k2 where the corpus has no more that the user has not met. `pyarrow.dataset` reads
    the folder as one table, sorted by user. A manifest beside them says what was asked for.

    Args:
        retriever: whose current version answers.
        users: who asks.
        folder: for the files; one that this function has not finished goes on where it was. All ranks must see it.
        request: what is asked.
        ranks: of a process group, whose ranks all call this with the same arguments; None for this process alone.
        progress: called after every batch with how many users of this rank are done, and how many there are to do.

    Returns:
        The files, in the order of the users.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the folder holds answers to another request, and the message says to which; histories that do not
            fit.
        BlockingIOError: another process is at work on the folder.
        ShardError: another rank raised or is lost. What was written is good.
    """
    folder, serving = Path(folder), retriever.current
    check_histories(users.histories, len(retriever.catalogue))
    if len(users.ids) != len(users.histories):
        raise ValueError(f"users have {len(users.ids)} ids and {len(users.histories)} histories; they take as many")
    asked = _described(serving, retriever.catalogue, users, request)
    everybody, step = torch.arange(len(users.ids)), request.users_per_part
    parts = [everybody[start : start + step] for start in range(0, len(everybody), step)]
    paths = [folder / f"part-{number:06}.parquet" for number in range(len(parts))]
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    with _claimed(folder, asked, ranks):
        _together(ranks, "comparing what is asked", lambda: _compare(folder / MANIFEST, asked))
        missing = _missing(paths, ranks)
        mine = missing[rank::size]
        shards = None
        if ranks is not None:
            shards = ShardedItemTable(_share(serving.table, rank, size), group=ranks.group, scatter_queries=True)
        done, total = 0, sum(len(parts[number]) for number in mine)
        nobody = torch.arange(0)
        for turn in range(-(-len(missing) // size)):  # in step: searches are collective
            part = parts[mine[turn]] if turn < len(mine) else nobody
            found = []
            for start in range(0, min(step, len(everybody)), request.batch):
                batch = part[start : start + request.batch]
                found.append(_best(serving, shards, users.histories.select(batch), request))
                done += len(batch)
                progress(done, total)
            path = paths[mine[turn]] if len(part) else None
            _together(ranks, "writing", partial(_write, path, users.ids[part.numpy()], found, retriever.catalogue))
    return paths


def _best(serving: Serving, shards: ShardedItemTable | None, histories: Histories, request: Request) -> TopK:
    """The k2 best of users, of whom there may be none; a rank then still takes part in the search."""
    if len(histories) == 0:
        nobody = torch.empty(0, serving.table.dim, device=serving.table.device)
        found = serving.search(histories, nobody, request.k1, shards)
        return TopK(found.values[:, : request.k2].cpu(), found.indices[:, : request.k2].cpu())
    batch, vectors = serving.encode(histories)
    best = serving.rank(batch, vectors, serving.search(histories, vectors, request.k1, shards), request.k2)
    return TopK(best.values.cpu(), best.indices.cpu())


def _share(table: ItemTable, rank: int, size: int) -> ItemTable:
    """The rows that a rank searches: of a table in memory without a copy, of a file read into memory."""
    version, N = table.current, len(table)
    columns = version.compact().map(lambda x: x[N * rank // size : N * (rank + 1) // size])
    share = Version(columns, len(columns.rows), version.basis)
    return ItemTable(share if version.mapping is None else share.moved(torch.clone))


# ---- the folder ----


def _together(ranks: Ranks | None, step: str, run: Callable[[], T]) -> T:
    return run() if ranks is None else ranks.together(step, run)


@contextmanager
def _claimed(folder: Path, asked: dict[str, Any], ranks: Ranks | None) -> Iterator[None]:
    """The folder with a manifest, for this run alone until the block ends."""
    lock = _together(ranks, "preparing the folder", lambda: None if ranks and ranks.rank else _claim(folder, asked))
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _claim(folder: Path, asked: dict[str, Any]) -> int:
    """Writes the manifest if there is none, and returns its descriptor, which has its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if not manifest.exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else; take another folder or remove it")
        with _replacing(manifest) as new:
            new.write_text(json.dumps(asked, indent=2) + "\n")
    lock = os.open(manifest, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(f"{folder}: another process is at work on it") from None
        raise
    return lock


def _compare(manifest: Path, asked: dict[str, Any]) -> None:
    """Raises if what is there answers another request."""
    try:
        there = json.loads(manifest.read_text())
    except ValueError:
        raise ValueError(f"{manifest}: expected what was asked for as JSON, got something else") from None
    differs = [f"{name} {there.get(name)}, not {value}" for name, value in asked.items() if there.get(name) != value]
    if differs:
        raise ValueError(f"{manifest.parent} holds answers for {'; '.join(differs)}: take another folder or remove it")


def _missing(paths: Sequence[Path], ranks: Ranks | None) -> list[int]:
    """Numbers of the parts that no rank sees, the same on all."""
    there = torch.tensor([path.exists() for path in paths], dtype=torch.uint8)
    if ranks is not None:
        there = ranks.gather("looking for parts", there).amax(0)
    return [number for number, is_there in enumerate(there.tolist()) if not is_there]


def _write(path: Path | None, ids: npt.NDArray[Any], found: Sequence[TopK], catalogue: Catalogue) -> None:
    """Writes a part; None for a rank that has none left."""
    import pyarrow
    from pyarrow import parquet

    if path is None:
        return
    values, items = (torch.cat(list(of_batches)) for of_batches in zip(*found, strict=True))
    there = items >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)]).to(torch.int32).numpy()
    lists = {"items": catalogue.of(items[there].numpy()), "scores": values[there].numpy()}
    arrays = {name: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat)) for name, flat in lists.items()}
    with _replacing(path) as new:
        parquet.write_table(pyarrow.table({"user": ids} | arrays), new)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file that is to have that one, on disk as well, when the block ends."""
    beside = path.with_name(f".{path.name}")
    yield beside
    to_disk(beside)
    beside.replace(path)
    to_disk(path.parent)


# ---- what is asked ----


def _described(serving: Serving, catalogue: Catalogue, users: Users, request: Request) -> dict[str, Any]:
    """All that the files depend on, for the manifest."""
    table = (x for part in serving.table.current.parts() for x in part.present().values())
    return {
        "users": len(users.ids),
        "items": len(catalogue),
        "dtype": str(serving.table.dtype).removeprefix("torch."),
        **asdict(request),
        "checksum_of_model": _checksum(serving.model.state_dict().values(), table, ids=catalogue.ids),
        "checksum_of_users": _checksum(vars(users.histories).values(), ids=users.ids),
    }


def _checksum(*tensors: Iterable[Tensor], ids: npt.NDArray[Any]) -> str:
    checksum = xxhash.xxh3_64(np.ascontiguousarray(ids).tobytes())
    for x in chain(*tensors):
        checksum.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()
