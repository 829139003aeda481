"""Training on several ranks: the gradients of their joint batch, with the table whole or in parts."""

from pathlib import Path

import pytest
from joint_cases import CASES
from launches import all_cases


@pytest.fixture(scope="module")
def with_2_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return all_cases("recommender/training/joint_cases.py", CASES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_with_2_ranks(name: str, with_2_ranks: dict[str, list[str]]) -> None:
    assert with_2_ranks[name] == [""] * 2


@pytest.mark.slow
def test_with_3_ranks(tmp_path: Path) -> None:
    assert all_cases("recommender/training/joint_cases.py", CASES, 3, tmp_path) == dict.fromkeys(CASES, [""] * 3)
