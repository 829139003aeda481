"""A rank that loads its part of a table and serves searches; `test_sharded.py` starts it with torchrun's variables.

    python tests/sharded_server.py FOLDER TIMEOUT FAULT

FAULT happens to the last rank after the first search, unless it has been restarted: none, kill or stop. Every rank
writes a file to FOLDER: `served.RANK` with its restarts and address, or `lost.RANK` with the error that it raised.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from oracle import assert_same

import grank_kernels as gk
from grank_kernels.distributed.ranks import leave
from grank_kernels.distributed.sharded_table import ShardError

FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main() -> None:
    folder, timeout, fault = Path(sys.argv[1]), timedelta(seconds=float(sys.argv[2])), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timeout)
    rank, restarts = dist.get_rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    sharded, one = gk.ShardedItemTable.load(folder / "table", mmap=True), gk.ItemTable.load(folder / "table")
    queries = torch.randn(3, one.dim, generator=torch.Generator().manual_seed(1))
    want = gk.mips_topk(queries, one, 50)
    assert_same(gk.mips_topk(queries, sharded, 50), want)
    if fault in FAULTS and rank == dist.get_world_size() - 1 and restarts == "0":
        os.kill(os.getpid(), FAULTS[fault])
    try:
        for _ in range(3):
            assert_same(gk.mips_topk(queries, sharded, 50), want)
    except ShardError as error:
        (folder / f"lost.{rank}").write_text(str(error))
        os._exit(3)  # a normal exit would wait for the lost rank
    (folder / f"served.{rank}").write_text(f"{restarts} {os.environ.get('GRANK_ADDRESS', '')}")
    leave()


if __name__ == "__main__":
    main()
