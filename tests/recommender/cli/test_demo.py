import re
from pathlib import Path

import pytest
import torch

from grank_kernels.recommender.cli.demo import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small ratings with a pattern: 60 users, 80 films, each user takes the films in turns."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [(u, (7 * u + t) % 80 + 1, 3, t) for u in range(1, 61) for t in range(15)]
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    (folder / "u.item").write_text("".join(f"{i}|Film {i} (1999)|\n" for i in range(1, 81)))
    return folder


def test_demo_end_to_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ["--data", str(data), "--epochs", "20", "--k1", "60", "--table", "3000", "--seed", "1"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert list(Path.cwd().iterdir()) == []  # no logs, no checkpoints
    assert "60 users, 80 films, 900 ratings" in out
    popularity, first, second = (
        [float(number) for number in re.findall(r" (\d\.\d{4})", line)]
        for line in out.splitlines()
        if re.search(r"^  (popularity|stage)", line)
    )
    assert first[0] > 0.9 > popularity[0]
    assert second[0] > 0.9
    assert len(re.findall(r"watched next  Film \d+ \(1999\)", out)) == 3
    assert len(re.findall(r"batch \d+ +[\d.,]+ ms +[\d.,]+ ms \([\d.]+x\) +[\d.,]+ ms \([\d.]+x\) +\d", out)) == 3
    assert [line.split(":")[0] for line in err.splitlines()] == [f"epoch {n}/20" for n in range(1, 21)]  # progress


@pytest.mark.slow
def test_the_demo_repeats_its_figures(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for _ in range(2):
        assert main(["--data", str(data), "--epochs", "3", "--k1", "60", "--table", "3000", "--seed", "1"]) == 0
        out = capsys.readouterr().out.splitlines()
        lines.append([line for line in out if re.search(r"^  (popularity|stage|recommended)", line)])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6


def test_demo_without_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 1
    assert "expected a u.data" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("epochs", "0"), ("k1", "49"), ("table", "99")])
def test_demo_refuses_nonsense(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"--{name}", value])
    assert f"--{name} must be" in capsys.readouterr().err


def test_demo_notices_a_wrong_search(monkeypatch: pytest.MonkeyPatch) -> None:
    import grank_kernels.recommender.cli.demo as demo

    def wrong(queries: torch.Tensor, items: object, k: int) -> torch.return_types.topk:
        return torch.topk(torch.rand(len(queries), 2000), k)

    monkeypatch.setattr(demo, "mips_topk", wrong)
    with pytest.raises(AssertionError):
        demo._time_search(2000, 0)
