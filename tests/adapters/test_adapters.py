"""The index under FAISS's names: its own contract, and agreement with FAISS."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grank_kernels.adapters.faiss import IndexFlatIP

RANDOM = np.random.default_rng(1)
ROWS, QUERIES = (RANDOM.integers(-9, 10, (n, 6)).astype(np.float32) for n in (40, 3))  # sums are exact in float32


def expected(rows: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By (score descending, id ascending)."""
    scores = QUERIES @ rows.T
    order = np.stack([np.lexsort((ids, -own)) for own in scores])[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    D = np.pad(np.take_along_axis(scores, order, 1), missing, constant_values=np.finfo(np.float32).min)
    return D, np.pad(ids[order], missing, constant_values=-1)


def assert_found(index: IndexFlatIP, rows: np.ndarray, ids: np.ndarray) -> None:
    assert index.ntotal == len(rows)
    for k in (1, 7, 50):
        D, I = index.search(QUERIES, k)  # noqa: E741  FAISS's names
        assert (D.dtype, I.dtype, D.shape) == (np.float32, np.int64, (3, k))
        wanted = expected(rows, ids, k)
        assert (wanted[0] == D).all()
        assert (wanted[1] == I).all()


def test_rows_without_ids_are_numbered_anew_when_some_go() -> None:
    index = IndexFlatIP(6)
    assert_found(index, ROWS[:0], np.arange(0))
    index.add(ROWS[:30])
    assert_found(index, ROWS[:30], np.arange(30))
    assert index.remove_ids(np.array([3, 0, 29, 77, -1, 3])) == 3
    kept = np.delete(ROWS[:30], [3, 0, 29], 0)
    assert_found(index, kept, np.arange(27))
    index.add(ROWS[30:])
    assert index.remove_ids([26, 27]) == 2
    assert_found(index, np.concatenate([kept[:26], ROWS[31:]]), np.arange(35))
    index.reset()
    index.add(ROWS)
    assert_found(index, ROWS, np.arange(40))


def test_rows_with_ids_keep_them() -> None:
    index, ids = IndexFlatIP(6), RANDOM.permutation(1000)[:40]
    assert index.remove_ids([1]) == 0
    index.add_with_ids(ROWS, ids)
    assert_found(index, ROWS, ids)
    assert index.remove_ids(np.append(ids[5:9], 1001)) == 4
    assert_found(index, np.delete(ROWS, range(5, 9), 0), np.delete(ids, range(5, 9)))
    index.add_with_ids(ROWS[5:6], ids[5:6])
    with pytest.raises(ValueError, match=f"ids must be new, got {ids[0]}, which is in the index"):
        index.add_with_ids(ROWS[:1], ids[:1])
    with pytest.raises(ValueError, match="rows must all be added with ids, or all without"):
        index.add(ROWS)
    index.reset()
    index.add(ROWS)
    with pytest.raises(ValueError, match="rows must all be added with ids"):
        index.add_with_ids(ROWS[:1], [100])


def test_shapes_and_types() -> None:
    index = IndexFlatIP(6)
    index.add(ROWS.astype(np.float64))
    assert (index.d, index.ntotal, index.is_trained) == (6, 40, True)
    for wrong in (ROWS[0], ROWS[:, :5]):
        with pytest.raises(ValueError, match=r"x must be \(n, 6\), got"):
            index.search(wrong, 3)
    frozen = QUERIES[::-1, ::-1]
    frozen.setflags(write=False)
    assert (index.search(frozen.tolist(), 3)[1] == index.search(frozen, 3)[1]).all()


ids_of_a_step = st.lists(st.integers(-2, 60), max_size=8, unique=True)


@settings(max_examples=40)
@given(with_ids=st.booleans(), steps=st.lists(st.tuples(st.integers(0, 6), ids_of_a_step), max_size=6))
def test_it_says_what_faiss_says(with_ids: bool, steps: list[tuple[int, list[int]]]) -> None:
    """Scores; and ids where no two scores are equal, whose order FAISS leaves open."""
    faiss: Any = pytest.importorskip("faiss")
    ours, flat = IndexFlatIP(6), faiss.IndexFlatIP(6)
    theirs = faiss.IndexIDMap(flat) if with_ids else flat
    random, first = np.random.default_rng(2), 0
    for count, gone in steps:
        rows = random.integers(-9, 10, (count, 6)).astype(np.float32)
        for index in (ours, theirs):
            if with_ids:
                index.add_with_ids(rows, 3 * np.arange(first, first + count))
            else:
                index.add(rows)
        first += count
        assert ours.remove_ids(np.array(gone, np.int64)) == theirs.remove_ids(np.array(gone, np.int64))
        assert ours.ntotal == theirs.ntotal
        got, answer = ours.search(QUERIES, 9), theirs.search(QUERIES, 9)
        assert (got[0] == answer[0]).all()
        for scores, found, wanted in zip(*got, answer[1], strict=True):
            single = np.array([(scores == score).sum() == 1 for score in scores])
            single[-1] = False  # it may have an equal beyond the end
            assert (found[single] == wanted[single]).all()
            assert ((found < 0) == (wanted < 0)).all()
