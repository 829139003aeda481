"""`Retriever`: a model and its item table as one object for serving, from histories to ranked items."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grank_kernels.common.arrays import Array
from grank_kernels.common.atomic_files import create_folder
from grank_kernels.common.checks import check_choice, check_int, check_offsets, check_operand, check_tensor
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data.histories import Batch, Histories
from grank_kernels.recommender.models.recommender import Recommender
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.forked import limit_threads
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run_folder import EXPERIMENT, ITEMS, check_run, load_model, model_with_weights
from grank_kernels.table.item_table import ItemTable

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""Dtypes of a retriever's table."""

_WEIGHTS, _TABLE = "model.safetensors", "table.safetensors"  # of an export, beside EXPERIMENT and ITEMS


class Retrieved(NamedTuple):
    """Items for B users, best first.

    Attributes:
        scores: (B, k2) float32, descending: of the second stage, or inner products for a model without one; -inf where
            fewer than k2 items are left.
        ids: (B, k2) external ids; `Catalogue.missing` (-1 or "") where fewer than k2 items are left.
        popular: (B,) bool: the user has no history, without which the model scores all items alike, and got the most
            popular items; their scores are numbers of training rows.
    """

    scores: Tensor
    ids: npt.NDArray[Any]
    popular: Tensor


class Best(NamedTuple):
    """`Retrieved` in item numbers, -1 where fewer than k2 items are left."""

    values: Tensor
    indices: Tensor
    popular: Tensor


@dataclass(frozen=True)
class Serving:
    """One immutable version of model and table, and the stages of `Retriever.retrieve`.

    Attributes:
        model: a copy in evaluation mode, which is never trained.
        table: its item vectors, with all replaced rows.
    """

    model: Recommender
    table: ItemTable

    def best(
        self,
        histories: Histories,
        k1: int,
        k2: int,
        shards: ShardedItemTable | None = None,
        allow: Tensor | None = None,
    ) -> Best:
        """The k2 best items (B, k2) of B users, on the CPU. With shards a collective call, also for B = 0.

        `allow`, (N,) bool by item number on the table's device, leaves out the other items.
        """
        if len(histories) == 0:
            users = torch.empty(0, self.table.dim, device=self.table.device)
            found = self.search(histories, users, k1, shards, allow)
            best, popular = TopK(found.values[:, :k2], found.indices[:, :k2]), torch.zeros(0, dtype=torch.bool)
        else:
            batch, users = self.encode(histories)
            found = self.search(histories, users, k1, shards, allow)
            best = self.rank(batch, users, found, k2)
            found, popular = self.model.with_fallback(found, histories.lengths, allow=allow)
            if bool(popular.any()):  # their order is final: the second stage knows no more without a history
                rows = popular.unsqueeze(1)
                values = found.values[:, :k2].where(rows, best.values)
                best = TopK(values, found.indices[:, :k2].where(rows, best.indices))
        return Best(best.values.cpu(), best.indices.cpu(), popular.cpu())

    def encode(self, histories: Histories) -> tuple[Batch, Tensor]:
        """The padded batch for the model, and the user vectors (B, d)."""
        items, feedback = histories.pad(self.model.history)
        batch = Batch(items.to(self.table.device), feedback.to(self.table.device))
        return batch, self.model.user_vectors(batch)

    def search(
        self,
        histories: Histories,
        users: Tensor,
        k1: int,
        shards: ShardedItemTable | None = None,
        allow: Tensor | None = None,
    ) -> TopK:
        """The k1 rows of largest inner product outside of the histories; searches `shards` of the table if given."""
        seen = (histories.offsets.to(users.device), histories.items.to(users.device))
        rows = None if allow is None else self.table.mask(allow.nonzero().squeeze(1))
        return mips_topk(users, self.table if shards is None else shards, k1, exclude=seen, allow=rows)

    def rank(self, batch: Batch, users: Tensor, found: TopK, k2: int) -> TopK:
        """The k2 best of the found items by the second stage; by the search for a model without one."""
        if not self.model.ranks:
            return TopK(found.values[:, :k2], found.indices[:, :k2])
        scores = self.model.rank_rows(self.table, batch, users, found.indices, found.values)
        best = scores.sort(dim=1, descending=True, stable=True)
        return TopK(best.values[:, :k2], found.indices.gather(1, best.indices[:, :k2]))


class Retriever:
    """Recommends items to users by their histories: user vectors, `mips_topk` to k1 items, second stage to k2.

    Any number of threads may call `retrieve`, also while another thread calls `refresh`: every request is answered by
    one version of model and table, and none blocks. A retriever can be pickled, for spawned processes, unless its table
    is memory-mapped; then each process calls `load`.

    Attributes:
        catalogue: ids and titles of the items.
        experiment: settings of the model and of its training, or None.
    """

    def __init__(
        self,
        model: Recommender,
        catalogue: Catalogue,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        experiment: Experiment | None = None,
        table: ItemTable | None = None,
    ) -> None:
        """Copies the model and builds the table.

        Args:
            model: the model to serve. It may be trained further; `refresh` publishes its current weights.
            catalogue: of its N items.
            dtype: of the table: torch.float32, bfloat16 or int8.
            device: of model and table.
            experiment: settings that `save` writes; None for a retriever that is not saved.
            table: rows to search instead of the model's item vectors, in their own dtype, with ids 0 to N - 1.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: catalogue and table of different sizes, another dtype.
        """
        for name, value, kind in (("model", model, Recommender), ("catalogue", catalogue, Catalogue)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        dtype = dtype if table is None else table.dtype
        check_choice("dtype", dtype, DTYPES)
        self.catalogue, self.experiment = catalogue, experiment
        self._model, self._dtype, self._device = model, dtype, torch.device(device)
        self._coarse: torch.dtype | None = None
        self._refreshing = threading.Lock()  # of writers alone: readers take `_serving` once
        self._serving = self._published(table)
        ids, N = self._table.ids, len(catalogue)
        if not torch.equal(ids.sort().values, torch.arange(N, device=ids.device)):
            raise ValueError(f"catalogue has {N} items, and the table {len(ids)} rows; their ids must be 0 to {N - 1}")

    def __repr__(self) -> str:
        return f"Retriever({type(self._model).__name__} of {len(self.catalogue):_} items, {self.current.table!r})"

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the table once, since the snapshot that is served equals it, and no lock."""
        with self._refreshing:
            state = vars(self) | {"_serving": self._serving.model}
        del state["_refreshing"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._refreshing = threading.Lock()
        self._serving = Serving(state["_serving"], self._table.snapshot())

    # ---- serving ----

    @torch.inference_mode()
    def retrieve(
        self,
        histories: Histories | Sequence[Sequence[Any]],
        k1: int = 2000,
        k2: int = 500,
        *,
        allow: Array | None = None,
    ) -> Retrieved:
        """Recommend items that are not in the users' histories.

        In a process forked by one with several torch threads the first call limits torch to one thread, with a warning:
        torch would wait forever for threads that a child does not have.

        Args:
            histories: of B users, oldest item first: one list of item ids per user, all of them liked, or what
                `Retriever.histories` returns.
            k1: number of items to retrieve.
            k2: number of items to return, at most k1.
            allow: (N,) bool by item number: items that may be recommended; None for all. `Catalogue.find` gives the
                numbers of ids.

        Returns:
            `Retrieved`, its scores and ids (B, k2).

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: k1 or k2 below 1, k2 above k1, an unknown item id, offsets or `allow` that do not fit.
        """
        k1, k2 = check_int("k1", k1, 1), check_int("k2", k2, 1)
        if k2 > k1:
            raise ValueError(f"k2 must be at most k1, got {k2} of {k1}")
        limit_threads()
        if isinstance(histories, Histories):
            check_histories(histories, len(self.catalogue))
        else:
            histories = self.histories(histories)
        if allow is not None:
            allow = check_operand("allow", allow, (torch.bool,), "(N,)", (len(self.catalogue),)).to(self._device)
        offered = self.offered
        if offered is not None:
            allow = offered if allow is None else allow & offered
        best = self._serving.best(histories, k1, k2, allow=allow)  # one version, whatever `refresh` publishes meanwhile
        return Retrieved(best.values, self.catalogue.of(best.indices.numpy()), best.popular)

    def histories(self, items: Sequence[Sequence[Any]], feedback: Sequence[Sequence[bool]] | None = None) -> Histories:
        """Histories of item numbers from item ids.

        Args:
            items: one list of item ids per user, oldest first.
            feedback: whether the user liked each item; None for all of them.

        Raises:
            TypeError: items other than lists of ids, or ids of another type than the catalogue's.
            ValueError: an id that is not in the catalogue, or feedback of other lengths.
        """
        for own in (items,) if isinstance(items, str) else items:
            if isinstance(own, str) or not hasattr(own, "__len__"):
                raise TypeError(
                    f"histories must be a Histories or one list of item ids per user, got {type(own).__name__} {own!r} "
                    "in the place of a list"
                )
        lengths = [len(own) for own in items]
        flat = [item for own in items for item in own]
        numbers = self.catalogue.find(flat)
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            raise ValueError(f"histories: item {flat[unknown[0]]!r} is not in the catalogue")
        liked = torch.ones(len(flat), dtype=torch.bool)
        if feedback is not None:
            if [len(own) for own in feedback] != lengths:
                raise ValueError("feedback must be as long as the histories, got other lengths")
            liked = torch.tensor([bool(entry) for own in feedback for entry in own], dtype=torch.bool)
        return Histories(torch.tensor([0, *lengths]).cumsum(0), torch.from_numpy(numbers), liked)

    # ---- refresh ----

    def refresh(self, ids: npt.ArrayLike | None = None, vectors: Array | None = None) -> None:
        """Publish new item vectors; requests that run meanwhile are answered by the old ones.

        Args:
            ids: (n,) ids of items to replace the vectors of. The search uses the new vectors, and so does GRank's
                Ranker for candidates and histories; other second stages and the Generator keep the model's own. None,
                together with `vectors`, publishes the current weights of the model that the retriever was made with;
                its training must not run meanwhile.
            vectors: (n, d) float32, finite: a tensor or an array.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: ids without vectors or the other way around, ids that repeat or are not in the catalogue,
                vectors that do not fit or are not finite. Nothing is changed.
        """
        if (ids is None) != (vectors is None):
            given, missing = ("ids", "vectors") if vectors is None else ("vectors", "ids")
            raise ValueError(f"ids and vectors must be given together, got {given} without {missing}")
        limit_threads()
        with self._refreshing:
            if ids is None:
                self._serving = self._published(None)
                return
            numbers = self._numbers(ids)
            rows = check_operand("vectors", vectors, (torch.float32,), "(n, d)", (len(numbers), self._table.dim))
            if not bool(rows.isfinite().all()):
                raise ValueError("vectors must be finite, got NaN or infinity")
            self._table.upsert(torch.from_numpy(numbers).to(self._device), rows.to(self._device))
            self._serving = replace(self._serving, table=self._table.snapshot())

    def _numbers(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Item numbers of ids of the catalogue, all different."""
        numbers, given = self.catalogue.find(ids), np.asarray(ids, object)
        unknown = np.flatnonzero(numbers < 0)
        if len(unknown):
            raise ValueError(f"ids must be in the catalogue, got {given[unknown[0]]!r}")
        unique, first = np.unique(numbers, return_index=True)
        if len(unique) < len(numbers):
            repeated = np.delete(np.arange(len(numbers)), first)[0]
            raise ValueError(f"ids must be unique, got {given[repeated]!r} more than once")
        return numbers

    @property
    def offered(self) -> Tensor | None:
        """(N,) bool on the table's device: the items that the catalogue offers; None for all."""
        offered = self.catalogue.offered
        return None if offered is None else torch.tensor(offered, device=self._device)

    @property
    def current(self) -> Serving:
        """The version that is served now, to run its stages one by one."""
        return self._serving

    @torch.no_grad()
    def _published(self, table: ItemTable | None) -> Serving:
        model = copy.deepcopy(self._model).to(self._device).eval().requires_grad_(False)
        if table is None:
            table = ItemTable.from_rows(model.item_vectors(), dtype=self._dtype, coarse=self._coarse)
        self._coarse = None if table.current.coarse is None else torch.int8
        self._table = table.to(self._device)  # updated by `refresh`; readers have snapshots
        return Serving(model, self._table.snapshot())

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Write settings, weights, table and catalogue into a new folder, which appears complete or not at all.

        Args:
            folder: one that does not exist, or is empty.

        Raises:
            FileExistsError: there is a file, or a folder that is not empty.
            OSError: a file cannot be written; the folder does not appear.
            ValueError: the retriever was made without an experiment, which has the settings.
        """
        if self.experiment is None:
            raise ValueError("experiment must be given to a retriever that is saved, got None")
        serving = self._serving
        with create_folder(folder) as new:
            self.experiment.save(new / EXPERIMENT)
            try:
                save_file({name: x.contiguous() for name, x in serving.model.state_dict().items()}, new / _WEIGHTS)
            except SafetensorError as error:
                raise OSError(f"{folder}: cannot write {_WEIGHTS}: {error}") from None
            serving.table.save(new / _TABLE)
            self.catalogue.save(new / ITEMS)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", mmap: bool = False) -> "Retriever":
        """Read a folder of `save`. Files are checked, and nothing in them is executed.

        Args:
            folder: the folder.
            device: of model and table.
            mmap: leave the table's rows in the file, as `ItemTable.load` does; `refresh` then takes no vectors.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            ValueError: a file is damaged or holds something else; the message names it.
        """
        folder = Path(folder)
        _check_export(folder)
        experiment = Experiment.load(folder / EXPERIMENT)
        catalogue = Catalogue.load(folder / ITEMS)
        path = folder / _WEIGHTS
        model = model_with_weights(experiment, len(catalogue), _weights(path), path)
        table = ItemTable.load(folder / _TABLE, mmap=mmap)
        return cls(model, catalogue, table=table, device=device, experiment=experiment)

    @classmethod
    def from_run(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Retriever":
        """The model of a run with the weights of its best epoch, and the catalogue that the run recorded.

        Args:
            folder: of the run.
            dtype: of the table.
            device: of model and table.

        Raises:
            FileNotFoundError: the folder does not exist, or the run has no weights yet.
            ValueError: a file is damaged or holds something else; the message names it.
        """
        if is_export(folder):
            raise ValueError(f"folder must be the folder of a run, got {folder}, an export: use Retriever.load")
        check_run(folder)
        experiment = Experiment.load(Path(folder) / EXPERIMENT)
        catalogue = Catalogue.load(Path(folder) / ITEMS)
        model = load_model(folder, len(catalogue))
        return cls(model, catalogue, dtype=dtype, device=device, experiment=experiment)


def is_export(folder: str | Path) -> bool:
    """Whether a folder was written by `Retriever.save` or `grank export`, and is not the folder of a run."""
    return (Path(folder) / _WEIGHTS).is_file()


def check_histories(histories: Histories, N: int) -> None:
    """That histories are consistent and hold item numbers below N."""
    items = check_tensor("histories.items", histories.items, (torch.int64,), (1,))
    offsets = check_tensor("histories.offsets", histories.offsets, (torch.int64,), (1,))
    check_operand("histories.feedback", histories.feedback, (torch.bool,), "(n,)", (len(items),))
    if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(items):
        ends = f"{int(offsets[0])} to {int(offsets[-1])}" if len(offsets) else "none"
        raise ValueError(f"histories.offsets must run from 0 to {len(items)}, the number of items, got {ends}")
    check_offsets("histories.offsets", offsets, len(items))
    wrong = (items < 0) | (items >= N)
    if bool(wrong.any()):
        raise ValueError(f"histories.items must be numbers below {N}, got {int(items[wrong][0])}")


def _check_export(folder: Path) -> None:
    missing = [name for name in (EXPERIMENT, _WEIGHTS, _TABLE, ITEMS) if not (folder / name).is_file()]
    if missing:
        got = f"{folder} without {', '.join(missing)}" if folder.is_dir() else f"{folder}, which does not exist"
        is_run = folder.is_dir() and _WEIGHTS in missing and EXPERIMENT not in missing
        hint = "; it is the folder of a run: use Retriever.from_run" if is_run else ""
        raise FileNotFoundError(f"folder must be one that Retriever.save or `grank export` wrote, got {got}{hint}")


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}") from None
