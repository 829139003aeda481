"""Sharded tables: equal bits to one table on every rank, errors on all ranks or none, lost ranks.

Ranks are processes over gloo. One launch runs all cases of `sharded_cases.py`.
"""

import math
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
from launches import SECONDS, all_cases, finished, started
from oracle import TESTS
from sharded_cases import CASES

import grank_kernels as gk
from benchmarks.sharded_model import Host, best_tree, flat, message, received, scan, tree, tree_pays_from
from grank_kernels.distributed.sharded_table import merge, short_list

SCALING = TESTS.parent / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def with_2_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return all_cases("distributed/sharded_cases.py", CASES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_with_2_ranks(name: str, with_2_ranks: dict[str, list[str]]) -> None:
    assert with_2_ranks[name] == [""] * 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_with_other_numbers_of_ranks(world: int, tmp_path: Path) -> None:
    failures = all_cases("distributed/sharded_cases.py", CASES, world, tmp_path)
    assert failures == dict.fromkeys(CASES, [""] * world)


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="there is no process group"):
        gk.ShardedItemTable(gk.ItemTable.from_rows(torch.ones(2, 2)))


@given(k=st.integers(0, 1 << 62), num_shards=st.integers(1, 5000))
def test_short_lists_add_up_to_k(k: int, num_shards: int) -> None:
    s = short_list(k, num_shards)
    assert s <= k <= s * num_shards


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.int8}, {"coarse": torch.int8}], ids=str)
def test_parts_of_a_file_add_up_to_the_file(options: dict[str, torch.dtype], mmap: bool, tmp_path: Path) -> None:
    path, ids = tmp_path / "table", torch.randperm(90)[:23]
    whole = gk.ItemTable.from_rows(torch.randn(23, 5), ids=ids, **options)
    whole.save(path)
    loaded = [gk.ItemTable.load(path, mmap=mmap, part=(r, 30)) for r in range(30)]  # some parts are empty
    assert sum(map(len, loaded)) == 23
    columns = [table.current.columns.present() for table in loaded]
    for name, column in whole.current.columns.present().items():
        assert torch.equal(torch.cat([of[name] for of in columns]), column)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a byte of the last part
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is corrupted"):
        gk.ItemTable.load(path, mmap=mmap, part=(0, 30))
    with pytest.raises(ValueError, match=r"part must be .* got \(3, 3\)"):
        gk.ItemTable.load(path, part=(3, 3))


@given(B=st.integers(0, 3), G=st.integers(1, 5), s=st.integers(0, 6), k=st.integers(0, 30), most=st.integers(1, 9))
def test_merge_orders_by_score_and_id(B: int, G: int, s: int, k: int, most: int) -> None:
    values = torch.randint(-most, most, (B, G * s)) / 2.0  # few values, so many are equal
    ids = torch.stack([torch.randperm(G * s) for _ in range(B)]) if B else torch.empty(0, G * s, dtype=torch.int64)
    none = torch.rand(B, G * s) < 0.2
    values[none], ids[none] = -torch.inf, -1
    values[torch.rand(B, G * s) < 0.1] = -torch.inf  # a score that an item may have
    got = merge(values, ids, k)
    for b in range(B):
        pairs = [(v, i) for v, i in zip(values[b].tolist(), ids[b].tolist(), strict=True)]
        pairs.sort(key=lambda pair: (-pair[0], pair[1] < 0, pair[1]))
        assert list(zip(got[0][b].tolist(), got[1][b].tolist(), strict=True)) == pairs[:k]


# ---- the cost model ----

HOST = Host("", memory=1e9, arithmetic=1e12, latency=1e-3, bandwidth=1e6, merge=1e-6)


def test_costs_by_hand() -> None:
    assert message(3, 5) == 8 * (1 + 15 + 8)  # words: status, ids, scores (two per word)
    assert received(1, 10, 1) == 0
    s = short_list(1000, 4)
    assert s == 250 + math.ceil(5 * math.sqrt(250)) + 6
    assert received(2, 1000, 4, completed=1) == 3 * (56 + message(2, s) + message(1, 1000 - s))
    assert scan(HOST, 1, 1e6, 8, 100) == 0.1
    assert scan(HOST, 1_000_000, 1e6, 8, 100) == 16
    cost = flat(HOST, 2, 1000, 4, scan=1.0)
    assert cost == (received(2, 1000, 4), pytest.approx(3 * (1e-3 + message(2, s) / 1e6)), pytest.approx(8e-6 * s))
    assert flat(HOST._replace(cores=2), 3, 10, 4, scan=1.0).merge == pytest.approx(2 * 4 * 10 * 1e-6)
    hidden = flat(HOST, 2, 1000, 4, scan=0.0).exchange - cost.exchange
    assert hidden == pytest.approx(3 * (1e-3 + 56 / 1e6))


def test_a_tree_of_one_level_receives_the_lists_and_sends_the_result() -> None:
    whole = tree(HOST, 1, 100, 8, 8)
    s = short_list(100, 8)
    assert whole.received == 7 * message(1, s) + message(1, 100)
    assert whole.merge == pytest.approx(8 * s * 1e-6)
    two_levels = tree(HOST, 1, 100, 64, 8)
    assert two_levels.received == 7 * message(1, short_list(100, 64)) + 7 * message(1, s) + 2 * message(1, 100)


def test_a_tree_pays_for_many_shards_and_small_scans() -> None:
    G = tree_pays_from(HOST, 1, 100, scan=0.1, share=0.1)
    assert G is not None
    assert G > 2
    for searched, saves in ((G, True), (G // 2, False)):
        by_tree = best_tree(HOST, 1, 100, searched)[1].search(0.1)
        assert (by_tree < 0.9 * flat(HOST, 1, 100, searched, 0.1).search(0.1)) == saves
    assert tree_pays_from(HOST, 1, 100, scan=1e9, share=0.1) is None


# ---- lost ranks ----


@pytest.fixture
def table(tmp_path: Path) -> Path:
    gk.ItemTable.from_rows(torch.randn(2000, 8), dtype=torch.int8).save(tmp_path / "table")
    return tmp_path


@pytest.mark.parametrize(
    ("fault", "timeout"), [("kill", SECONDS * 10), pytest.param("stop", 5, marks=pytest.mark.slow)]
)
def test_a_lost_rank_raises_on_the_others(fault: str, timeout: int, table: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        started(
            sys.executable, TESTS / "distributed" / "sharded_server.py", table, timeout, fault,
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
    assert "a rank has ended, hangs or makes another call" in message


def launched(
    table: Path, fault: str, *options: str, prefix: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """Starts ranks under torchrun."""
    torchrun = (*prefix, sys.executable, "-m", "torch.distributed.run", *options)
    return started(*torchrun, TESTS / "distributed" / "sharded_server.py", table, 60, fault, **variables)


@pytest.mark.slow
def test_an_elastic_restart_continues_serving(table: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun = launched(table, "kill", *options, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # as docs/scaling.md explains
    output = finished([torchrun])
    assert torchrun.returncode == 0, output
    assert [(table / f"served.{rank}").read_text().split() for rank in range(2)] == [["1"], ["1"]]


@pytest.mark.slow
@pytest.mark.skipif(not SCALING.exists(), reason="the documents are not beside the tests")
def test_the_server_of_the_document(tmp_path: Path) -> None:
    server = SCALING.read_text().split("```py\n")[1].split("```")[0]
    (tmp_path / "serve.py").write_text(server.replace('"items.table"', repr(str(tmp_path / "items.table"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun = started(*command, tmp_path / "serve.py")
    output = finished([torchrun])
    assert torchrun.returncode == 0, output
    assert output[0].count("ShardedItemTable(10_000 rows") == 2


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, connected by a pair of virtual interfaces."""
    names = [f"grank{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
    for last, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{last}/24 dev cable", f"-n {name} link set cable up"]
        commands += [f"-n {name} link set lo up"]
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed, so there are no network namespaces")
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
