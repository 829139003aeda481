"""`NearestNeighbors` beside scikit-learn's, and scikit-learn's checks of estimators."""

import pickle
from typing import Any

import numpy as np
import pytest

sklearn_neighbors: Any = pytest.importorskip("sklearn.neighbors")
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402  needs scikit-learn

from grank_kernels.adapters.sklearn import NearestNeighbors  # noqa: E402

X, Q = np.split(np.random.default_rng(1).standard_normal((220, 9)).astype(np.float32), [200])


def pair(metric: str) -> tuple[NearestNeighbors, Any]:
    theirs = sklearn_neighbors.NearestNeighbors(n_neighbors=6, metric=metric, algorithm="brute")
    return NearestNeighbors(n_neighbors=6, metric=metric).fit(X), theirs.fit(X)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("queries", [Q, None], ids=["queries", "rows without themselves"])
def test_neighbours_are_those_of_scikit_learn(metric: str, queries: Any) -> None:
    ours, theirs = pair(metric)
    for got, wanted in zip(ours.kneighbors(queries), theirs.kneighbors(queries), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(ours.kneighbors(queries, 3, False), theirs.kneighbors(queries, 3, False))
    for mode in ("connectivity", "distance"):
        got, wanted = (each.kneighbors_graph(queries, mode=mode) for each in (ours, theirs))
        np.testing.assert_allclose(got.toarray(), wanted.toarray(), atol=1e-5)


def test_euclidean_distances_are_exact_far_from_the_origin() -> None:
    x = X + np.float32(5000)
    distances, ids = NearestNeighbors().fit(x).kneighbors(x)
    direct = np.sqrt(np.square(x[:, None].astype(np.float64) - x).sum(2))
    wanted = np.argsort(direct, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(distances, np.take_along_axis(direct, wanted, 1), rtol=1e-6)


@parametrize_with_checks([NearestNeighbors(), NearestNeighbors(metric="cosine")])
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def test_a_copy_finds_the_same() -> None:
    ours, _ = pair("euclidean")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).kneighbors(Q), ours.kneighbors(Q))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"metric": "manhattan"}, "metric must be 'euclidean' or 'cosine', got 'manhattan'"),
        ({"algorithm": "ball_tree"}, "algorithm must be 'brute' or 'auto', got 'ball_tree'"),
        ({"n_neighbors": 0}, "n_neighbors must be 1 or more, got 0"),
    ],
)
def test_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NearestNeighbors(**parameters).fit(X)


def test_more_neighbours_than_rows() -> None:
    with pytest.raises(
        ValueError, match=r"Expected n_neighbors <= n_samples_fit, but n_neighbors = 5, n_samples_fit = 4"
    ):
        NearestNeighbors().fit(X[:5]).kneighbors()
