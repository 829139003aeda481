"""Single rows, membership, removal of ids that may be missing, and int8 rows with scales."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grank_kernels import ItemTable, mips_topk

G = torch.Generator().manual_seed(1)
NUMBERS = torch.randint(-128, 128, (50, 20), generator=G, dtype=torch.int8)
SCALES = torch.rand(50, generator=G)
IDS = torch.arange(50) * 3


def table() -> ItemTable:
    return ItemTable.from_rows(NUMBERS.float(), ids=IDS)


def test_membership() -> None:
    items = table()
    assert 3 in items
    assert np.int64(147) in items
    assert 4 not in items
    assert -1 not in items
    items.remove(torch.tensor([3]))
    assert 3 not in items
    assert 1 in ItemTable.from_rows(torch.zeros(2, 3))
    assert 2 not in ItemTable.from_rows(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        assert "3" in items


def test_rows_by_index() -> None:
    items = table()
    assert torch.equal(items[6], NUMBERS[2].float())
    assert torch.equal(items[np.int64(6)], NUMBERS[2].float())
    assert torch.equal(items[torch.tensor([[6, 0]])], NUMBERS[[2, 0]].float()[None])
    with pytest.raises(KeyError, match="7"):
        items[7]
    with pytest.raises(ValueError, match="ids must be in the table, got 7"):
        items[torch.tensor([7])]
    with pytest.raises(TypeError, match="not iterable"):
        iter(items)  # type: ignore[call-overload]


def test_removal_of_ids_that_may_be_missing() -> None:
    items = table()
    items.remove(torch.tensor([3, 4, 6]), missing="ignore")
    assert (len(items), items.version) == (48, 1)
    items.remove(torch.tensor([3, 4]), missing="ignore")
    assert (len(items), items.version) == (48, 1)
    with pytest.raises(ValueError, match="ids must be in the table, got 3"):
        items.remove(torch.tensor([3]))
    with pytest.raises(ValueError, match="missing must be 'raise' or 'ignore', got 'skip'"):
        items.remove(torch.tensor([0]), missing="skip")


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()], ids=["tensors", "arrays"])
def test_int8_rows_with_scales(convert: Callable[[Any], Any], tmp_path: Path) -> None:
    items = ItemTable.from_rows(convert(NUMBERS[:40]), scales=convert(SCALES[:40]), ids=convert(IDS[:40]))
    items.upsert(convert(IDS[40:]), convert(NUMBERS[40:]), scales=convert(SCALES[40:]))
    items.save(tmp_path / "table")
    for each in (items, ItemTable.load(tmp_path / "table")):
        assert each.dtype == torch.int8
        numbers, scales = each.int8_rows(IDS)
        assert torch.equal(numbers, NUMBERS)
        assert torch.equal(scales, SCALES)
        assert torch.equal(each.rows(IDS), NUMBERS * SCALES[:, None])


@pytest.mark.parametrize("d", [1, 20, 64, 300])
def test_scores_of_int8_rows_are_those_of_the_numbers(d: int) -> None:
    """-128 included, which rows quantised here do not have."""
    numbers = torch.randint(-128, 128, (500, d), generator=G, dtype=torch.int8)
    numbers[:5] = -128
    queries = torch.randint(-127, 128, (9, d), generator=G).float()
    queries[:, 0] = 127  # so that the scale of the quantised query is 1
    top = mips_topk(queries, ItemTable.from_rows(numbers, scales=torch.ones(500)), 500)
    scores = queries.double() @ numbers.double().T
    assert torch.equal(top.values.double(), scores.sort(dim=1, descending=True).values)
    assert torch.equal(scores.gather(1, top.indices), top.values.double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": NUMBERS}, r"rows must be floats, or int8 with scales, got torch.int8: scales=torch.ones\(N\)"),
        ({"rows": NUMBERS, "scales": SCALES[:9]}, r"scales must be \(50,\), one a row, got \(9,\)"),
        ({"rows": NUMBERS, "scales": SCALES.double()}, "scales must be torch.float32, got torch.float64"),
        ({"rows": NUMBERS, "scales": -SCALES}, "scales must be finite and 0 or more, got -"),
        ({"rows": NUMBERS, "scales": SCALES / 0}, "scales must be finite and 0 or more, got inf"),
        ({"rows": NUMBERS.float(), "scales": SCALES}, "rows must be torch.int8, got torch.float32"),
        (
            {"rows": NUMBERS, "scales": SCALES, "dtype": torch.float16},
            "dtype must be None or torch.int8, got torch.float16",
        ),
        (
            {"rows": NUMBERS, "scales": SCALES, "coarse": torch.int8},
            "coarse must be None, or torch.int8 with float rows",
        ),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemTable.from_rows(**arguments)


def test_scales_belong_to_int8_tables() -> None:
    with pytest.raises(ValueError, match=r"scales must be None for torch.float32 tables"):
        table().upsert(IDS[:1], NUMBERS[:1], scales=SCALES[:1])
    with pytest.raises(ValueError, match=r"the table must be int8, got torch.float32: rows\(ids\)"):
        table().int8_rows(IDS)
