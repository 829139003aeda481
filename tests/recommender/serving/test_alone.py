"""Serving where no trainer is installed, in spawned and in forked processes."""

import pickle
from pathlib import Path

import pytest
import torch
from oracle import run_python
from test_retriever import HISTORIES, IDS, experiment_of, names, retriever_of

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKED = """
import sys
trainer = {"lightning", "omegaconf", "torchmetrics", "typer", "tensorboardX", "scipy", "matplotlib"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in trainer:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Block())
from grank_kernels.recommender.serving import Retriever
"""
RETRIEVE = """
best = Retriever.load({folder!r}).retrieve({histories!r}, 20, 10)
print(best.ids.tolist())
"""


def test_an_export_is_served_without_a_trainer(tmp_path: Path) -> None:
    retriever = retriever_of("grank", experiment=experiment_of("grank"))
    retriever.save(tmp_path / "saved")
    histories = [names(own) for own in HISTORIES]
    done = run_python(BLOCKED + RETRIEVE.format(folder=str(tmp_path / "saved"), histories=histories))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{retriever.retrieve(histories, 20, 10).ids.tolist()}\n"


def test_importing_it_imports_neither_trainer_nor_parquet() -> None:
    """What takes long to import and is not needed to retrieve."""
    heavy = ("lightning", "torchmetrics", "typer", "pyarrow", "pandas", "sympy", "torch.distributed.tensor")
    code = "import torch, sys; before = set(sys.modules); from grank_kernels.recommender.serving import Retriever; "
    code += f"print([name for name in {heavy!r} if name in set(sys.modules) - before])"
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("name", ["grank", "sasrec"])
def test_a_pickled_retriever_answers_and_refreshes_as_the_original(name: str) -> None:
    retriever = retriever_of(name)
    retriever.refresh([IDS[7]], torch.randn(1, 16))
    copy = pickle.loads(pickle.dumps(retriever))
    vectors = torch.randn(1, 16)
    for _ in range(2):
        one, other = (own.retrieve([names(seen) for seen in HISTORIES], 20, 10) for own in (retriever, copy))
        assert torch.equal(one.scores, other.scores)
        assert (one.ids == other.ids).all()
        for own in (retriever, copy):
            own.refresh([IDS[9]], vectors)


SPAWN = """
import sys
import torch, torch.multiprocessing as mp
from test_retriever import HISTORIES, names, retriever_of

def child(rank, retriever, wanted):
    torch.set_num_threads(1)
    assert (retriever.retrieve([names(own) for own in HISTORIES], 20, 10).ids == wanted).all()
    print("same", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)
    retriever = retriever_of("sasrec")
    wanted = retriever.retrieve([names(own) for own in HISTORIES], 20, 10).ids
    mp.spawn(child, args=(retriever, wanted), nprocs=1)
"""


@pytest.mark.slow
def test_a_retriever_reaches_spawned_processes(tmp_path: Path) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)  # a child imports the file
    here = str(Path(__file__).parent)
    file = str(tmp_path / "spawn.py")
    done = run_python(f"import runpy, sys; sys.path.insert(0, {here!r}); runpy.run_path({file!r}, run_name='__main__')")
    assert done.stdout == "same\n", done.stderr


FORK = """
import os, signal, sys, warnings
sys.path.insert(0, {here!r})
import torch
from test_retriever import HISTORIES, names, retriever_of
histories = [names(own) for own in HISTORIES]
torch.set_num_threads({parent})
retriever = retriever_of("grank")
wanted = retriever.retrieve(histories, 20, 10).ids
torch.randn(300, 300) @ torch.randn(300, 300)
sys.stdout.flush()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a child that waits forever
    if {child}:
        torch.set_num_threads({child})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        answers = [retriever.retrieve(histories, 20, 10).ids for _ in range(2)]
        retriever.refresh()
    same = all((ids == wanted).all() for ids in answers)
    print(same, torch.get_num_threads(), len(caught), *(str(each.message).split(":")[0] for each in caught), flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("parent", "child", "printed"),
    [
        (2, 0, "True 1 1 this process was forked by one with 2 torch threads, which a child does not have"),
        pytest.param(2, 1, "True 1 0", marks=pytest.mark.slow),
        pytest.param(1, 2, "True 2 0", marks=pytest.mark.slow),
    ],
)
def test_a_forked_process_answers(parent: int, child: int, printed: str) -> None:
    done = run_python(FORK.format(here=str(Path(__file__).parent), parent=parent, child=child))
    assert done.stdout == f"{printed}\n0\n", done.stderr
