"""Catalogue: ids of every type are found exactly, and the mark of a missing item is never an id."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from grank_kernels.recommender.serving.catalogue import Catalogue

LARGE = 2**63 + 5

IDS: dict[str, Any] = {
    "small": [3, 1, 2],
    "int32": np.array([3, 1, 2], np.int32),
    "above 2^53": np.arange(2**62, 2**62 + 100, dtype=np.uint64),
    "on both sides of 2^63": [1, LARGE, 9],
    "uint64": np.array([1, LARGE, 2**64 - 1], np.uint64),
    "signed hashes": [-(2**63), 2**63 - 1, -1, 7],
    "strings": ["b", "a", "x,y", "été"],
    "objects": np.array(["b", "a"], object),
}


@pytest.mark.parametrize("name", IDS)
def test_every_id_is_found_and_no_other(name: str) -> None:
    ids = np.asarray(IDS[name], object).tolist()
    catalogue = Catalogue(IDS[name])
    numbers = np.arange(len(ids))
    assert catalogue.find(ids).tolist() == numbers.tolist()
    assert catalogue.find(catalogue.ids).tolist() == numbers.tolist()
    assert catalogue.of(numbers).tolist() == ids
    assert catalogue.find(catalogue.of(numbers[::-1])).tolist() == numbers[::-1].tolist()
    if not isinstance(ids[0], str):
        near = {number + step for number in ids for step in (-1, 1)} - set(ids)
        for other in (*near, -(2**70), 2**70):
            assert catalogue.find([other]).tolist() == [-1]
        assert catalogue.find(np.array([2**64 - 1], np.uint64)).tolist() == [
            ids.index(2**64 - 1) if 2**64 - 1 in ids else -1
        ]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True), st.lists(st.integers(-(2**65), 2**65)))
def test_integers_are_compared_exactly(ids: list[int], others: list[int]) -> None:
    places = {name: number for number, name in enumerate(ids)}
    assert Catalogue(ids).find([*ids, *others]).tolist() == [places.get(name, -1) for name in [*ids, *others]]


@pytest.mark.parametrize(
    ("ids", "missing"),
    [([5, 0], -1), ([LARGE], -1), ([-2], -1), ([-1, 5], -2), ([-1, -2, -4], -3), ([-1, -2, -3], -4), (["a"], "")],
)
def test_the_mark_of_a_missing_item_is_no_id(ids: Any, missing: Any) -> None:
    catalogue = Catalogue(ids)
    assert catalogue.missing == missing
    assert catalogue.of(np.array([[0, -1]])).tolist() == [[ids[0], missing]]
    assert Catalogue(np.array(ids)[:0]).of(np.array([-1])).tolist() == ["" if ids == ["a"] else -1]


@pytest.mark.parametrize("titles", [None, ["One", "Two"]])
def test_titles(titles: list[str] | None) -> None:
    catalogue = Catalogue(["a", "b"], titles)
    assert [catalogue.title(name) for name in ("b", "a")] == (["Two", "One"] if titles else ["b", "a"])
    for unknown in ("c", "Two"):
        with pytest.raises(KeyError, match=unknown):
            catalogue.title(unknown)


@pytest.mark.parametrize(
    ("ids", "titles", "error", "message"),
    [
        ([1, 1], None, ValueError, "ids must be unique, got 1 more than once"),
        (["", "a"], None, ValueError, 'ids must not be ""'),
        ([[1]], None, ValueError, r"ids must be of shape \(n,\), got \(1, 1\)"),
        ("abc", None, ValueError, r"ids must be of shape \(n,\), got \(\)"),
        ([-1, LARGE], None, ValueError, "ids must all fit int64 or all fit uint64, got -1 and 9223372036854775813"),
        ([2**64], None, ValueError, "ids must all fit int64"),
        ([1.5], None, TypeError, "ids must be integers only or strings only, got float"),
        ([True, False], None, TypeError, "ids must be integers only or strings only, got bool"),
        ([1, "a"], None, TypeError, "ids must be integers only or strings only, got int and str"),
        (["a", None], None, TypeError, "ids must be integers only or strings only, got NoneType and str"),
        ([1, 2], ["one"], ValueError, "titles must be as many as ids, got 1 and 2"),
        (["a", "b"], {"b": "Title b", "a": "Title a"}, TypeError, "titles must be a sequence of strings .* got dict"),
        (["a", "b"], "AB", TypeError, "titles must be a sequence of strings .* got str"),
        (["a", "b"], ["A", None], TypeError, "titles must be strings, got NoneType"),
    ],
)
def test_ids_and_titles_that_do_not_fit_are_refused(ids: Any, titles: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Catalogue(ids, titles)


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [(["a"], [1], "item ids must be strings"), ([1], ["1"], "item ids must be integers"), ([1], [1.0], "got float")],
)
def test_ids_of_another_type_are_not_looked_up(ids: Any, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Catalogue(ids).find(given)


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("name", IDS)
def test_files_keep_ids_and_titles(name: str, titles: bool, tmp_path: Path) -> None:
    saved = Catalogue(IDS[name], [f"Title {n} é" for n in range(len(IDS[name]))] if titles else None)
    saved.save(tmp_path / "items.parquet")
    loaded = Catalogue.load(tmp_path / "items.parquet")
    assert loaded.ids.tolist() == saved.ids.tolist()
    assert loaded.titles == saved.titles


@pytest.mark.parametrize(
    "columns",
    [
        {"name": ["a"]},
        {"id": [1, None]},
        {"id": ["a", None]},
        {"id": [0.5]},
        {"id": [[1]]},
        {"id": ["a", "b"], "title": ["A", None]},
        {"id": [b"a"]},
    ],
)
def test_files_of_something_else_are_refused_by_name(columns: Any, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=r"items\.parquet must be a Parquet file of item ids and titles, got"):
        Catalogue.load(path)
