"""Random sequences of calls, beside FAISS."""

from typing import Any

import numpy as np
import pytest
from faiss_pairs import Q, assert_found, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from grank_kernels.adapters import faiss as ours

theirs: Any = pytest.importorskip("faiss")

rows = st.integers(0, 2**32).map(
    lambda seed: np.random.default_rng(seed).integers(-4, 5, (seed % 6, 6)).astype(np.float32)
)
ids = st.lists(st.integers(-2, 60), max_size=8)


class Beside(RuleBasedStateMachine):
    """An index of ours and one of FAISS under the same calls."""

    @initialize(
        metric=st.sampled_from(["IndexFlatIP", "IndexFlatL2"]),
        kind=st.sampled_from([None, "IndexIDMap", "IndexIDMap2"]),
    )
    def build(self, metric: str, kind: str | None) -> None:
        self.kind = kind
        self.pair = [getattr(faiss, metric)(6) for faiss in (ours, theirs)]
        if kind:
            self.flats = self.pair  # FAISS's map does not own its index
            self.pair = [getattr(faiss, kind)(index) for faiss, index in zip((ours, theirs), self.pair, strict=True)]

    @rule(x=rows, first=st.integers(-5, 50))
    def add(self, x: np.ndarray, first: int) -> None:
        for index in self.pair:
            if self.kind:
                index.add_with_ids(x, first + 2 * np.arange(len(x)))
            else:
                index.add(x)

    @rule(gone=ids)
    def remove(self, gone: list[int]) -> None:
        got, wanted = (index.remove_ids(np.array(gone, np.int64)) for index in self.pair)
        assert got == wanted

    @rule(low=st.integers(-5, 60), width=st.integers(0, 9))
    def remove_range(self, low: int, width: int) -> None:
        pairs = zip((ours, theirs), self.pair, strict=True)
        got, wanted = (index.remove_ids(faiss.IDSelectorRange(low, low + width)) for faiss, index in pairs)
        assert got == wanted

    @rule()
    def reset(self) -> None:
        for index in self.pair:
            index.reset()

    @rule()
    def through_bytes(self) -> None:
        self.pair[0] = ours.deserialize_index(ours.serialize_index(self.pair[0]))

    @rule()
    def to_ours(self) -> None:
        self.pair[0] = ours.deserialize_index(theirs.serialize_index(self.pair[1]))

    @precondition(lambda self: self.pair[1].ntotal)
    @rule(selected=ids, threshold=st.integers(-40, 40))
    def filtered(self, selected: list[int], threshold: int) -> None:
        results = []
        for faiss, index in zip((ours, theirs), self.pair, strict=True):
            params = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.array(selected, np.int64)))
            results.append((index.search(Q[:2], index.ntotal, params=params), index.range_search(Q[:2], threshold)))
        assert_same(*results)

    @invariant()
    def same(self) -> None:
        assert_found(*self.pair, Q[:3])


def test_random_calls() -> None:
    run_state_machine_as_test(Beside, settings=settings(max_examples=20, stateful_step_count=8, deadline=None))


@pytest.mark.slow
def test_many_random_calls() -> None:
    run_state_machine_as_test(Beside, settings=settings(max_examples=1000, stateful_step_count=40, deadline=None))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_rows_and_distances(data: st.DataObject) -> None:
    """Distances of floats of any magnitude are the direct sums, in their order."""
    numbers = st.floats(-1e4, 1e4, width=32)
    x = np.array(data.draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=30)), np.float32)
    index = ours.IndexFlatL2(3)
    index.add(x)
    D, I = index.search(x, 5)  # noqa: E741
    direct = np.square(x[:, None].astype(np.float64) - x).sum(2)
    wanted = np.argsort(direct, axis=1, kind="stable")[:, :5]
    assert_same(I[:, : wanted.shape[1]], wanted)
    assert_same(D[:, : wanted.shape[1]], np.take_along_axis(direct, wanted, 1).astype(np.float32))
