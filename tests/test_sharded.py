"""Tables in shards: the same bits as one table, on every rank; errors on all ranks or none; ranks that are lost.

Ranks are processes over gloo. Those of a fixture run all cases of `sharded_cases.py` in one launch.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import TESTS
from sharded_cases import CASES

import grank_kernels as gk
from grank_kernels.distributed import short_list

SECONDS = 240  # after which a launch has failed; it takes a few


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def finished(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What they wrote; none is left running."""
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


def all_cases(world: int, folder: Path) -> dict[str, list[str]]:
    """What failed, by case and rank."""
    arguments = [world, folder / "store", folder / "results"]
    ranks = [started(sys.executable, TESTS / "sharded_cases.py", rank, *arguments) for rank in range(world)]
    output = finished(ranks)
    assert [process.returncode for process in ranks] == [0] * world, output
    of_ranks = [json.loads((folder / f"results.{rank}").read_text()) for rank in range(world)]
    return {name: [failures[name] for failures in of_ranks] for name in CASES}


@pytest.fixture(scope="module")
def with_2_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return all_cases(2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_with_2_ranks(name: str, with_2_ranks: dict[str, list[str]]) -> None:
    assert with_2_ranks[name] == [""] * 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_with_other_numbers_of_ranks(world: int, tmp_path: Path) -> None:
    failures = all_cases(world, tmp_path)
    assert failures == dict.fromkeys(CASES, [""] * world)


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="there is no process group"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(torch.ones(2, 2)))


@given(k=st.integers(0, 1 << 62), num_shards=st.integers(1, 5000))
def test_short_lists_hold_k_together(k: int, num_shards: int) -> None:
    s = short_list(k, num_shards)
    assert s <= k <= s * num_shards


# ---- ranks that are lost ----


@pytest.fixture
def table(tmp_path: Path) -> Path:
    gk.ItemTable.from_rows(torch.randn(2000, 8), dtype=torch.int8).save(tmp_path / "table")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "timeout"), [("kill", SECONDS * 10), pytest.param("stop", 5, marks=pytest.mark.slow)]
)
def test_a_lost_rank_is_an_error_on_the_others(fault: str, timeout: int, table: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        started(
            sys.executable, TESTS / "sharded_server.py", table, timeout, fault,
            RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = ranks[0].communicate(timeout=SECONDS)[0]
    finally:
        for process in ranks:
            process.kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 3, output
    message = (table / "lost.0").read_text()
    assert message.startswith("rank 0 of 2, ")
    assert "a rank has ended, hangs or makes other calls" in message


def launched(
    table: Path, fault: str, *options: str, prefix: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """Under torchrun."""
    torchrun = (*prefix, sys.executable, "-m", "torch.distributed.run", *options)
    return started(*torchrun, TESTS / "sharded_server.py", table, 60, fault, **variables)


@pytest.mark.slow
def test_an_elastic_restart_serves_on(table: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun = launched(table, "kill", *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as docs/scaling.md explains
    output = finished([torchrun])
    assert torchrun.returncode == 0, output
    assert [(table / f"served.{rank}").read_text().split() for rank in range(2)] == [["1"], ["1"]]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them."""
    names = [f"grank{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
    for last, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{last}/24 dev cable", f"-n {name} link set cable up"]
        commands += [f"-n {name} link set lo up"]
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` to make network namespaces with")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces: ip {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts(table: Path, hosts: list[str]) -> None:
    agents = [
        launched(
            table, "none", "--nnodes=2", f"--node-rank={host}", "--nproc-per-node=1", "--master-addr=10.77.0.1",
            "--master-port=29500", f"--local-addr=10.77.0.{host + 1}", prefix=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME="cable", GRANK_ADDRESS=f"10.77.0.{host + 1}",
        )
        for host, name in enumerate(hosts)
    ]  # fmt: skip
    output = finished(agents)
    assert [agent.returncode for agent in agents] == [0, 0], output
    served = [(table / f"served.{rank}").read_text() for rank in range(2)]
    assert served == ["0 10.77.0.1", "0 10.77.0.2"]
