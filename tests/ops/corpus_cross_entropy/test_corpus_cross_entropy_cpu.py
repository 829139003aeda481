"""What only the cpu backend of corpus_cross_entropy has: instruction sets, threads, its own memory."""

import os
from collections.abc import Iterator

import pytest
import torch
from corpus_oracle import check_loss, loss_problem
from oracle import isas, run_python
from ranker_oracle import FLOATS

from grank_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = isas()


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    assert cpu.isa() == isa
    check_loss(loss_problem(130, 700, 37, form="windows", dtype=dtype), "cpu")


def test_many_items() -> None:
    """70,000 of them, added up one after the other in float32, would lose 1e-4."""
    check_loss(loss_problem(5, 70_000, 16), "cpu")


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    problem = loss_problem(300, 1_000, 24, form="windows", dtype=dtype)
    torch.set_num_threads(1)
    want = problem.call("cpu")
    for threads in (2, 3, 40):
        torch.set_num_threads(threads)
        for got, alone in zip(problem.call("cpu"), want, strict=True):
            assert torch.equal(got, alone), f"{threads} threads"


def test_a_row_alone_and_among_others() -> None:
    problem = loss_problem(150, 400, 16, form="none")
    whole = problem.call("cpu")
    for r in (0, 63, 65, 148):
        alone = problem.but(users=problem.users[r : r + 1], targets=problem.targets[r : r + 1])
        assert torch.equal(alone.call("cpu")[0], whole[0][r : r + 1])


MEMORY = """
import torch
import grank_kernels as gk

def kilobytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1])

torch.set_num_threads(2)
R, N, d = 512, 100_000, 16  # the logits would take 205 MB
users, items = torch.randn(R, d, requires_grad=True), torch.randn(N, d, requires_grad=True)
targets = torch.randint(N, (R,))
gk.corpus_cross_entropy(users[:2], items[:100], targets[:2] % 100, backend=BACKEND).sum().backward()
items.grad = None
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
before = kilobytes("VmRSS")
gk.corpus_cross_entropy(users, items, targets, backend=BACKEND).sum().backward()
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_memory_beyond_gradients(backend: str) -> None:
    done = run_python(MEMORY.replace("BACKEND", repr(backend)), MALLOC_MMAP_THRESHOLD_="16384")
    assert done.returncode == 0, done.stderr
    gradients = (100_000 + 512) * 16 * 4
    assert int(done.stdout) * 1024 < 2 * gradients + (64 << 20)
