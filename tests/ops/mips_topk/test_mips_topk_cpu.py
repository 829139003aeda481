"""The cpu backend of mips_topk: instruction sets, threads, sampled thresholds, addresses, processes."""

import ctypes
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mips_topk_cases import reserved
from oracle import (
    KINDS,
    assert_same,
    check,
    expected,
    integers,
    items_of,
    run_python,
    search,
    searching_isas,
)

import grank_kernels as gk
from grank_kernels.backends import cpu


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- instruction sets ----


@pytest.mark.parametrize("isa", searching_isas(), indirect=True)
@pytest.mark.parametrize("B", [1, 7, 33])
def test_every_instruction_set(B: int, isa: str, kind: str) -> None:
    """Plain, filtered and listed rows, in a batch size for each kernel: expected bits include the order of sums."""
    assert cpu.isa() == isa
    queries, rows, ids = torch.randn(B, 133), torch.randn(2500, 133), torch.randperm(2500)
    for filters in ({}, {"exclude": ids[:60].expand(B, -1), "ids": ids}, {"allow": torch.rand(B, 2500) < 0.02}):
        check(queries, rows, 40, kind=kind, backend="cpu", **filters)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_new_memory_is_poisoned() -> None:
    """Without it no test would notice that a kernel reads unwritten memory."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.POINTER(ctypes.c_uint8)
    fresh = libc.malloc(ctypes.c_size_t(4096))
    assert fresh[:4096] == [0x7F] * 4096
    libc.free(fresh)


def test_instruction_set_is_chosen_by_the_environment() -> None:
    code = "import grank_kernels as gk; print(gk.show_config())"
    done = run_python(code, GRANK_CPU_ISA="baseline")  # the default only on the weakest machines
    assert "cpu instruction set: baseline, of baseline" in done.stdout, done.stderr


def test_impossible_instruction_set() -> None:
    code = "import torch, grank_kernels as gk; gk.mips_topk(torch.ones(2, 3), torch.ones(5, 3), 1)"
    done = run_python(code, GRANK_CPU_ISA="mmx")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: GRANK_CPU_ISA must be one of baseline")
    assert message.endswith("got 'mmx'")
    for isa, runs_here in cpu.isas().items():
        assert (f"{isa} (not on this processor)" in message) != runs_here
        assert isa in message


# ---- threads ----


@pytest.fixture
def _threads_restored() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize(("B", "N", "d", "k"), [(1, 50000, 33, 50), (9, 30000, 7, 600), (600, 3000, 8, 20)])
def test_any_number_of_threads(B: int, N: int, d: int, k: int, kind: str) -> None:
    queries, items = torch.randn(B, d), items_of(torch.randn(N // 2, d).repeat(2, 1), kind)
    exclude, allow = torch.randint(-1, N, (B, 30)), torch.rand(B, N) < 0.7
    torch.set_num_threads(1)
    want = gk.mips_topk(queries, items, k, exclude=exclude, allow=allow, backend="cpu")
    for threads in (2, 3, 8, 40):
        torch.set_num_threads(threads)
        for _ in range(3):
            got = gk.mips_topk(queries, items, k, exclude=exclude, allow=allow, backend="cpu")
            assert_same(got, want, f"{threads} threads")


def test_many_callers_at_once() -> None:
    problems = []
    for i in range(24):
        B, N, d, k = 1 + i % 7, 100 + 2500 * (i % 5), 1 + 9 * (i % 6), 1 + 37 * (i % 4)
        items = items_of(torch.randn(N, d), KINDS[i % 4], torch.randperm(N) if i % 3 == 0 else None)
        problems.append((torch.randn(B, d), items, k, torch.rand(N) < 0.8 if i % 2 else None))

    def solve(i: int) -> gk.TopK:
        queries, items, k, allow = problems[i]
        return gk.mips_topk(queries, items, k, allow=allow, backend="cpu")

    alone = [solve(i) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        for i, got in enumerate(pool.map(solve, [*range(24)] * 8)):
            assert_same(got, alone[i % 24], f"problem {i % 24}")


def test_python_runs_on_during_a_search() -> None:
    queries, items, state = torch.randn(16, 64), torch.randn(60000, 64), {"runs": False}

    def long_search(repeats: int) -> None:
        state["runs"] = True
        gk.mips_topk(queries.repeat(repeats, 1), items, 1, backend="cpu")
        state["runs"] = False

    repeats = 1
    while True:  # until one search takes 0.2 s on this machine
        begin = time.perf_counter()
        long_search(repeats)
        if time.perf_counter() - begin > 0.2:
            break
        repeats *= 2
    # If the search held the GIL, this loop would stop until its end and count two or three ticks.
    for _ in range(10):
        searcher = threading.Thread(target=long_search, args=(repeats,))
        searcher.start()
        ticks = 0
        while searcher.is_alive():
            time.sleep(0.001)
            ticks += state["runs"]
        if ticks > 15:
            return
    pytest.fail(f"only {ticks} ticks of a millisecond during a search of 200")


FORK = """
import os, threading, warnings
import torch, grank_kernels as gk
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what is tested here
torch.set_num_threads(4)
queries, items = torch.randn(8, 16), torch.randn(60000, 16)
want = gk.mips_topk(queries, items, 20, backend="cpu")

def agrees():
    got = gk.mips_topk(queries, items, 20, backend="cpu")
    return torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)

def agrees_in_a_child(depth=1):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if agrees() and agrees() and (depth == 0 or agrees_in_a_child(depth - 1)) else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0

for _ in range(5):
    assert agrees_in_a_child()
    assert agrees()
stop, wrong = threading.Event(), []
def search_on():
    while not stop.is_set():
        if not agrees():
            wrong.append(1)
searchers = [threading.Thread(target=search_on) for _ in range(2)]
for thread in searchers:
    thread.start()
for _ in range(10):  # forks in the middle of searches
    assert agrees_in_a_child(0)
stop.set()
for thread in searchers:
    thread.join()
assert not wrong and agrees()
print("all agree")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_fork_after_and_during_searches() -> None:
    done = run_python(FORK)
    assert done.stdout.strip() == "all agree", done.stderr


def test_flushed_denormals_change_nothing(kind: str) -> None:
    tiny = {"float32": 1e-42, "float16": 6e-8, "bfloat16": 1e-40, "int8": 1e-38}[kind]
    queries, rows = torch.randn(2, 6) * 1e-3, torch.randint(-30, 30, (9000, 6)) * tiny
    allow = torch.arange(9000) % 7 != 0
    want = check(queries, rows, 50, kind=kind, backend="cpu", allow=allow)
    if kind != "int8":
        assert ((want.values != 0) & (want.values.abs() < torch.finfo(torch.float32).tiny)).any() or kind == "float16"
    items = items_of(rows, kind)
    assert torch.set_flush_denormal(True)
    try:
        got = gk.mips_topk(queries, items, 50, backend="cpu", allow=allow)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, want)
    assert float(torch.tensor(1e-40) * 1) != 0  # the caller's mode is unchanged


# ---- a threshold from a sample: from 16 384 rows on, from 262 144 on for 8 queries or more ----

FEW, MANY = (3, 16384), (8, 262144)


@pytest.mark.parametrize(
    ("B", "N", "k"), [(*size, k) for size in (FEW, (1, 16383), (7, 40001), MANY) for k in (1, 10, 200, 5000)][:-2]
)
def test_sampled_threshold(B: int, N: int, k: int, kind: str) -> None:
    check(torch.randn(B, 3), torch.randn(N, 3), k, kind=kind, backend="cpu")


@pytest.mark.parametrize(("B", "N"), [FEW, MANY])
@pytest.mark.parametrize("share", [0.0005, 0.02, 0.6])
@pytest.mark.parametrize("per_query", [False, True])
def test_sampled_threshold_among_allowed_rows(B: int, N: int, share: float, per_query: bool) -> None:
    allow = torch.rand((B, N) if per_query else (N,)) < share
    check(torch.randn(B, 3), torch.randn(N, 3), 150, kind="float32", backend="cpu", allow=allow)


@pytest.mark.parametrize(("B", "N"), [FEW, MANY])
def test_sampled_threshold_where_queries_differ(B: int, N: int) -> None:
    """Masks per query: most rows, a few, none, and all but the best."""
    queries, rows = torch.randn(B, 3), torch.randn(N, 3)
    allow = torch.ones(B, N, dtype=torch.bool)
    allow[0] = torch.rand(N) < 0.001
    allow[1] = False
    best = search(queries, rows, 3000, kind="float32", backend="cpu").indices
    exclude = torch.full((B, 3000), -1)
    exclude[2] = best[2]
    got = check(queries, rows, 150, kind="float32", backend="cpu", allow=allow, exclude=exclude)
    assert not torch.isin(got.indices[2], best[2]).any()


@pytest.mark.parametrize(("B", "N"), [FEW, MANY])
@pytest.mark.parametrize("table", ["constant", "two values", "ascending", "descending", "nan", "-inf", "one row"])
def test_sampled_threshold_of_odd_tables(B: int, N: int, table: str) -> None:
    rows = {
        "constant": torch.ones(N, 2),
        "two values": (torch.rand(N, 1) < 0.01) * torch.ones(2),
        "ascending": torch.arange(N)[:, None] * torch.tensor([1e-3, 0.0]),
        "descending": torch.arange(N).flip(0)[:, None] * torch.tensor([1e-3, 0.0]),
        "nan": torch.where(torch.rand(N, 1) < 0.999, torch.nan, torch.randn(N, 2)),
        "-inf": torch.where(torch.rand(N, 1) < 0.999, -torch.inf, torch.randn(N, 2)),
        "one row": torch.randn(1, 2).expand(N, 2),
    }[table]
    queries = torch.rand(B, 2) + 0.1
    check(queries, rows, 120, kind="float32", backend="cpu")
    if table in ("constant", "two values", "-inf"):
        check(queries, rows, 120, kind="float32", backend="cpu", ids=torch.randperm(N))


def sampled_rows(N: int, count: int) -> np.ndarray:
    """The sample of mips_topk.cpp: one row per stride, at a pseudo-random offset."""
    i = np.arange(count, dtype=np.uint64)
    begin, end = (N * (i + np.uint64(shift)) // np.uint64(count) for shift in (0, 1))
    with np.errstate(over="ignore"):
        mixed = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (begin + (mixed >> np.uint64(32)) % (end - begin)).astype(np.int64)


@pytest.mark.parametrize(("B", "N", "sample"), [(*FEW, 1024), (*MANY, 16384)])
@pytest.mark.parametrize("external", [False, True])
def test_a_sample_that_misleads(B: int, N: int, sample: int, external: bool, kind: str) -> None:
    """The sample has the k - 1 best rows, so its threshold is above the k-th best: the search must run again."""
    k = 100
    rows, best = torch.rand(N, 2), torch.from_numpy(sampled_rows(N, sample)[: k - 1])
    rows[best] += 10
    queries = torch.rand(B, 2)
    queries[1] *= -1  # its threshold is valid
    allow = torch.ones(B, N, dtype=torch.bool)
    allow[torch.arange(B).repeat(3), best[: 3 * B]] = False  # masks per query that exclude some of the best
    exclude = torch.cat([best[-7 * B :].reshape(B, 7), torch.randint(0, N, (B, 30))], 1)
    ids = None
    if external:
        ids = torch.randperm(N)
        exclude = ids[exclude]
    check(queries, rows, k, kind=kind, backend="cpu", exclude=exclude, allow=allow, ids=ids)


# ---- addresses ----


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_rows_beyond_2_to_the_31_elements(kind: str) -> None:
    stride, rows = 2**25 + 3, torch.randn(70, 20).to(getattr(torch, kind))
    memory = reserved(70 * stride, rows.dtype)
    far = memory.as_strided((70, 20), (stride, 1))
    far.copy_(rows)
    assert far.stride(0) * 69 > 2**31
    for allow in (None, torch.rand(70) < 0.5):
        got = gk.mips_topk(rows[:3], far, 30, allow=allow, backend="cpu")
        assert_same(got, expected(rows[:3], rows, 30, kind=kind, backend="cpu", allow=allow))


def test_allow_beyond_2_to_the_31_elements() -> None:
    queries, rows, mask = torch.randn(4, 20), torch.randn(70, 20), torch.rand(4, 70) < 0.5
    far = reserved(3 * (2**30 + 5) + 70, torch.bool).as_strided((4, 70), (2**30 + 5, 1))
    far.copy_(mask)
    got = gk.mips_topk(queries, rows, 30, allow=far, backend="cpu")
    assert_same(got, expected(queries, rows, 30, kind="float32", backend="cpu", allow=mask))


@pytest.mark.slow
def test_table_of_more_than_2_to_the_31_elements() -> None:
    """16.8 million overlapping rows of width 128 in 34 MB; the last ones are the best."""
    N, d = 2**24 + 70, 128
    numbers = torch.zeros(N + d - 1, dtype=torch.bfloat16)
    numbers[-300:] = integers(300).bfloat16()
    rows = numbers.as_strided((N, d), (1, 1))
    assert rows.numel() > 2**31
    queries = integers(2, d)
    got = gk.mips_topk(queries, rows, 50, backend="cpu")
    tail = N - 1000
    want = expected(queries, rows[tail:], 50, kind="bfloat16", backend="cpu")
    assert (want.values > 0).all()
    assert_same(got, gk.TopK(want.values, want.indices + tail))


MEMORY = """
import torch, grank_kernels as gk

def megabytes(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

B, N, d, k = 256, 300_000, 64, 100
torch.set_num_threads(4)
gk.mips_topk(torch.randn(8, d), torch.randn(50_000, d), k, backend="cpu")
queries, rows = torch.randn(B, d), torch.empty(N, d).fill_(0.5)
rows[::2] = 0.25
allow = torch.ones(N, dtype=torch.bool)
for dtype in (torch.float32, torch.bfloat16, torch.int8):
    items = gk.ItemTable.from_rows(rows, dtype=dtype)
    for mask in (None, allow):
        open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
        before = megabytes("VmRSS")
        top = gk.mips_topk(queries, items, k, allow=mask, backend="cpu")
        print(dtype, megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_search() -> None:
    done = run_python(MEMORY)
    assert done.returncode == 0, done.stderr
    peaks = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(peaks) == 6
    # 32 MB and (values, indices, a reservoir of 2 k keys, scratch) for 256 queries; all scores would take 300 MB.
    assert max(peaks) < 32 + 256 * 100 * (4 + 8 + 16 + 16) / 2**20, peaks


# ---- long searches, large results ----


@pytest.mark.parametrize("step", [1, 1134903170, 2**32])
def test_excluded_ids_in_any_progression(step: int) -> None:
    """Progressions that a multiplicative hash maps to few slots: with a million ids probing would take hours."""
    count = 1_000_000
    ids = torch.arange(count) * step
    rows, queries = torch.randn(2000, 4), torch.randn(2, 4)
    more = {"ids": ids[:2000], "exclude": ids[1000:].expand(2, -1)}
    got = search(queries, rows, 30, kind="float32", backend="cpu", **more)
    want = search(queries, rows[:1000], 30, kind="float32", backend="cpu", ids=ids[:1000])
    assert_same(got, want)


def test_more_results_than_memory() -> None:
    with pytest.raises((ValueError, MemoryError), match=r"k must .*1099511627776"):
        gk.mips_topk(torch.randn(2, 4), torch.randn(50, 4), 2**40, backend="cpu")


INTERRUPT = """
import os, signal, threading, time, torch, grank_kernels as gk
torch.set_num_threads(2)
queries, rows, sent = torch.randn(64, 64), torch.randn(200_000, 64), []

def search(repeats):
    gk.mips_topk(queries.repeat(repeats, 1), rows, 10, backend="cpu")

def seconds(repeats):
    begin = time.perf_counter()
    search(repeats)
    return time.perf_counter() - begin

repeats = 1
while seconds(repeats) < 1:
    repeats *= 2

def interrupt():
    time.sleep(0.2)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

want = gk.mips_topk(queries, rows, 10, backend="cpu")
threading.Thread(target=interrupt).start()
try:
    search(repeats)
except KeyboardInterrupt:
    share = (time.perf_counter() - sent[0]) / seconds(repeats)
    got = gk.mips_topk(queries, rows, 10, backend="cpu")
    print("interrupted", share < 0.5, torch.equal(got.indices, want.indices))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_ends_a_search() -> None:
    """An interrupt stops a search early; the next search is complete."""
    done = run_python(INTERRUPT)
    assert done.stdout.strip() == "interrupted True True", done.stdout + done.stderr


EXIT = """
import threading, time, torch, grank_kernels as gk
queries, rows, begun = torch.randn(256, 64), torch.randn(100_000, 64), threading.Semaphore(0)

def search_on():
    while True:
        gk.mips_topk(queries, rows, 50, backend="cpu")
        begun.release()

for _ in range(3):
    threading.Thread(target=search_on, daemon=True).start()
for _ in range(3):
    begun.acquire()
"""


def test_exit_while_daemon_threads_search() -> None:
    done = run_python(EXIT)
    assert (done.returncode, done.stderr) == (0, "")
