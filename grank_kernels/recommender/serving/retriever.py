"""`Retriever`: a model and its item table as one object for serving, from histories to ranked items."""

import copy
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grank_kernels.common.checks import check_offsets, check_operand, check_tensor
from grank_kernels.distributed.sharded_table import ShardedItemTable
from grank_kernels.mips_topk import TopK, mips_topk
from grank_kernels.recommender.data import Batch, Histories, Interactions
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.training.experiment import Experiment
from grank_kernels.recommender.training.run_folder import load_model
from grank_kernels.table.item_table import ItemTable

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
"""What a retriever's table may be kept in."""

_EXPERIMENT, _WEIGHTS, _TABLE, _ITEMS = "experiment.yaml", "model.safetensors", "table.safetensors", "items.parquet"


class Retrieved(NamedTuple):
    """Items for B users, best first.

    Attributes:
        scores: (B, k2) float32, descending: of the second stage, or of the retrieval for a model without one; -inf
            where the corpus has no more to offer.
        ids: (B, k2), the items' external ids; there -1, or "" where ids are strings.
    """

    scores: Tensor
    ids: npt.NDArray[Any]


@dataclass(frozen=True)
class Serving:
    """One version of what is served; it never changes. The stages of `Retriever.retrieve`, one method each.

    Attributes:
        model: in evaluation mode, a copy that nobody trains.
        table: made of its item vectors, rows replaced since included.
    """

    model: Recommender
    table: ItemTable

    def encode(self, histories: Histories) -> tuple[Batch, Tensor]:
        """The batch that the model reads, and the user vectors (B, d)."""
        items, feedback = histories.pad(self.model.history)
        if items.shape[1] == 0:  # nobody has a history; models read at least one place
            items, feedback = items.new_full((len(items), 1), -1), feedback.new_zeros(len(items), 1)
        batch = Batch(items.to(self.table.device), feedback.to(self.table.device))
        return batch, self.model.user_vectors(batch)

    def search(self, histories: Histories, users: Tensor, k1: int, shards: ShardedItemTable | None = None) -> TopK:
        """The k1 rows of largest inner product, less those of the histories; in shards of the table if it has such."""
        seen = (histories.offsets.to(users.device), histories.items.to(users.device))
        return mips_topk(users, self.table if shards is None else shards, k1, exclude=seen)

    def rank(self, batch: Batch, users: Tensor, found: TopK, k2: int) -> TopK:
        """The k2 best of them by the second stage, if the model has one."""
        if not self.model.ranks:
            return TopK(found.values[:, :k2], found.indices[:, :k2])
        scores = self.model.rank_rows(self.table, batch, users, found.indices, found.values)
        best = scores.sort(dim=1, descending=True, stable=True)
        return TopK(best.values[:, :k2], found.indices.gather(1, best.indices[:, :k2]))


class Retriever:
    """Generator -> `mips_topk` k1 -> second stage k2: what recommends to a user with a history.

    Any number of threads may call `retrieve`, also while another one calls `refresh`: each request is answered by one
    version of model and table, whole, and none waits.

    Attributes:
        catalogue: the items' ids and titles.
        experiment: the model's settings and where it learned, or None.
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
        """Copies the model and makes the table.

        Args:
            model: what is served. It may be trained on; `refresh` takes what it has become.
            catalogue: of its N items.
            dtype: of the table: torch.float32, bfloat16 or int8.
            device: where to serve.
            experiment: the model's settings, which `save` writes; None for a model that is not to be saved.
            table: what to search, in its own dtype, with ids 0 to N - 1; None makes it of the model's item vectors.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a catalogue or a table of another size than the model's, another dtype.
        """
        for name, value, kind in (("model", model, Recommender), ("catalogue", catalogue, Catalogue)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        dtype = dtype if table is None else table.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; it takes one of {', '.join(map(str, DTYPES))}")
        self.catalogue, self.experiment = catalogue, experiment
        self._model, self._dtype, self._device = model, dtype, torch.device(device)
        self._refreshing = threading.Lock()  # for those who write; readers take what is there
        self._serving = self._published(table)
        ids, N = self._table.ids, len(catalogue)
        if not torch.equal(ids.sort().values, torch.arange(N, device=ids.device)):
            raise ValueError(f"catalogue has {N} items, and the table {len(ids)} rows; ids take 0 to {N - 1}")

    def __repr__(self) -> str:
        return f"Retriever({type(self._model).__name__} of {len(self.catalogue):_} items, {self.current.table!r})"

    # ---- serving ----

    @torch.inference_mode()
    def retrieve(self, histories: Histories | Sequence[Sequence[Any]], k1: int = 2000, k2: int = 500) -> Retrieved:
        """Recommend to users what they have not met.

        Args:
            histories: of B users, oldest first: lists of item ids, all of it liked, or a `Histories` of item numbers,
                as `histories` makes them. A user without any history gets what the model has for such.
            k1: items to retrieve.
            k2: items to return, at most k1.

        Returns:
            `Retrieved(scores, ids)`, each (B, k2).

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a k below 1, k2 above k1, an id that the model does not know, histories that do not fit.
        """
        check_at_least_1(k1=k1, k2=k2)
        if k2 > k1:
            raise ValueError(f"k2 must be at most k1, got {k2} of {k1}")
        if isinstance(histories, Histories):
            check_histories(histories, len(self.catalogue))
        else:
            histories = self.histories(histories)
        serving = self._serving  # once: a refresh replaces it
        if len(histories) == 0:
            best = TopK(torch.empty(0, k2), torch.empty(0, k2, dtype=torch.int64))
        else:
            batch, users = serving.encode(histories)
            best = serving.rank(batch, users, serving.search(histories, users, k1), k2)
        return Retrieved(best.values.cpu(), self.catalogue.of(best.indices.cpu().numpy()))

    def histories(self, items: Sequence[Sequence[Any]], feedback: Sequence[Sequence[bool]] | None = None) -> Histories:
        """Histories of item numbers from item ids.

        Args:
            items: item ids, one list a user, oldest first.
            feedback: whether the user liked each; None for all of it.

        Raises:
            TypeError: items are no lists, or ids of another type than the catalogue's.
            ValueError: an id that is not in the catalogue, or feedback of other lengths.
        """
        if isinstance(items, str) or any(isinstance(own, str) or not hasattr(own, "__len__") for own in items):
            raise TypeError("histories must be a Histories or one list of item ids a user, got something else")
        flat = [item for own in items for item in own]
        numbers = self.catalogue.find(flat)
        if bool((numbers < 0).any()):
            raise ValueError(f"histories: item {flat[int((numbers < 0).argmax())]!r} is not in the catalogue")
        bounds = [0, *np.cumsum([len(own) for own in items], dtype=np.int64).tolist()]
        lists = [numbers[start:stop].tolist() for start, stop in pairwise(bounds)]
        return Histories.from_lists(lists, None if feedback is None else [list(own) for own in feedback])

    # ---- item vectors that change ----

    def refresh(self, ids: npt.ArrayLike | None = None, vectors: Tensor | None = None) -> None:
        """Serve other item vectors; requests that have begun end with the old ones.

        Args:
            ids: (n,) of items whose vectors are replaced: in the search and, of GRank's Ranker, as candidates and in
                histories; other second stages and the Generator know the model's own. None, together with `vectors`,
                takes weights and vectors of the model that the retriever was made with as they are now: call it
                between two steps of its training.
            vectors: (n, d) float32.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: one of the arguments without the other, ids that repeat or are not in the catalogue, vectors
                that do not fit or are not finite. Nothing is changed.
        """
        if (ids is None) != (vectors is None):
            raise ValueError("ids and vectors must be given together, got one of them")
        with self._refreshing:
            if ids is None or vectors is None:
                self._serving = self._published(None)
                return
            numbers = self.catalogue.find(ids)
            if bool((numbers < 0).any()) or len(np.unique(numbers)) != len(numbers):
                raise ValueError("ids must be in the catalogue, each given once")
            vectors = check_operand("vectors", vectors, (torch.float32,), "(n, d)", (len(numbers), self._table.dim))
            if not bool(vectors.isfinite().all()):
                raise ValueError("vectors must be finite, got NaN or infinity")
            self._table.upsert(torch.from_numpy(numbers).to(self._device), vectors.to(self._device))
            self._serving = replace(self._serving, table=self._table.snapshot())

    @property
    def current(self) -> Serving:
        """What is served now, for a look at its stages one by one."""
        return self._serving

    @torch.no_grad()
    def _published(self, table: ItemTable | None) -> Serving:
        model = copy.deepcopy(self._model).to(self._device).eval().requires_grad_(False)
        if table is None:
            table = ItemTable.from_rows(model.item_vectors(), dtype=self._dtype)
        self._table = table.to(self._device)  # what writers update; readers have snapshots of it
        return Serving(model, self._table.snapshot())

    # ---- files ----

    def save(self, folder: str | Path) -> None:
        """Write settings, weights, table and catalogue into a new folder, which is there whole or not at all.

        Args:
            folder: that is not there yet, or is empty.

        Raises:
            FileExistsError: the folder holds something.
            ValueError: the retriever was made without an experiment, which has the settings.
        """
        if self.experiment is None:
            raise ValueError("experiment must be given to a retriever that is to be saved, got None")
        serving = self._serving
        with _new_folder(Path(folder)) as new:
            self.experiment.save(new / _EXPERIMENT)
            save_file({name: x.contiguous() for name, x in serving.model.state_dict().items()}, new / _WEIGHTS)
            serving.table.save(new / _TABLE)
            self.catalogue.save(new / _ITEMS)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", mmap: bool = False) -> "Retriever":
        """What `save` has written.

        Args:
            folder: that it has written.
            device: where to serve.
            mmap: leave the table's rows in the file, as `ItemTable.load` does; `refresh` then takes no vectors.

        Raises:
            FileNotFoundError: the folder or one of its files is not there.
            ValueError: a file does not hold what it should; the message names it.
        """
        folder = Path(folder)
        experiment = Experiment.load(folder / _EXPERIMENT)
        catalogue = Catalogue.load(folder / _ITEMS)
        model = experiment.build(len(catalogue))
        try:
            model.load_state_dict(_tensors(folder / _WEIGHTS))
        except RuntimeError as error:
            raise ValueError(f"{folder / _WEIGHTS}: {error}") from None
        table = ItemTable.load(folder / _TABLE, mmap=mmap)
        return cls(model, catalogue, table=table, device=device, experiment=experiment)

    @classmethod
    def from_run(
        cls,
        folder: str | Path,
        interactions: Interactions | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Retriever":
        """The model of a run, by the weights of its best epoch.

        Args:
            folder: of the run.
            interactions: its data set, which names the items; None reads it from where the run did.
            dtype: of the table.
            device: where to serve.
        """
        experiment = Experiment.load(Path(folder) / _EXPERIMENT)
        interactions = interactions or experiment.data.read()
        model = load_model(folder, interactions.num_items)
        catalogue = Catalogue(interactions.item_ids, interactions.titles)
        return cls(model, catalogue, dtype=dtype, device=device, experiment=experiment)


def check_at_least_1(**sizes: Any) -> None:
    """That arguments are ints, 1 or more."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")


def check_histories(histories: Histories, N: int) -> None:
    """That they are histories of items numbered below N."""
    items = check_tensor("histories.items", histories.items, (torch.int64,), (1,))
    offsets = check_tensor("histories.offsets", histories.offsets, (torch.int64,), (1,))
    check_operand("histories.feedback", histories.feedback, (torch.bool,), "(n,)", (len(items),))
    if len(offsets) == 0 or int(offsets[0]) != 0 or int(offsets[-1]) != len(items):
        raise ValueError(f"histories.offsets must run from 0 to the {len(items)} items, got {_ends(offsets)}")
    check_offsets("histories.offsets", offsets, len(items))
    wrong = (items < 0) | (items >= N)
    if bool(wrong.any()):
        raise ValueError(f"histories.items: {int(items[wrong][0])} is out of range; they take numbers below {N}")


def _ends(offsets: Tensor) -> str:
    return f"{int(offsets[0])} to {int(offsets[-1])}" if len(offsets) else "none"


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends, on disk as well; if it raises, it is gone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; take another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        yield beside
        for path in beside.iterdir():
            path.chmod(0o644)  # safetensors lets nobody else read
            to_disk(path)
        to_disk(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside)
        raise
    to_disk(folder.parent)


def to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would be there after the system has failed."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
