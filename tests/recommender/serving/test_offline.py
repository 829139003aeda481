"""All users at once: what `Retriever.retrieve` answers, to the byte, also by killed runs and several processes."""

import errno
import fcntl
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launches import environment
from oracle import run_python
from pyarrow import dataset
from test_retriever import IDS, MODELS_SERVED, N, build, experiment_of, retriever_of
from tiny_runs import write_circle
from typer.testing import CliRunner

from grank_kernels.distributed.ranks import Ranks, leave
from grank_kernels.recommender.cli.commands import app
from grank_kernels.recommender.data.histories import Histories
from grank_kernels.recommender.data.interactions import Interactions
from grank_kernels.recommender.serving.catalogue import Catalogue
from grank_kernels.recommender.serving.offline import COLUMNS, MANIFEST, Request, retrieve_all
from grank_kernels.recommender.serving.retriever import Retriever
from grank_kernels.recommender.serving.users import Users
from grank_kernels.recommender.training.experiment import DataConfig

pytestmark = pytest.mark.usefixtures("one_thread")

U = 23
REQUEST = Request(k1=20, k2=10, users_per_part=9, batch=4)


def users(ids: Any = None) -> Users:
    """Histories of all lengths, none and nearly the whole corpus among them."""
    random = np.random.default_rng(1)
    lists = [random.permutation(N)[:length].tolist() for length in np.linspace(0, N - 3, U).astype(int)]
    liked = [[item % 3 > 0 for item in own] for own in lists]
    return Users(np.arange(U) + 100 if ids is None else ids, Histories.from_lists(lists, liked))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", MODELS_SERVED)
def test_answers_are_those_of_retrieve(name: str, tmp_path: Path) -> None:
    retriever, asked = retriever_of(name), users()
    paths = retrieve_all(retriever, asked, tmp_path / "out", REQUEST)
    assert [path.name for path in paths] == [f"part-00000{number}.parquet" for number in range(3)]
    table = dataset.dataset(tmp_path / "out").to_table()
    assert tuple(table.column_names) == COLUMNS
    rows = table.to_pylist()
    assert [row["user"] for row in rows] == asked.ids.tolist()
    for part in torch.arange(U).split(9):
        for batch in part.split(4):
            wanted = retriever.retrieve(asked.histories.select(batch), 20, 10)
            for row, ids, scores in zip(batch.tolist(), wanted.ids, wanted.scores, strict=True):
                found = ids != ""
                assert rows[row]["items"] == ids[found].tolist()
                assert rows[row]["popular"] == (row == 0 and retriever.current.model.needs_history)
                assert rows[row]["scores"] == scores[torch.from_numpy(found)].tolist()
                own = asked.histories.select(torch.tensor([row])).items
                assert not set(rows[row]["items"]) & {IDS[item] for item in own}
    assert [len(row["items"]) for row in rows[-3:]] == [
        min(10, N - len(asked.histories.select(torch.tensor([row])).items)) for row in range(U - 3, U)
    ]
    assert len(rows[-1]["items"]) == 3


def test_users_and_items_may_have_ids_of_either_kind(tmp_path: Path) -> None:
    names = np.array([f"user {number:02}" for number in range(U)])
    retriever = Retriever(build("sasrec"), Catalogue(np.arange(N) * 1000))
    retrieve_all(retriever, users(names), tmp_path / "out", REQUEST)
    table = dataset.dataset(tmp_path / "out").to_table()
    assert table["user"].to_pylist() == names.tolist()
    assert {item % 1000 for items in table["items"].to_pylist() for item in items} == {0}


def test_progress_counts_the_users(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    retriever = retriever_of("sasrec")
    retrieve_all(retriever, users(), tmp_path, REQUEST, progress=lambda *numbers: seen.append(numbers))
    assert [done for done, _ in seen] == [4, 8, 9, 13, 17, 18, 22, 23, 23]
    assert {total for _, total in seen} == {U}


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    retriever = retriever_of("grank")
    retrieve_all(retriever, users(), tmp_path, REQUEST)
    whole = contents(tmp_path)
    (tmp_path / "part-000001.parquet").unlink()
    litter = tmp_path / ".part-000001.parquet.0123abcd.partial"
    litter.write_bytes(b"PAR1, but not more")
    untouched = (tmp_path / "part-000000.parquet").stat().st_mtime_ns
    retrieve_all(retriever, users(), tmp_path, REQUEST)
    assert contents(tmp_path) == whole
    assert (tmp_path / "part-000000.parquet").stat().st_mtime_ns == untouched


CHANGES: dict[str, tuple[Any, str]] = {
    "k1": (replace(REQUEST, k1=30), "k1 20, not 30"),
    "k2": (replace(REQUEST, k2=9), "k2 10, not 9"),
    "users_per_part": (replace(REQUEST, users_per_part=8), "users_per_part 9, not 8"),
    "batch": (replace(REQUEST, batch=5), "batch 4, not 5"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_request_is_refused_by_name(name: str, tmp_path: Path) -> None:
    retriever = retriever_of("sasrec")
    retrieve_all(retriever, users(), tmp_path, REQUEST)
    request, message = CHANGES[name]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds answers for {message}: take another folder"):
        retrieve_all(retriever, users(), tmp_path, request)
    assert contents(tmp_path) == before


def test_other_models_and_users_are_refused_by_name(tmp_path: Path) -> None:
    retriever, asked = retriever_of("sasrec"), users()
    retrieve_all(retriever, asked, tmp_path, REQUEST)
    with pytest.raises(ValueError, match="dtype float32, not int8; checksum_of_model"):
        retrieve_all(retriever_of("sasrec", dtype=torch.int8), asked, tmp_path, REQUEST)
    fewer = Users(asked.ids[:4], asked.histories.select(torch.arange(4)))
    with pytest.raises(ValueError, match="holds answers for users 23, not 4; checksum_of_users"):
        retrieve_all(retriever, fewer, tmp_path, REQUEST)
    disliked = replace(asked.histories, feedback=~asked.histories.feedback)
    with pytest.raises(ValueError, match="holds answers for checksum_of_users"):
        retrieve_all(retriever, Users(asked.ids, disliked), tmp_path, REQUEST)
    retriever.refresh([IDS[3]], torch.ones(1, 16))
    with pytest.raises(ValueError, match="holds answers for checksum_of_model"):
        retrieve_all(retriever, asked, tmp_path, REQUEST)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    retriever = retriever_of("sasrec")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        retrieve_all(retriever, users(), tmp_path, REQUEST)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=f"{MANIFEST} must hold a request as JSON"):
        retrieve_all(retriever, users(), tmp_path, REQUEST)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    retriever = retriever_of("sasrec")

    def another(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match="another process works on it"):
            retrieve_all(retriever, users(), tmp_path, REQUEST)

    retrieve_all(retriever, users(), tmp_path, REQUEST, progress=another)
    retrieve_all(retriever, users(), tmp_path, REQUEST)  # the lock is gone


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"k1": 5, "k2": 6}, ValueError, "k2 must be at most k1, got 6 of 5"),
        ({"batch": 0}, ValueError, "batch must be 1 or more, got 0"),
        ({"users_per_part": 2.0}, TypeError, "users_per_part must be an int, got float 2.0"),
        ({"k2": 500, "users_per_part": 1 << 23}, ValueError, "k2 times users_per_part must be at most 2147483647"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Request(**sizes)


def test_users_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    retriever, asked = retriever_of("sasrec"), users()
    with pytest.raises(ValueError, match="as many ids as histories, got 22 and 23"):
        retrieve_all(retriever, Users(asked.ids[1:], asked.histories), tmp_path, REQUEST)
    with pytest.raises(ValueError, match=f"histories.items must be numbers below {N}, got {N}"):
        retrieve_all(retriever, Users(np.arange(1), Histories.from_lists([[N]])), tmp_path, REQUEST)


def test_users_of_a_data_set() -> None:
    """The catalogue counts items in another order than the data set, which has not met all of them."""
    met = Interactions.from_columns(["b", "a", "b"], ["film-05", "film-21", "film-01"], ratings=[5, 4, 3])
    found = Users.of(met, Catalogue(IDS), 4.0)
    assert found.ids.tolist() == ["a", "b"]
    assert [IDS[item] for item in found.histories.items] == ["film-21", "film-05", "film-01"]
    assert found.histories.feedback.tolist() == [True, True, False]
    assert found.histories.offsets.tolist() == [0, 1, 3]
    assert found.skipped == 0


def test_items_that_the_model_lacks_are_left_out_of_histories_and_counted() -> None:
    met = Interactions.from_columns(["a", "a", "b", "c", "c"], ["new-1", "film-21", "new-2", "film-05", "new-1"])
    found = Users.of(met, Catalogue(IDS), 4.0)
    assert found.skipped == 2
    assert found.histories.offsets.tolist() == [0, 1, 1, 2]
    assert [IDS[item] for item in found.histories.items] == ["film-21", "film-05"]
    with pytest.raises(ValueError, match="must have items of the catalogue, got none"):
        Users.of(Interactions.from_columns(["a"], ["new-1"]), Catalogue(IDS), 4.0)


def test_ids_beyond_int64_are_written_exactly(tmp_path: Path) -> None:
    retriever = Retriever(build("sasrec"), Catalogue(np.arange(N, dtype=np.uint64) + np.uint64(2**64 - N)))
    retrieve_all(retriever, users(), tmp_path, REQUEST)
    written = {item for items in dataset.dataset(tmp_path).to_table()["items"].to_pylist() for item in items}
    assert written <= {2**64 - 1 - number for number in range(N)}
    assert len(written) > 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out must be a folder, got a file"):
        retrieve_all(retriever_of("sasrec"), users(), tmp_path / "out", REQUEST)
    assert (tmp_path / "out").read_text() == "mine"


def test_without_file_locks_it_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    retrieve_all(retriever_of("sasrec"), users(), tmp_path / "locked", REQUEST)
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(RuntimeWarning, match="No locks available"):
        retrieve_all(retriever_of("sasrec"), users(), tmp_path / "out", REQUEST)
    assert contents(tmp_path / "out") == contents(tmp_path / "locked")


# ---- killed, and in several processes ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRank over the circle of 40 items, with every part at work."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    data = DataConfig(name="arrays", path=str(write_circle(folder / "circle.npz")))
    experiment = replace(experiment_of("grank"), data=data)
    model = experiment.build(40).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    Retriever(model, Catalogue(np.arange(40) + 1), experiment=experiment).save(folder / "saved")
    return folder / "saved"


def arguments(saved: Path, out: Path) -> list[str]:
    sizes = ["--k1", "20", "--k2", "5", "--batch", "3", "--users-per-part", "8"]
    return ["retrieve", str(saved), "--all-users", "--out", str(out), *sizes]


@pytest.fixture(scope="module")
def whole(exported: Path) -> dict[str, bytes]:
    """What one process writes that nobody disturbs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done = CliRunner().invoke(app, arguments(exported, exported.parent / "whole"), catch_exceptions=False)
    torch.set_num_threads(threads)
    assert done.stdout == f"30 users in 4 files: {exported.parent / 'whole'}\n"
    assert done.stderr == ""  # it is no terminal
    files = contents(exported.parent / "whole")
    assert sorted(files) == [MANIFEST, *(f"part-00000{number}.parquet" for number in range(4))]
    return files


KILLED = """
import os, signal, sys
import torch
from grank_kernels.recommender.serving import offline
from grank_kernels.recommender.cli.commands import app
from pyarrow import parquet

torch.set_num_threads(1)
def end(*_): os.kill(os.getpid(), signal.SIGKILL)
moment, calls = {moment!r}, []
real_write, real_best = parquet.write_table, offline.Serving.best
def write_table(table, file):
    calls.append(file)
    real_write(table, file)
    if len(calls) == 3:
        file.truncate(100)
        end()
def best(*operands, **filters):
    calls.append(operands)
    if len(calls) == 5:
        end()
    return real_best(*operands, **filters)
if moment == "half a file": parquet.write_table = write_table
if moment == "a search": offline.Serving.best = best
if moment == "the manifest": os.fsync = end
app({arguments!r})
"""


@pytest.mark.parametrize(
    ("moment", "files"),
    [
        ("half a file", 3),
        pytest.param("the manifest", 0, marks=pytest.mark.slow),
        pytest.param("a search", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    moment: str, files: int, exported: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = run_python(KILLED.format(moment=moment, arguments=arguments(exported, out)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = {name: data for name, data in contents(out).items() if not name.startswith(".")}
    assert len(there) == files
    assert there.items() <= whole.items()
    assert CliRunner().invoke(app, arguments(exported, out), catch_exceptions=False).exit_code == 0
    assert contents(out) == whole


def torchrun(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    ranks = ["--standalone", f"--nproc-per-node={num_ranks}", "-m", "grank_kernels.recommender.cli.main"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, *arguments]
    return subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=300)


def test_a_group_of_one_process_writes_the_same_bytes(exported: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The collective steps, without the start of processes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        retriever = Retriever.load(exported, mmap=True)
        assert retriever.experiment is not None
        everybody = Users.of(retriever.experiment.data.read(), retriever.catalogue, 4.0)
        request = Request(k1=20, k2=5, users_per_part=8, batch=3)
        retrieve_all(retriever, everybody, tmp_path, request, ranks=Ranks())
    finally:
        leave()
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(exported: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Also where one process had begun; the second part of one of them is then none."""
    for name in (MANIFEST, "part-000001.parquet"):
        (tmp_path / name).write_bytes(whole[name])
    done = torchrun(2, *arguments(exported, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"30 users in 4 files: {tmp_path}\n"
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_three_processes_write_the_same_bytes(exported: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = torchrun(3, *arguments(exported, tmp_path))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_two_processes_refuse_together(exported: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(whole[MANIFEST])
    done = torchrun(2, *arguments(exported, tmp_path), "--k1", "21")
    assert done.returncode != 0
    assert done.stderr.count("holds answers for k1 20, not 21") >= 2
    assert contents(tmp_path) == {MANIFEST: whole[MANIFEST]}


@pytest.mark.slow
def test_one_process_that_cannot_write_ends_both(exported: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(whole[MANIFEST])
    part = tmp_path / "part-000003.parquet"  # the second part of rank 1
    part.symlink_to(part)
    done = torchrun(2, *arguments(exported, tmp_path))
    assert done.returncode != 0
    assert "rank 0 of 2, writing: rank 1 raised" in done.stderr
    part.unlink()
    assert contents(tmp_path).items() <= whole.items()
    assert len(contents(tmp_path)) == 4  # rank 0 had its second part written
    assert torchrun(2, *arguments(exported, tmp_path)).returncode == 0
    assert contents(tmp_path) == whole
