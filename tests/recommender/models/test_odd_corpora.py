"""Every model under every protocol on odd corpora: a plain error before the first step, or an epoch and its metrics."""

from collections.abc import Iterable, Iterator

import pytest
import torch

from grank_kernels.recommender.data import Interactions, Split, TrainingWindows, half_and_half, leave_one_out
from grank_kernels.recommender.models import Recommender
from grank_kernels.recommender.models.registry import MODELS, build_model, model_settings
from grank_kernels.recommender.models.trainable import check_trainable
from grank_kernels.recommender.training.evaluation import evaluate_model

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {
    "dual_tower": {"hidden": 8, "history": 12, "horizon": 2},
    "grank": {"short_history": 6, "long_history": 12, "hidden": 8, "negatives": 4},
    "sequential": {"history": 12},
    "unigrf": {"history": 12, "enhancer_after": 0, "enhancer_pool": 6, "hard_negatives": 2},
}
TARGETS, CONTEXT = 6, 4


def corpus(rows: Iterable[tuple[int, int]], rating: int | None = 5) -> Interactions:
    users, items = zip(*rows, strict=True)
    return Interactions.from_columns(users, items, ratings=None if rating is None else [rating] * len(users))


def grid(users: int, rows: int, items: int) -> Iterator[tuple[int, int]]:
    return ((user, (7 * user + row) % items) for user in range(users) for row in range(rows))


CORPORA = {
    "eight items": lambda: corpus(grid(50, 5, 8)),
    "one item": lambda: corpus(grid(20, 4, 1)),
    "two items in turns": lambda: corpus(grid(20, 9, 2)),
    "one row a user": lambda: corpus(grid(40, 1, 30)),
    "two rows a user": lambda: corpus(grid(40, 2, 30)),
    "three rows a user": lambda: corpus(grid(40, 3, 30)),
    "one user": lambda: corpus(grid(1, 12, 30)),
    "one user of three rows": lambda: corpus(grid(1, 3, 30)),
    "one long user": lambda: corpus([(0, item) for item in range(60)] + [(u, u) for u in range(1, 40)]),
    "everyone met everything": lambda: corpus(grid(20, 12, 12)),
    "nobody liked anything": lambda: corpus(grid(20, 12, 30), rating=1),
    "no ratings": lambda: corpus(grid(20, 12, 30), rating=None),
}
PROTOCOLS = {
    "keep": lambda data: leave_one_out(data),
    "first": lambda data: leave_one_out(data, repeats="first"),
    "last": lambda data: leave_one_out(data, repeats="last"),
    "half": lambda data: half_and_half(data, least=2, validation=2, test=2),
    "half, first": lambda data: half_and_half(data, least=2, validation=2, test=2, repeats="first"),
}
NO_HISTORY = "train must have a history of 2 items or more"
NO_CASE = "validation must have a case, got 0"
NO_USERS = "validation and test must leave users to train on"
REFUSED = {  # (corpus, protocol) -> error
    ("one item", "first"): NO_HISTORY,
    ("one item", "last"): NO_HISTORY,
    ("one item", "half, first"): NO_USERS,
    ("two items in turns", "first"): NO_CASE,
    ("two items in turns", "last"): NO_CASE,
    **{("one row a user", protocol): NO_HISTORY for protocol in ("keep", "first", "last")},
    **{("one row a user", protocol): NO_USERS for protocol in ("half", "half, first")},
    **{("two rows a user", protocol): NO_CASE for protocol in ("keep", "first", "last")},
    **{("three rows a user", protocol): NO_HISTORY for protocol in ("keep", "first", "last")},
    **{("one user", protocol): NO_USERS for protocol in ("half", "half, first")},
    **{("one user of three rows", protocol): NO_HISTORY for protocol in ("keep", "first", "last")},
    **{("one user of three rows", protocol): NO_USERS for protocol in ("half", "half, first")},
    **{("one long user", protocol): NO_USERS for protocol in ("half", "half, first")},
    **{("nobody liked anything", protocol): NO_USERS for protocol in ("half", "half, first")},
}


def model(name: str, items: int, softmax: str) -> Recommender:
    torch.manual_seed(0)
    return build_model(name, items, model_settings(name, {"dim": 8, "softmax": softmax, **SETTINGS[name]}))


def an_epoch(trained: Recommender, split: Split) -> None:
    trained.observe(split.train)
    optimizer = torch.optim.SGD(trained.train().parameters(), lr=0.01)
    for batch in TrainingWindows(split.train, targets=TARGETS, context=CONTEXT, batch_items=200):
        optimizer.zero_grad()
        loss = trained.objective(trained.losses(batch))
        assert loss.isfinite()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("softmax", ["corpus", pytest.param("batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("model_name", MODELS)
def test_it_trains_or_says_why_not(model_name: str, name: str, protocol: str, softmax: str) -> None:
    def prepared() -> tuple[Recommender, Split]:
        split = PROTOCOLS[protocol](CORPORA[name]())
        fresh = model(model_name, split.num_items, softmax)
        check_trainable(fresh, split, targets=TARGETS, context=CONTEXT)
        return fresh, split

    if (name, protocol) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, protocol]):
            prepared()
        return
    trained, split = prepared()
    an_epoch(trained, split)
    for sums in evaluate_model(trained.eval(), split.test, (10, 50), k1=(10,)).values():
        assert all(0 <= value <= 1 for value in sums.means().values())


def split_of(*lengths: int) -> Split:
    return leave_one_out(corpus((user, row) for user, length in enumerate(lengths) for row in range(length)))


@pytest.mark.parametrize("name", ["sequential", "unigrf"])
def test_windows_must_fit_the_history_that_a_model_reads(name: str) -> None:
    split = split_of(40, 40)
    trained = model(name, split.num_items, "corpus")
    check_trainable(trained, split, targets=12)
    check_trainable(trained, split, targets=9, context=4)
    an_epoch(trained, split)
    with pytest.raises(ValueError, match=r"targets \+ context must be at most 13, a history of 12 .*, got 13 \+ 1 and"):
        check_trainable(trained, split, targets=13)
    short = split_of(15, 9)  # histories of at most 13: each is one window
    check_trainable(model(name, short.num_items, "corpus"), short, targets=200)


@pytest.mark.parametrize("name", ["dual_tower", "grank"])
def test_other_models_read_the_newest_of_a_longer_window(name: str) -> None:
    check_trainable(model(name, 40, "corpus"), split_of(40, 40), targets=200)


def test_every_process_needs_a_case() -> None:
    split = split_of(9, 9)
    trained = model("sequential", split.num_items, "corpus")
    check_trainable(trained, split, targets=6, ranks=2)
    with pytest.raises(ValueError, match="validation must have 3 cases, one for each process, got 2"):
        check_trainable(trained, split, targets=6, ranks=3)
    check_trainable(trained, split, targets=6, ranks=3, validate=False)


def test_model_and_split_must_have_one_corpus() -> None:
    split = split_of(9, 9)
    with pytest.raises(ValueError, match="model must have the 9 items of the split, got one of 8"):
        check_trainable(model("sequential", 8, "corpus"), split, targets=6)
