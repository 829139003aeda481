"""A tiny corpus, and copies of its finished run."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import SETTINGS, write_circle


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "grank.yaml"
    path.write_text(SETTINGS.format(data=write_circle(tmp_path / "circle.npz")))
    return path


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run; its data stays where it was."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))
