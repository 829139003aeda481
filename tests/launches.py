"""Child processes of tests, and cases that all ranks of a process group run together.

    python tests/SOME_cases.py RANK WORLD_SIZE STORE RESULTS

RESULTS.RANK receives {name of the case: "" or its traceback}. Random numbers are the same on all ranks.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import TESTS

import grank_kernels as gk
from grank_kernels.distributed.ranks import leave

Case = Callable[[int, int, Path], None]
TIMEOUT = timedelta(seconds=60)
SECONDS = 600  # timeout of a launch, which takes a few


def environment(**more: str) -> dict[str, str]:
    package = Path(gk.__file__).resolve().parent.parent
    path = os.pathsep.join(map(str, (package, TESTS.parent, TESTS, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def finished(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The outputs of the processes; kills all of them if one fails or times out."""
    try:
        return [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def started(*command: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)),
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def all_cases(script: str, cases: Iterable[str], world: int, folder: Path) -> dict[str, list[str]]:
    """Failures by case and rank."""
    arguments = [world, folder / "store", folder / "results"]
    ranks = [started(sys.executable, TESTS / script, rank, *arguments) for rank in range(world)]
    output = finished(ranks)
    assert [process.returncode for process in ranks] == [0] * world, output
    of_ranks = [json.loads((folder / f"results.{rank}").read_text()) for rank in range(world)]
    return {name: [failures[name] for failures in of_ranks] for name in cases}


def run_cases(cases: dict[str, Case]) -> None:
    """Runs all cases on one rank: the main function of a script of cases."""
    rank, world, store, results = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    failures = {}
    for name, run in cases.items():
        torch.manual_seed(20251015)
        try:
            run(rank, world, Path(results).parent)
            failures[name] = ""
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
        everybody: list[str] = [""] * world
        dist.all_gather_object(everybody, failures[name])
        if any(everybody) and not failures[name]:
            failures[name] = "failed on another rank"
    Path(f"{results}.{rank}").write_text(json.dumps(failures))
    leave()
