"""FAISS's names beside FAISS: the same calls, the same results."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from faiss_pairs import (
    IDS,
    KINDS,
    RANDOM,
    Q,
    X,
    assert_found,
    assert_same,
    flat,
    named,
    named_once,
    named_squares,
    squares,
)

from grank_kernels import ItemTable
from grank_kernels.adapters import faiss as ours

theirs: Any = pytest.importorskip("faiss")

every_kind = pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)


# ---- each name beside FAISS ----


@every_kind
def test_search_and_attributes(build: Callable[[Any], Any]) -> None:
    index, other = build(ours), build(theirs)
    index.train(X)
    assert_found(index, other)
    for name in ("d", "ntotal", "metric_type", "is_trained", "metric_arg", "verbose"):
        assert getattr(index, name) == getattr(other, name)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "assign": lambda faiss, index: index.assign(Q, 300),
    "params": lambda faiss, index: index.search(Q, 300, params=faiss.SearchParameters()),
    "range": lambda faiss, index: index.range_search(Q, 60.0),
    "range of a selection": lambda faiss, index: index.range_search(
        Q, 60.0, params=faiss.SearchParameters(sel=faiss.IDSelectorRange(-50, 200))
    ),
    "range of none": lambda faiss, index: index.range_search(Q[:3], -1.0 if index.metric_type else 1e9),
    "range of all": lambda faiss, index: index.range_search(Q[:3], 1e9 if index.metric_type else -1e9),
    "repeated removal": lambda faiss, index: (index.remove_ids(np.array([3, 0, 299, 777, -1, 3])), index.ntotal),
    "removal of a range": lambda faiss, index: (index.remove_ids(faiss.IDSelectorRange(-20, 140)), index.ntotal),
    "reset": lambda faiss, index: (index.reset(), index.ntotal, *index.search(Q, 2)),
}


@every_kind
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call(build: Callable[[Any], Any], call: Callable[[Any, Any], Any]) -> None:
    index, other = build(ours), build(theirs)
    assert_same(call(ours, index), call(theirs, other))
    assert_found(index, other)


SELECTORS: dict[str, Callable[[Any], Any]] = {
    "batch": lambda faiss: faiss.IDSelectorBatch(np.arange(-90, 300, 7)),
    "batch of none": lambda faiss: faiss.IDSelectorBatch(np.arange(0)),
    "range": lambda faiss: faiss.IDSelectorRange(100, 250),
    "array": lambda faiss: faiss.IDSelectorArray(np.arange(5, 2000, 3)),
    "bitmap": lambda faiss: faiss.IDSelectorBitmap(np.arange(30, dtype=np.uint8)),
    "not": lambda faiss: faiss.IDSelectorNot(faiss.IDSelectorRange(0, 250)),
    "and": lambda faiss: faiss.IDSelectorAnd(faiss.IDSelectorRange(0, 90), faiss.IDSelectorRange(50, 250)),
    "or": lambda faiss: faiss.IDSelectorOr(faiss.IDSelectorRange(0, 90), faiss.IDSelectorRange(250, 260)),
    "xor": lambda faiss: faiss.IDSelectorXOr(faiss.IDSelectorRange(0, 90), faiss.IDSelectorRange(50, 250)),
    "all": lambda faiss: faiss.IDSelectorAll(),
}


@pytest.mark.parametrize("build", [flat, squares, named_once], ids=lambda build: build.__name__)
@pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)
def test_selector(build: Callable[[Any], Any], make: Callable[[Any], Any]) -> None:
    results, members = [], []
    for faiss in (ours, theirs):
        index, selector = build(faiss), make(faiss)
        members.append([selector.is_member(i) for i in (0, 7, 60, 255)])
        found = index.search(Q, 300, params=faiss.SearchParameters(sel=selector))
        results.append((*found, index.remove_ids(selector), *index.search(Q, 300)))
    assert members[0] == members[1]
    assert_same(*results)


@pytest.mark.parametrize("build", [flat, squares, named, named_squares], ids=lambda build: build.__name__)
def test_rows_are_read_back(build: Callable[[Any], Any]) -> None:
    index, other = build(ours), build(theirs)
    some = other.assign(Q[:1], 5)[0]
    assert_same(index.reconstruct(int(some[0])), other.reconstruct(int(some[0])))
    assert_same(index.reconstruct_batch(some), other.reconstruct_batch(some))
    got, wanted = index.search_and_reconstruct(Q, 303), other.search_and_reconstruct(Q, 303)
    negative = wanted[1][:, :300] < 0
    wanted[2][:, :300][negative] = got[2][:, :300][negative]  # FAISS has NaN in rows with a negative id
    assert_same(got, wanted)
    if build in (flat, squares):
        assert_same(index.reconstruct_n(), other.reconstruct_n())
        assert_same(index.reconstruct_n(5, 10), other.reconstruct_n(5, 10))
        assert_same(index.reconstruct_n(290), other.reconstruct_n(290))


def test_repeated_ids_are_kept() -> None:
    results = []
    for faiss in (ours, theirs):
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(6))
        index.add_with_ids(X[:4], np.array([5, 5, -3, 7]))
        before = (faiss.vector_to_array(index.id_map), index.reconstruct(5), *index.search(Q, 6))
        results.append((*before, index.remove_ids(np.array([5])), index.ntotal, index.reconstruct(7)))
    assert_same(*results)


@pytest.mark.parametrize("build", [flat, squares], ids=lambda build: build.__name__)
def test_merged_rows(build: Callable[[Any], Any]) -> None:
    results = []
    for faiss in (ours, theirs):
        one, two = build(faiss), build(faiss, Q)
        one.merge_from(two)
        results.append((one.ntotal, two.ntotal, *one.search(Q, 325)))
    assert_same(*results)


def test_merged_ids() -> None:
    results = []
    for faiss in (ours, theirs):
        one, two = named(faiss), named(faiss, Q)
        one.merge_from(two, 5000)
        results.append((one.ntotal, two.ntotal, faiss.vector_to_array(one.id_map), *one.search(Q, 325)))
    assert_same(*results)


@pytest.mark.parametrize("string", ["Flat", "IDMap,Flat", "IDMap2,Flat"])
@pytest.mark.parametrize("metric", [0, 1])
def test_factory(string: str, metric: int) -> None:
    results = []
    for faiss in (ours, theirs):
        index = faiss.index_factory(6, string, metric)
        if string == "Flat":
            index.add(X)
        else:
            index.add_with_ids(X, IDS)
        results.append((type(index).__name__, index.metric_type, *index.search(Q, 300)))
    assert_same(*results)


@pytest.mark.parametrize(("string", "error"), [("SQfp16", 2e-3), ("SQbf16", 1e-2), ("SQ8", 3e-2)])
def test_rows_of_fewer_bits(string: str, error: float) -> None:
    x = RANDOM.standard_normal((400, 32), np.float32)
    index = ours.index_factory(32, string, ours.METRIC_INNER_PRODUCT)
    index.add(x)
    assert index.table.dtype in (torch.float16, torch.bfloat16, torch.int8)
    exact = theirs.IndexFlatIP(32)
    exact.add(x)
    scores, wanted = index.search(x, 5)[0], exact.search(x, 5)[0]
    assert np.abs(scores - wanted).max() < error * wanted.max()


def test_metrics_have_their_numbers() -> None:
    names = [name for name in dir(theirs) if name.startswith("METRIC_")]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_rows_are_normalised_in_place() -> None:
    x = np.concatenate([RANDOM.standard_normal((50, 17), np.float32), np.zeros((1, 17), np.float32)])
    y = x.copy()
    ours.normalize_L2(x)
    theirs.normalize_L2(y)
    np.testing.assert_allclose(x, y, rtol=3e-7)
    for wrong in (x.astype(np.float64), x[0]):
        with pytest.raises(ValueError, match="x must be a writable float32 array"):
            ours.normalize_L2(wrong)


@pytest.mark.parametrize("metric", [0, 1])
def test_knn(metric: int) -> None:
    assert_same(
        ours.knn(Q, X, 300, metric), flat(theirs).search(Q, 300) if metric == 0 else squares(theirs).search(Q, 300)
    )


def test_results_are_written_to_arrays_given() -> None:
    index = flat(ours)
    D, I, R = np.empty((25, 300), np.float32), np.empty((25, 300), np.int64), np.empty((25, 300, 6), np.float32)  # noqa: E741
    found = index.search_and_reconstruct(Q, 300, D=D, I=I, R=R)
    assert found[0] is D
    assert_same((D, I, R), flat(theirs).search_and_reconstruct(Q, 300))
    with pytest.raises(ValueError, match=r"D must be an array float32 \(25, 2\), got float32 \(25, 300\)"):
        index.search(Q, 2, D=D)


def test_threads_are_torchs() -> None:
    before = torch.get_num_threads()
    try:
        ours.omp_set_num_threads(1)
        assert torch.get_num_threads() == ours.omp_get_max_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- numbers that are not ordinary ----


@pytest.mark.parametrize("build", [flat, squares], ids=lambda build: build.__name__)
def test_nan_and_infinity(build: Callable[[Any, np.ndarray], Any]) -> None:
    x = X[:9].copy()
    x[2, 1], x[4], x[6, 0], x[7, 0] = np.nan, 0, np.inf, 1e18
    x[8, 0] = -np.inf
    index, other = build(ours, x), build(theirs, x)
    queries = np.concatenate([X[:4], x])
    queries[0] = np.abs(queries[0]) + 1
    with np.errstate(all="ignore"):
        assert_found(index, other, queries[:1])
        for query in queries:
            got, wanted = index.search(query[None], 9), other.search(query[None], 9)
            assert set(got[1][0]) == set(wanted[1][0])


def test_distances_far_from_the_origin_are_exact() -> None:
    """The inner product alone has an error of 40 here: the candidates' distances decide."""
    x = RANDOM.standard_normal((500, 6)).astype(np.float32) + np.float32(3000)
    direct = np.square(x[:20, None].astype(np.float64) - x).sum(2)
    D, I = squares(ours, x).search(x[:20], 9)  # noqa: E741
    assert_same(I, np.argsort(direct, axis=1, kind="stable")[:, :9])
    assert_same(D, np.take_along_axis(direct, I, 1).astype(np.float32))


def test_equal_rows_are_all_found() -> None:
    x = np.repeat(X[:3], 100, 0)
    assert_same(squares(ours, x).search(Q, 150), squares(theirs, x).search(Q, 150))


# ---- growth, copies ----


def test_single_rows_wait_for_the_first_use() -> None:
    index, other = ours.IndexFlatIP(6), theirs.IndexFlatIP(6)
    row = np.empty((1, 6), np.float32)
    for i, x in enumerate(X):
        row[0] = x  # the index keeps a copy
        index.add(row)
        other.add(row)
        assert index.ntotal == i + 1
        if i in (3, 4, 77):
            assert_found(index, other)
            assert index.remove_ids(np.array([i - 2])) == other.remove_ids(np.array([i - 2])) == 1
            index.add(Q[:1])
            other.add(Q[:1])
    assert len(index.table) == index.ntotal
    assert_found(index, other)


def test_rows_added_while_others_search() -> None:
    index, total = ours.IndexFlatIP(6), 300
    errors: list[BaseException] = []

    def search() -> None:
        try:
            seen = 0
            while seen < total:
                found = int((index.search(Q[:1], total)[1] >= 0).sum())
                assert found >= seen
                seen = found
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for x in X:
        index.add(x[None])
    for thread in threads:
        thread.join()
    assert not errors
    assert_found(index, flat(theirs))


@every_kind
@pytest.mark.parametrize(
    "copied",
    [ours.clone_index, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))],
    ids=["clone_index", "deepcopy", "pickle"],
)
def test_copies(build: Callable[[Any], Any], copied: Callable[[Any], Any]) -> None:
    index = build(ours)
    again = copied(index)
    index.reset()
    assert_found(again, build(theirs))
    assert type(again) is type(index)


def test_rows_added_to_a_loaded_table_take_nobodys_place(tmp_path: Any) -> None:
    ids = np.array([7, 3, 900])
    ItemTable.from_rows(X[:3], ids=ids).save(tmp_path / "table")
    index = ours.IndexFlatIP(6)
    index.table = ItemTable.load(tmp_path / "table")
    index.add(X[3:6])
    other = flat(theirs, np.concatenate([X[[1, 0, 2]], X[3:6]]))  # positions are in the order of the ids
    assert_found(index, other)
    assert_same(index.reconstruct_n(), other.reconstruct_n())
    mapped = ours.IndexFlatIP(6)
    mapped.table = ItemTable.load(tmp_path / "table", mmap=True)
    with pytest.raises(ValueError, match="the index must be in memory to be updated, got a memory-mapped table"):
        mapped.add(X[:1])
    with pytest.raises(ValueError, match=r"table must be an ItemTable of width 5, .* got ItemTable\(3 x 6"):
        ours.IndexFlatIP(5).table = ItemTable.from_rows(X[:3])


def test_repr() -> None:
    assert repr(flat(ours)) == "IndexFlatIP(300 x 6 float32, inner product, cpu)"
    assert repr(named_squares(ours)) == "IndexIDMap2(IndexFlatL2(300 x 6 float32, L2, cpu))"


# ---- errors ----


REFUSED_BY_BOTH: dict[str, Callable[[Any], Any]] = {
    "ids on a flat index": lambda faiss: flat(faiss).add_with_ids(X, np.arange(300)),
    "no ids on a map": lambda faiss: named(faiss).add(X),
    "an id too few": lambda faiss: named(faiss).add_with_ids(X, np.arange(299)),
    "a map of an index with rows": lambda faiss: faiss.IndexIDMap(flat(faiss)),
    "a width": lambda faiss: flat(faiss).search(X[:, :5], 2),
    "one query without brackets": lambda faiss: flat(faiss).search(X[0], 2),
    "k of 0": lambda faiss: flat(faiss).search(X, 0),
    "an unknown position": lambda faiss: flat(faiss).reconstruct(300),
    "an unknown id": lambda faiss: named(faiss).reconstruct(10**6),
    "a row of a map": lambda faiss: named_once(faiss).reconstruct(int(IDS[0])),
    "rows beyond the end": lambda faiss: flat(faiss).reconstruct_n(299, 5),
    "a merge of widths": lambda faiss: flat(faiss).merge_from(faiss.IndexFlatIP(7)),
    "a merge of metrics": lambda faiss: flat(faiss).merge_from(squares(faiss)),
    "a merge of a map": lambda faiss: named(faiss).merge_from(flat(faiss)),
    "a factory string": lambda faiss: faiss.index_factory(6, "Foo"),
    "training of another width": lambda faiss: flat(faiss).train(X[:, :2]),
}


@pytest.mark.parametrize("call", REFUSED_BY_BOTH.values(), ids=REFUSED_BY_BOTH)
def test_refused_as_faiss_refuses(call: Callable[[Any], Any]) -> None:
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        call(theirs)
    with pytest.raises(ValueError, match=r"must|needs"):
        call(ours)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an approximate index": (
        lambda: ours.index_factory(6, "IVF100,Flat"),
        r'"Flat".* got \'IVF100,Flat\': exact search',
    ),
    "a name": (lambda: ours.IndexHNSWFlat(6, 32), "has no IndexHNSWFlat: .*IndexFlatIP"),
    "a metric": (lambda: ours.IndexFlat(6, ours.METRIC_L1), "metric must be METRIC_INNER_PRODUCT .* got 2"),
    "few bits and L2": (
        lambda: ours.index_factory(6, "SQ8"),
        "dtype must be torch.float32 for METRIC_L2, got torch.int8",
    ),
    "NaN in int8": (
        lambda: ours.IndexFlatIP(6, dtype=torch.int8).add(np.full((1, 6), np.nan)),
        "x must be finite for int8 rows",
    ),
    "a norm": (lambda: squares(ours, np.full((1, 6), 2.0**60)), r"rows must have norms below 2\^60"),
    "a norm of a query": (
        lambda: squares(ours).search(np.full((1, 6), 1e30), 1),
        r"queries must have norms below 2\^60",
    ),
    "itself": (lambda: (index := flat(ours)).merge_from(index), "other must be another IndexFlatIP"),
    "parameters of FAISS": (
        lambda: flat(ours).search(Q, 3, params=theirs.SearchParameters()),
        "params must be SearchParameters of grank_kernels.adapters.faiss or None, got faiss",
    ),
    "a selector of FAISS": (
        lambda: ours.SearchParameters(sel=theirs.IDSelectorRange(0, 1)),
        "sel must be an IDSelector of grank_kernels.adapters.faiss",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "call",
    [
        lambda: ours.index_cpu_to_gpu(ours.StandardGpuResources(), 0, flat(ours)),
        lambda: ours.index_cpu_to_all_gpus(flat(ours)),
        lambda: ours.GpuIndexFlatIP(ours.StandardGpuResources(), 6),
        lambda: ours.GpuIndexFlatL2(ours.StandardGpuResources(), 6),
    ],
    ids=["index_cpu_to_gpu", "index_cpu_to_all_gpus", "GpuIndexFlatIP", "GpuIndexFlatL2"],
)
def test_no_gpu(call: Callable[[], Any]) -> None:
    with pytest.raises(ours.FaissError, match="device must be one of 0 GPUs that torch sees, got 0: search on the CPU"):
        call()


@every_kind
def test_back_from_a_gpu(build: Callable[[Any], Any]) -> None:
    index = build(ours)
    again = ours.index_gpu_to_cpu(index)
    index.reset()
    assert_found(again, build(theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_kind
def test_on_a_gpu(build: Callable[[Any], Any]) -> None:
    other = build(theirs)
    index = ours.index_cpu_to_gpu(ours.StandardGpuResources(), 0, build(ours))
    assert index.flat.table.device.type == "cuda"
    assert_found(index, other)
    assert index.remove_ids(np.arange(50)) == other.remove_ids(np.arange(50))
    assert_found(ours.index_gpu_to_cpu(index), other)
