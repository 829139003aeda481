"""Retriever: what it answers, whom it refuses, what it saves, and that nobody sees half of a refresh."""

import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grank_kernels.recommender.data import Batch, Histories
from grank_kernels.recommender.models import DualTowerConfig, GRankConfig, Recommender, SequentialConfig, UniGRFConfig
from grank_kernels.recommender.models.registry import MODELS
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.retriever import DTYPES, Retriever
from grank_kernels.recommender.training.experiment import Experiment

pytestmark = pytest.mark.usefixtures("one_thread")

N = 60
GRANK = GRankConfig(dim=16, short_history=6, long_history=12, hidden=24)
MODELS_SERVED: dict[str, tuple[str, Any]] = {
    "dual tower": ("dual_tower", DualTowerConfig(dim=16, history=8)),
    "grank": ("grank", GRANK),
    "grank, auxiliary branch": ("grank", replace(GRANK, ranker=False)),
    "grank, retrieval only": ("grank", replace(GRANK, ranker=False, auxiliary=False)),
    "sasrec": ("sequential", SequentialConfig(dim=16, history=8)),
    "unigrf": ("unigrf", UniGRFConfig(dim=16, history=8)),
}
IDS = [f"film-{(7 * row) % N:02}" for row in range(N)]  # in no order
HISTORIES = [[3, 9, 27, 1], [5], [], list(range(20))]
FEEDBACK = [[True, False, True, True], [False], [], [item % 3 > 0 for item in range(20)]]


def experiment_of(name: str) -> Experiment:
    model, settings = MODELS_SERVED[name]
    return Experiment(model, settings)


def build(name: str) -> Recommender:
    """With every part at work: many start too small to matter."""
    model = experiment_of(name).build(N).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=MODELS_SERVED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def retriever_of(name: str, **options: Any) -> Retriever:
    return Retriever(build(name), Catalogue(IDS, [f"Film {row}" for row in range(N)]), **options)


def names(rows: list[int]) -> list[str]:
    return [IDS[row] for row in rows]


@torch.no_grad()
def expected(model: Recommender, k1: int, k2: int) -> list[dict[str, float]]:
    """By user: the ids and scores that plain torch finds, k1 by inner product, then k2 by the model's own `rank`."""
    answers = []
    for seen, liked in zip(HISTORIES, FEEDBACK, strict=True):
        batch = Histories.from_lists([seen], [liked]).pad(model.history)
        if batch.items.shape[1] == 0:
            batch = Batch(torch.full((1, 1), -1), torch.zeros(1, 1, dtype=torch.bool))
        users = model.user_vectors(batch)
        logits = users @ model.item_vectors().T
        logits[0, seen] = -torch.inf
        best = logits.topk(min(k1, N - len(seen)))
        scores = model.rank(batch, users, best.indices, best.values)
        if not seen and bool((logits == logits[0, 0]).all()):  # the model likes all items alike: any will do
            answers.append({})
            continue
        order = scores[0].argsort(descending=True)[:k2]
        answers.append({IDS[int(best.indices[0, i])]: float(scores[0, i]) for i in order})
    return answers


@pytest.mark.parametrize(("k1", "k2"), [(12, 5), (N, N), (3 * N, 2 * N)])
def test_retrieves_and_ranks_as_the_model_would(name: str, k1: int, k2: int) -> None:
    model = build(name)
    retriever = Retriever(model, Catalogue(IDS))
    histories = retriever.histories([names(own) for own in HISTORIES], FEEDBACK)
    found = retriever.retrieve(histories, k1, k2)
    assert found.scores.shape == found.ids.shape == (len(HISTORIES), k2)
    for user, answer in enumerate(expected(model, k1, k2)):
        n = len(answer) or min(k2, N)
        if not answer:
            assert len(set(found.ids[user, :n])) == n
            continue
        assert set(found.ids[user, :n]) == set(answer)
        wanted = torch.tensor([answer[item] for item in found.ids[user, :n]])
        torch.testing.assert_close(found.scores[user, :n], wanted, rtol=1e-4, atol=1e-4)
        assert bool((found.scores[user, :n].diff() <= 0).all())
        assert (found.ids[user, n:] == "").all()
        assert bool((found.scores[user, n:] == -torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_every_dtype_find_nearly_the_same(dtype: torch.dtype) -> None:
    exact, rounded = (
        retriever_of("grank", dtype=own).retrieve([names([3, 9, 27])], 40, 20) for own in (DTYPES[0], dtype)
    )
    assert len(set(exact.ids[0]) & set(rounded.ids[0])) >= 16
    common = [item for item in exact.ids[0] if item in rounded.ids[0]]
    pick = [[list(own.ids[0]).index(item) for item in common] for own in (exact, rounded)]
    scale = float(exact.scores.abs().max())
    torch.testing.assert_close(exact.scores[0, pick[0]], rounded.scores[0, pick[1]], rtol=0, atol=0.03 * scale)


def test_users_without_a_history_and_no_users(name: str) -> None:
    retriever = retriever_of(name)
    cold = retriever.retrieve([[], []], 10, 5)
    assert bool(cold.scores.isfinite().all())
    assert torch.equal(cold.scores[0], cold.scores[1])
    assert retriever.retrieve([], 10, 5).ids.shape == (0, 5)


def test_text() -> None:
    assert repr(retriever_of("grank")) == f"Retriever(GRank of {N} items, ItemTable({N} x 16 float32, 0.00384 MB, cpu))"


def test_ids_may_be_integers() -> None:
    ids = np.arange(N)[::-1] * 1000
    retriever = Retriever(build("sasrec"), Catalogue(ids))
    found = retriever.retrieve([[1000, 5000]], N, N)
    assert set(found.ids[0].tolist()) == (set(ids.tolist()) - {1000, 5000}) | {-1}


# ---- refresh ----


def test_refresh_of_some_vectors_changes_these_items_alone() -> None:
    retriever = retriever_of("grank")
    before = retriever.retrieve([names([3, 9])], N, N)
    users = retriever.current.encode(retriever.histories([names([3, 9])]))[1]
    retriever.refresh([IDS[40]], users[:1] * 10)  # nothing has a larger product with this user
    after = retriever.retrieve([names([3, 9])], 1, 1)
    assert after.ids[0, 0] == IDS[40]
    retriever.refresh()  # the model's own again
    again = retriever.retrieve([names([3, 9])], N, N)
    assert (again.ids == before.ids).all()
    assert torch.equal(again.scores, before.scores)


def test_the_folded_ranker_reads_refreshed_vectors_in_histories_too() -> None:
    """As if the model had had them from the beginning, but for the Generator, which keeps its own."""
    model = build("grank")
    retriever = Retriever(model, Catalogue(IDS))
    vectors = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    retriever.refresh([IDS[3], IDS[40]], vectors)
    histories = retriever.histories([names([3, 9, 5])])
    serving = retriever.current
    batch, users = serving.encode(histories)
    found = serving.search(histories, users, N)
    got = serving.model.rank_rows(serving.table, batch, users, found.indices, found.values)
    with torch.no_grad():
        model.items[[3, 40]] = vectors
        wanted = model.rank(batch, users, found.indices, found.values)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_model_may_be_trained_on_until_it_is_published() -> None:
    model = build("sasrec")
    retriever = Retriever(model, Catalogue(IDS))
    before = retriever.retrieve([names([1, 2])], 10, 10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert torch.equal(retriever.retrieve([names([1, 2])], 10, 10).scores, before.scores)
    retriever.refresh()
    assert torch.equal(
        retriever.retrieve([names([1, 2])], 10, 10).scores,
        Retriever(model, Catalogue(IDS)).retrieve([names([1, 2])], 10, 10).scores,
    )


class Constant(Recommender):
    """All weights are one number c; a score is c * c in both stages, so a mix of two versions shows."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.ranks = 4, True
        self.weight = torch.nn.Parameter(torch.ones(()))

    def item_vectors(self) -> Tensor:
        return self.weight.expand(N, 4).clone()

    def user_vectors(self, batch: Batch) -> Tensor:
        return self.weight.expand(len(batch.items), 4) / 4

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def rank(self, batch: Batch, users: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
        return logits + self.weight.square()


def test_no_request_sees_half_of_a_refresh() -> None:
    model = Constant()
    retriever = Retriever(model, Catalogue(IDS))
    stop, wrong, answered = threading.Event(), [], [0, 0, 0]

    def ask(thread: int) -> None:
        while not stop.is_set():
            scores = retriever.retrieve([names([1])], 8, 4).scores
            c = (scores[0, 0] / 2).sqrt()
            if not torch.equal(scores, torch.full((1, 4), float(scores[0, 0]))) or float(c) != round(float(c)):
                wrong.append(scores)
            answered[thread] += 1

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for c in range(2, 60):
        with torch.no_grad():
            model.weight.fill_(float(c))
        retriever.refresh()
    while min(answered) < 5:
        assert any(thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert float(retriever.retrieve([names([1])], 8, 4).scores[0, 0]) == 2 * 59.0**2


# ---- files ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_answers_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    retriever = retriever_of(name, experiment=experiment_of(name), dtype=dtype)
    retriever.refresh([IDS[7]], torch.randn(1, 16))
    retriever.save(tmp_path / "saved")
    loaded, mapped = (Retriever.load(tmp_path / "saved", mmap=mmap) for mmap in (False, True))
    histories = retriever.histories([names(own) for own in HISTORIES], FEEDBACK)
    one, *others = (own.retrieve(histories, 20, 10) for own in (retriever, loaded, mapped))
    for other in others:
        assert torch.equal(one.scores, other.scores)
        assert (one.ids == other.ids).all()
    with pytest.raises(ValueError, match="must be in memory to be updated"):
        mapped.refresh([IDS[7]], torch.randn(1, 16))
    assert loaded.experiment == retriever.experiment
    assert loaded.current.table.dtype == dtype
    assert loaded.catalogue.titles == retriever.catalogue.titles
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.fixture
def files_of_4096_bytes() -> Iterator[None]:
    """Longer files fail as on a full disk, for the library that writes the weights too."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("files_of_4096_bytes")
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    retriever = retriever_of("sasrec", experiment=experiment_of("sasrec"))
    with pytest.raises(OSError, match=r"saved: cannot write model\.safetensors: .*File too large"):
        retriever.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = retriever_of("sasrec", experiment=experiment_of("sasrec"))
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            retriever.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    retriever.save(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="path must be new or an empty folder"):
        retriever.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="experiment must be given"):
        retriever_of("sasrec").save(tmp_path / "other")


@pytest.mark.parametrize("file", ["model.safetensors", "table.safetensors", "items.parquet", "experiment.yaml"])
def test_damaged_files_are_named(file: str, tmp_path: Path) -> None:
    retriever_of("sasrec", experiment=experiment_of("sasrec")).save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=file):
        Retriever.load(tmp_path / "saved")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Retriever.load(tmp_path / "saved")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    for name in ("sasrec", "dual tower"):
        retriever_of(name, experiment=experiment_of(name)).save(tmp_path / name)
    weights = (tmp_path / "dual tower" / "model.safetensors").read_bytes()
    (tmp_path / "sasrec" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors must hold the weights of the model .*Missing key"):
        Retriever.load(tmp_path / "sasrec")


# ---- the door ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([["film-01"]], 10, 11), ValueError, "k2 must be at most k1, got 11 of 10"),
        (([["film-01"]], 0, 1), ValueError, "k1 must be 1 or more, got 0"),
        (([["film-01"]], 10, True), TypeError, "k2 must be an int, got bool"),
        ((["film-01"],), TypeError, "one list of item ids per user, got str 'film-01' in the place of a list"),
        (("film-01",), TypeError, "one list of item ids per user, got str 'film-01'"),
        (([5],), TypeError, "one list of item ids per user, got int 5"),
        (([["film-01"]], 10.0, 1), TypeError, "k1 must be an int, got float 10.0"),
        (([["film-01", "film-99"]],), ValueError, "item 'film-99' is not in the catalogue"),
        (([[1]],), TypeError, "item ids must be strings, as the catalogue's, got integers"),
        ((Histories.from_lists([[N]]),), ValueError, f"histories.items must be numbers below {N}, got {N}"),
        ((Histories.from_lists([[-1]]),), ValueError, f"histories.items must be numbers below {N}, got -1"),
        (
            (replace(Histories.from_lists([[1, 2]]), offsets=torch.tensor([0, 1])),),
            ValueError,
            "must run from 0 to 2, the number",
        ),
        (
            (replace(Histories.from_lists([[1], [2]]), offsets=torch.tensor([0, 3, 2])),),
            ValueError,
            "offsets must not decrease",
        ),
        (
            (replace(Histories.from_lists([[1]]), feedback=torch.ones(2) > 0),),
            ValueError,
            r"histories.feedback must be \(n,\) = \(1,\), got",
        ),
    ],
)
def test_requests_that_do_not_fit_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        retriever_of("sasrec").retrieve(*arguments)


@pytest.mark.parametrize(
    ("ids", "vectors", "error", "message"),
    [
        (["film-01"], None, ValueError, "given together, got ids without vectors"),
        (None, torch.ones(1, 16), ValueError, "given together, got vectors without ids"),
        (["film-99"], torch.ones(1, 16), ValueError, "ids must be in the catalogue, got 'film-99'"),
        (["film-02", "film-01", "film-01"], torch.ones(3, 16), ValueError, "unique, got 'film-01' more than once"),
        (["film-01"], [[1.0] * 16], TypeError, "vectors must be a torch.Tensor"),
        (["film-01"], torch.ones(1, 8), ValueError, r"vectors must be .*, got \(1, 8\)"),
        (["film-01"], torch.ones(1, 16).half(), ValueError, "vectors must be torch.float32, got torch.float16"),
        (["film-01"], torch.full((1, 16), torch.nan), ValueError, "vectors must be finite"),
    ],
)
def test_refreshes_that_do_not_fit_change_nothing(ids: Any, vectors: Any, error: type[Exception], message: str) -> None:
    retriever = retriever_of("sasrec")
    serving = retriever.current
    with pytest.raises(error, match=message):
        retriever.refresh(ids, vectors)
    assert retriever.current is serving


def test_what_it_is_made_of_is_checked() -> None:
    model, catalogue = build("sasrec"), Catalogue(IDS)
    with pytest.raises(TypeError, match="model must be a Recommender, got Linear"):
        Retriever(torch.nn.Linear(1, 1), catalogue)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="catalogue must be a Catalogue, got list"):
        Retriever(model, IDS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32.*got torch\.float64"):
        Retriever(model, catalogue, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"catalogue has {N - 1} items, and the table {N} rows"):
        Retriever(model, Catalogue(IDS[1:]))


def test_every_model_of_the_package_is_served() -> None:
    assert {model for model, _ in MODELS_SERVED.values()} == set(MODELS)
