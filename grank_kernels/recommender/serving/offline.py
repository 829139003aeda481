"""The k2 best items of every user of a data set, as a folder of Parquet files.

Users are split into parts, one file each, and parts into batches. A file appears when it is complete, and a complete
file is not computed again. The last bits of user vectors may depend on the batch that they are computed in, so batches
are the same however a run was interrupted and however many processes take part: with one number of threads the files
are identical, byte for byte.

With several processes of torch.distributed, each takes every n-th part. Where the data is:

- The model is on every rank: its Generator, and the second stages of UniGRF and of GRank without a Ranker, read its own
  matrix of items.
- Searches go over a `ShardedItemTable`. Every rank has its share of the rows in memory; searches are collective, each
  rank with its own users, and results are those of one table.
- Second stages that read rows of the table (`Recommender.rank_rows`) need the rows of any candidate and history item.
  They read them from the table of the retriever. Loaded with `mmap=True` it is a file in the host's page cache, shared
  by all ranks; a retriever made from a run has it in the memory of every rank.
"""

import errno
import fcntl
import json
import os
import warnings
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

from grank_kernels.common.atomic_files import replace_file, write_text
from grank_kernels.common.checks import check_int
from grank_kernels.distributed.ranks import Ranks, leave
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.forked import limit_threads
from grank_kernels.recommender.serving.retriever import Best, Retriever, Serving, check_histories
from grank_kernels.recommender.serving.users import Users
from grank_kernels.table.item_table import ItemTable
from grank_kernels.table.versions import Version

MANIFEST = "_manifest.json"  # readers of Parquet folders skip names that begin with _ or a point
COLUMNS = ("user", "items", "scores", "popular")
_MOST = (1 << 31) - 1  # entries of the lists of one file: their offsets are int32
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Sizes of the lists, and of the parts and batches that users are split into.

    Attributes:
        k1: number of items to retrieve.
        k2: number of items to rank and write, at most k1.
        users_per_part: number of users per file.
        batch: number of users per batch.
    """

    k1: int = 2000
    k2: int = 500
    users_per_part: int = 1024
    batch: int = 256

    def __post_init__(self) -> None:
        """Checks the sizes."""
        for name, size in asdict(self).items():
            object.__setattr__(self, name, check_int(name, size, 1))  # NumPy's integers become Python's
        if self.k2 > self.k1:
            raise ValueError(f"k2 must be at most k1, got {self.k2} of {self.k1}")
        if self.k2 * self.users_per_part > _MOST:
            raise ValueError(f"k2 times users_per_part must be at most {_MOST}, got {self.k2} * {self.users_per_part}")


@contextmanager
def launched() -> Iterator[Ranks | None]:
    """The processes that `torchrun` started, over gloo; None for a process that was started alone."""
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
    """Write the best items of all users, or those parts of them that do not exist yet.

    The files have a row per user: `user`, the external id; `items`, external ids, best first, fewer than k2 where the
    user has met all others; `scores`, as many float32; `popular`, as `Retrieved.popular`. `pyarrow.dataset` reads the
    folder as one table, sorted by user. A manifest records the request.

    Args:
        retriever: its current version answers.
        users: users to recommend to.
        folder: for the files; an interrupted call is resumed. All ranks must see it.
        request: sizes.
        ranks: of a process group, whose ranks all call this with the same arguments; None for this process alone.
        progress: called after every batch with the number of users that this rank has done and its total.

    Returns:
        The files, in the order of the users.

    Raises:
        FileExistsError: the folder is a file or holds something else.
        ValueError: the folder holds answers to another request, and the message names the difference; users whose
            histories do not fit.
        BlockingIOError: another process works on the folder.
        ShardError: another rank raised or is lost. Complete files remain.
    """
    folder, serving = Path(folder), retriever.current
    check_histories(users.histories, len(retriever.catalogue))
    if len(users.ids) != len(users.histories):
        raise ValueError(f"users must have as many ids as histories, got {len(users.ids)} and {len(users.histories)}")
    limit_threads()
    asked = _described(serving, retriever.catalogue, users, request)
    everybody, step = torch.arange(len(users.ids)), request.users_per_part
    parts = [everybody[start : start + step] for start in range(0, len(everybody), step)]
    paths = [folder / f"part-{number:06}.parquet" for number in range(len(parts))]
    with _claimed(folder, asked, ranks):
        _together(ranks, "comparing requests", lambda: _compare(folder / MANIFEST, asked))
        search = partial(serving.best, allow=retriever.offered)
        for path, part, found in _parts(serving, search, users.histories, parts, paths, request, ranks, progress):
            _together(ranks, "writing", partial(_write, path, users.ids[part.numpy()], found, retriever.catalogue))
    return paths


def _parts(
    serving: Serving,
    search: Callable[..., Best],
    histories: Histories,
    parts: Sequence[Tensor],
    paths: Sequence[Path],
    request: Request,
    ranks: Ranks | None,
    progress: Callable[[int, int], object],
) -> Iterator[tuple[Path | None, Tensor, list[Best]]]:
    """The missing parts of this rank: file, users and their items; None and nobody while only other ranks have more."""
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    missing = _missing(paths, ranks)
    mine = missing[rank::size]
    shards = None
    if ranks is not None:
        shards = ShardedItemTable(_share(serving.table, rank, size), group=ranks.group, scatter_queries=True)
    done, total = 0, sum(len(parts[number]) for number in mine)
    for turn in range(-(-len(missing) // size)):  # all ranks take as many turns: searches are collective
        number = mine[turn] if turn < len(mine) else None
        part = torch.arange(0) if number is None else parts[number]
        found = []
        for start in range(0, len(parts[0]), request.batch):  # the first part is the longest
            batch = part[start : start + request.batch]
            found.append(search(histories.select(batch), request.k1, request.k2, shards))
            done += len(batch)
            progress(done, total)
        yield None if number is None else paths[number], part, found


def _share(table: ItemTable, rank: int, size: int) -> ItemTable:
    """The rows that a rank searches: views of a table in memory, copies of a memory-mapped one."""
    version, N = table.current, len(table)
    columns = version.compact().map(lambda x: x[N * rank // size : N * (rank + 1) // size])
    share = Version(columns, len(columns.rows), version.basis)
    return ItemTable(share if version.mapping is None else share.moved(torch.clone))


# ---- the folder ----


def _together(ranks: Ranks | None, step: str, run: Callable[[], T]) -> T:
    return run() if ranks is None else ranks.together(step, run)


@contextmanager
def _claimed(folder: Path, asked: dict[str, Any], ranks: Ranks | None) -> Iterator[None]:
    """The folder with a manifest, locked against other calls until the block ends."""
    lock = _together(ranks, "preparing the folder", lambda: None if ranks and ranks.rank else _claim(folder, asked))
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _claim(folder: Path, asked: dict[str, Any]) -> int:
    """Write the manifest if there is none; returns its descriptor, which holds the lock."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} must be a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if not manifest.exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else; take another folder or remove it")
        write_text(manifest, json.dumps(asked, indent=2) + "\n")
    lock = os.open(manifest, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BlockingIOError(f"{folder}: another process works on it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(lock)
            raise
        message = f"the file system of {folder} has no locks ({error.strerror}): start no second process on this folder"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return lock


def _compare(manifest: Path, asked: dict[str, Any]) -> None:
    """Raises if the folder holds answers to another request."""
    try:
        there = json.loads(manifest.read_text())
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise ValueError(f"{manifest} must hold a request as JSON, got something else")
    differs = [f"{name} {there.get(name)}, not {value}" for name, value in asked.items() if there.get(name) != value]
    if differs:
        raise ValueError(f"{manifest.parent} holds answers for {'; '.join(differs)}: take another folder or remove it")


def _missing(paths: Sequence[Path], ranks: Ranks | None) -> list[int]:
    """Numbers of the parts that no rank sees, the same on all."""
    there = torch.tensor([path.exists() for path in paths], dtype=torch.uint8)
    if ranks is not None:
        there = ranks.gather("looking for parts", there).amax(0)
    return [number for number, is_there in enumerate(there.tolist()) if not is_there]


def _write(path: Path | None, ids: npt.NDArray[Any], found: Sequence[Best], catalogue: Catalogue) -> None:
    """Write a part; None for a rank that has none left."""
    import pyarrow
    from pyarrow import parquet

    if path is None:
        return
    values, items, popular = (torch.cat(list(of_batches)) for of_batches in zip(*found, strict=True))
    there = items >= 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)]).to(torch.int32).numpy()
    lists = (catalogue.ids[items[there].numpy()], values[there].numpy())
    items_and_scores = [pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat)) for flat in lists]
    table = pyarrow.table([ids, *items_and_scores, popular.numpy()], COLUMNS)
    with replace_file(path) as file:
        parquet.write_table(table, file)


# ---- the manifest ----


def _described(serving: Serving, catalogue: Catalogue, users: Users, request: Request) -> dict[str, Any]:
    """All values that the files depend on."""
    table = (x for part in serving.table.current.parts() for x in part.present().values())
    return {
        "columns": list(COLUMNS),
        "users": len(users.ids),
        "items": len(catalogue),
        **({} if catalogue.offered is None else {"offered": _checksum(ids=catalogue.offered)}),
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
