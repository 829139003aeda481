"""What `grank recommend` does: to one user on the terminal, to all users in a file or a folder of files."""

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grank_kernels.common.atomic_files import replace_file
from grank_kernels.recommender.cli.text import note, printable
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import Retriever
from grank_kernels.recommender.serving.users import Users
from grank_kernels.recommender.training.run_folder import ITEMS

if TYPE_CHECKING:
    from grank_kernels.recommender.training.experiment import Experiment

_AROUND = 500  # ids on each side, in their order, among which the nearest are looked for


# ---- ids ----


def typed(name: str, ids: npt.NDArray[Any], option: str) -> str | int:
    """An id of the type that `ids` (n,) have."""
    if ids.dtype.kind not in "iu":
        return name
    if not re.fullmatch("-?[0-9]+", name):
        raise ValueError(f"{option} must be an integer, as the ids of the data set, got {name!r}")
    return int(name)


def nearest(name: str | int, ids: npt.NDArray[Any], most: int = 3) -> str:
    """The ids most like an unknown one, in words."""
    ordered = np.sort(ids)
    place = int(np.searchsorted(ordered, np.asarray(name, object) if isinstance(name, int) else name))
    around = [str(each) for each in ordered[max(place - _AROUND, 0) : place + _AROUND].tolist()]
    found = difflib.get_close_matches(str(name), around, n=most, cutoff=0.0)
    return f"the nearest are {', '.join(found)}" if found else "there is none"


def known_items(given: list[str], catalogue: Catalogue) -> list[Any]:
    """Item ids of --history."""
    ids = [typed(name, catalogue.ids, "--history") for name in given]
    for name, number in zip(ids, catalogue.find(ids), strict=True):
        if number < 0:
            raise ValueError(f"histories: item {name} is not in the catalogue; {nearest(name, catalogue.ids)}")
    return ids


def history_of(user: str, retriever: Retriever, experiment: "Experiment") -> Histories:
    """The history of a user of the data set."""
    interactions = experiment.data.read()
    name = typed(user, interactions.user_ids, "--user")
    users = Users.of(interactions, retriever.catalogue, experiment.data.positive)
    _note_skipped(users.skipped, interactions)
    place = (users.ids == name).nonzero()[0]
    if len(place) == 0:
        data = experiment.data
        name_of_data = Path(data.path).name if data.name == "own" and data.path else data.name
        raise ValueError(
            f"--user must be a user of {name_of_data}, got {user}; {nearest(name, users.ids)}; "
            "--history ITEM,ITEM,... recommends to somebody new"
        )
    return users.histories.select(torch.from_numpy(place))


def allowed(catalogue: Catalogue, only: Path | None, exclude: Path | None) -> Tensor | None:
    """(N,) bool: the items of the file `only` that are not in the file `exclude`; None without both."""
    if only is None and exclude is None:
        return None
    allow = torch.ones(len(catalogue), dtype=torch.bool) if only is None else _among(catalogue, only)
    if exclude is not None:
        allow &= ~_among(catalogue, exclude)
    if not bool(allow.any()):
        raise ValueError("--only-file and --exclude-file must leave an item of the catalogue, got none")
    return allow


def _among(catalogue: Catalogue, path: Path) -> Tensor:
    from grank_kernels.recommender.data.own_file import read_ids

    texts = read_ids(path)
    numbers = {str(name): number for number, name in enumerate(catalogue.ids.tolist())}
    found = torch.zeros(len(catalogue), dtype=torch.bool)
    known = [numbers[text] for text in texts if text in numbers]
    found[known] = True
    if len(known) < len(texts):
        note(f"{len(texts) - len(known):,} of {len(texts):,} items of {path} are not in the catalogue of the model")
    return found


def offer(folder: Path, items: Path) -> None:
    """Write the items of a file as the offered ones of a run or an export, and their titles if it has such.

    Raises:
        FileNotFoundError: the folder holds no catalogue.
        ValueError: an item that the model does not know: without events it has no vector.
    """
    from grank_kernels.recommender.data.own_file import has_titles, read_ids, read_titles

    catalogue = Catalogue.load(folder / ITEMS)
    texts = set(read_ids(items))
    known = [str(name) for name in catalogue.ids.tolist()]
    new = sorted(texts.difference(known))
    if new:
        raise ValueError(
            f"{items} must hold items of the model, got {len(new):,} others, e.g. {new[0]}: an item without events "
            "cannot be placed; leave it out, or train again with its events"
        )
    before = np.ones(len(known), bool) if catalogue.offered is None else catalogue.offered
    offered = np.array([name in texts for name in known], bool)
    titles = catalogue.titles
    if has_titles(items):
        found = read_titles(items, catalogue.ids)
        old = titles or [f"item {name}" for name in known]
        titles = tuple(found.get(name, other) for name, other in zip(catalogue.ids.tolist(), old, strict=True))
    Catalogue(catalogue.ids, titles, offered).save(folder / ITEMS)
    added, removed = int((offered & ~before).sum()), int((before & ~offered).sum())
    print(f"{int(offered.sum()):,} of {len(known):,} items are offered: {added:,} added, {removed:,} removed")


# ---- output ----


def show(retriever: Retriever, histories: Histories, k1: int, k2: int, allow: Tensor | None) -> None:
    """Print the items of one user: rank, score, id and title."""
    catalogue = retriever.catalogue
    seen = catalogue.of(histories.items[-3:].numpy())
    titles = "; ".join(printable(catalogue.title(name)) for name in seen)
    print(f"{len(histories.items)} items seen, last: {titles or 'none'}")
    best = retriever.retrieve(histories, k1, k2, allow=allow)
    if bool(best.popular[0]):
        print("no history: the most popular items, with their number of interactions as score")
    for place, (score, name) in enumerate(zip(best.scores[0].tolist(), best.ids[0].tolist(), strict=True), 1):
        if name != catalogue.missing:
            print(f"{place:>4}  {score:>9.4f}  {printable(str(name)):>10}  {printable(catalogue.title(name))}")


def to_file(
    retriever: Retriever,
    experiment: "Experiment",
    out: Path,
    sizes: dict[str, int],
    allow: Tensor | None,
    *,
    quiet: bool,
) -> None:
    """Write the items of all users into one CSV or Parquet file: user, rank, item, score, title."""
    import pyarrow
    from pyarrow import csv, parquet
    from tqdm import tqdm

    interactions = experiment.data.read()
    users = Users.of(interactions, retriever.catalogue, experiment.data.positive)
    _note_skipped(users.skipped, interactions)
    rows = 0
    with replace_file(out) as file, tqdm(total=len(users.ids), unit=" users", disable=quiet or None) as bar:
        writer = None
        for table in _tables(retriever, users, sizes, allow):
            if writer is None:
                open_writer = csv.CSVWriter if out.suffix == ".csv" else parquet.ParquetWriter
                writer = open_writer(pyarrow.PythonFile(file, "w"), table.schema)
            writer.write_table(table)
            rows += len(table)
            bar.update(min(sizes["batch"], len(users.ids) - bar.n))
        if writer is not None:
            writer.close()
    print(f"{rows:,} items for {len(users.ids):,} users: {out}")


def _tables(retriever: Retriever, users: Users, sizes: dict[str, int], allow: Tensor | None) -> Iterator[Any]:
    import pyarrow

    catalogue = retriever.catalogue
    for part in torch.split(torch.arange(len(users.ids)), sizes["batch"]):
        best = retriever.retrieve(users.histories.select(part), sizes["k1"], sizes["k2"], allow=allow)
        there = best.scores.numpy() > -np.inf
        counts = there.sum(1)
        names = best.ids[there]
        titles = {} if catalogue.titles is None else {"title": [catalogue.title(name) for name in names.tolist()]}
        ranks = np.broadcast_to(np.arange(1, there.shape[1] + 1), there.shape)[there]
        columns = {"user": np.repeat(users.ids[part.numpy()], counts), "rank": ranks, "item": names}
        yield pyarrow.table(columns | {"score": best.scores.numpy()[there]} | titles)


def to_folder(
    served: "Callable[[bool], tuple[Retriever, Experiment]]", out: Path, sizes: dict[str, int], *, quiet: bool
) -> None:
    """Write the items of all users into a folder of Parquet files, also under torchrun."""
    from tqdm import tqdm

    from grank_kernels.recommender.serving import offline

    request = offline.Request(**sizes)
    with offline.launched() as ranks:
        first = ranks is None or ranks.rank == 0
        retriever, experiment = served(ranks is not None)
        interactions = experiment.data.read()
        users = Users.of(interactions, retriever.catalogue, experiment.data.positive)
        if first:
            _note_skipped(users.skipped, interactions)
        disable = None if first and not quiet else True  # None: where standard error is no terminal
        with tqdm(unit=" users", disable=disable) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            paths = offline.retrieve_all(retriever, users, out, request, ranks=ranks, progress=progress)
        if first:
            print(f"{len(users.ids)} users in {len(paths)} files: {out}")


def _note_skipped(items: int, interactions: Interactions) -> None:
    if items:
        note(
            f"{items:,} of {interactions.num_items:,} items of the data set are not in the catalogue of the model and "
            "are left out of the histories"
        )
