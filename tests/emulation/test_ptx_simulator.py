"""The PTX simulator: control flow, barriers, and a planted bug for every check.

A planted bug is one change to a correct kernel. The kernels are hand-written PTX and need no compiler; compiled PTX is
tested in test_ptx_triton.py and test_ptx_cuda.py.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from emulation.ptx import GlobalMemory, Kernel, PtxError, Run, launch, parse, scheduler

SEEDS = [None, 0, 1]


def assemble(body: str, parameters: int = 2, target: str = "sm_80") -> Kernel:
    """PTX of a kernel with addresses a, b, ... in %d0, %d1, ..., the thread in %r0 and the CTA in %r1."""
    names = "abcdefgh"[:parameters]
    load = "\n".join(f"ld.param.u64 %d{i}, [{name}];" for i, name in enumerate(names))
    return parse(f"""
        .version 8.0
        .target {target}
        .address_size 64
        .visible .entry planted({", ".join(f".param .u64 .ptr .global .align 16 {name}" for name in names)})
        {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<40>;
        .shared .align 128 .b8 tile[4096];
        {load}
        mov.u32 %r0, %tid.x;  mov.u32 %r1, %ctaid.x;
        {body}
        ret;
        }}""")


@dataclass(frozen=True)
class Program:
    """A correct kernel, its inputs and its result."""

    body: str
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray
    block: int = 64
    grid: int = 1
    output: np.ndarray | None = None  # content of the output before the launch; None: uninitialised
    target: str = "sm_80"

    def run(self, body: str = "", seed: int | None = None) -> tuple[np.ndarray, Run]:
        memory = GlobalMemory()
        arguments = [memory.put(f"input{i}", array) for i, array in enumerate(self.inputs)]
        if self.output is None:
            arguments.append(memory.empty("output", self.expected.shape, self.expected.dtype))
        else:
            arguments.append(memory.put("output", self.output))
        kernel = assemble(body or self.body, len(arguments), self.target)
        run = launch(kernel, (self.grid,), (self.block,), arguments, memory, seed=seed)
        return memory.get("output"), run


X = np.arange(64, dtype=np.uint32) * 7 + 1

# Thread t passes its number to thread 63 - t.
REVERSE = Program(
    """
    mul.wide.u32 %d2, %r0, 4;  add.s64 %d3, %d0, %d2;
    ld.global.u32 %r2, [%d3];
    mov.u32 %r3, tile;  shl.b32 %r4, %r0, 2;  add.s32 %r5, %r3, %r4;
    setp.lt.u32 %p1, %r0, 16;  setp.lt.u32 %p2, %r0, 32;
    st.shared.u32 [%r5], %r2;
    bar.sync 0;
    sub.s32 %r6, 252, %r4;  add.s32 %r7, %r3, %r6;
    ld.shared.u32 %r8, [%r7];
    add.s64 %d4, %d1, %d2;
    st.global.u32 [%d4], %r8;
    """,
    (X,),
    X[::-1],
)

# Each warp reduces its numbers by shuffles and a vote.
REDUCE = Program(
    """
    mul.wide.u32 %d2, %r0, 4;  add.s64 %d3, %d0, %d2;  add.s64 %d4, %d1, %d2;
    ld.global.u32 %r2, [%d3];
    setp.lt.u32 %p1, %r0, 16;
    shfl.sync.bfly.b32 %r3, %r2, 16, 0x1f, 0xffffffff;  add.s32 %r2, %r2, %r3;
    shfl.sync.bfly.b32 %r3, %r2, 8, 0x1f, 0xffffffff;  add.s32 %r2, %r2, %r3;
    shfl.sync.bfly.b32 %r3, %r2, 4, 0x1f, -1;  add.s32 %r2, %r2, %r3;
    shfl.sync.bfly.b32 %r3, %r2, 2, 0x1f, -1;  add.s32 %r2, %r2, %r3;
    shfl.sync.bfly.b32 %r3|%p3, %r2, 1, 0x1f, -1;  add.s32 %r2, %r2, %r3;
    setp.eq.u32 %p2, %r2, 0;
    vote.sync.any.pred %p4, %p2, 0xffffffff;
    @%p4 mov.u32 %r2, 0;
    st.global.u32 [%d4], %r2;
    """,
    (X,),
    np.repeat([X[:32].sum(), X[32:].sum()], 32).astype(np.uint32),
)

# cp.async in two groups of four 16-byte pieces; every thread reads the copies of another one.
COPY = Program(
    """
    mul.wide.u32 %d2, %r0, 16;  add.s64 %d3, %d0, %d2;
    mov.u32 %r2, tile;  shl.b32 %r3, %r0, 4;  add.s32 %r4, %r2, %r3;
    cp.async.cg.shared.global [%r4], [%d3], 16;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r4+1024], [%d3], 16, 8;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    sub.s32 %r5, 1008, %r3;  add.s32 %r6, %r2, %r5;
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r6];
    cp.async.wait_all;
    barrier.sync 0;
    ld.shared.v4.u32 {%r14, %r15, %r16, %r17}, [%r6+1024];
    add.s64 %d4, %d1, %d2;  mul.wide.u32 %d5, %r0, 16;  add.s64 %d4, %d4, %d5;
    st.global.v4.u32 [%d4], {%r10, %r11, %r12, %r13};
    st.global.v4.u32 [%d4+16], {%r14, %r15, %r16, %r17};
    """,
    (np.arange(256, dtype=np.uint32),),
    np.stack(
        [
            np.arange(256, dtype=np.uint32).reshape(64, 4)[::-1],
            np.where(np.arange(4) < 2, np.arange(256).reshape(64, 4)[::-1], 0).astype(np.uint32),
        ],
        1,
    ).reshape(-1),
)

# Every thread of every CTA adds 1 by an atomic.
COUNT = Program(
    """
    mul.wide.u32 %d2, %r1, 4;  add.s64 %d3, %d0, %d2;
    ld.global.u32 %r2, [%d3];
    atom.global.add.u32 %r3, [%d1], %r2;
    red.global.gpu.relaxed.max.u32 [%d1+4], %r2;
    """,
    (np.array([1, 5, 2, 3], np.uint32),),
    np.array([64 * 11, 5], np.uint32),
    grid=4,
    output=np.zeros(2, np.uint32),
)

# Warp 1 waits for the first half of the tile at barrier 1, while warp 2 does not take part.
NAMED = Program(
    """
    mul.wide.u32 %d2, %r0, 4;  add.s64 %d3, %d0, %d2;  add.s64 %d4, %d1, %d2;
    ld.global.u32 %r2, [%d3];
    mov.u32 %r3, tile;  shl.b32 %r4, %r0, 2;  add.s32 %r5, %r3, %r4;
    setp.ge.u32 %p1, %r0, 64;
    @%p1 bra LAST;
    st.shared.u32 [%r5], %r2;
    bar.sync 1, 64;
    xor.b32 %r6, %r4, 128;  add.s32 %r6, %r6, %r3;
    ld.shared.u32 %r2, [%r6];
LAST:
    st.global.u32 [%d4], %r2;
    """,
    (np.arange(96, dtype=np.uint32),),
    np.concatenate([np.arange(32, 64), np.arange(32), np.arange(64, 96)]).astype(np.uint32),
    block=96,
)

# D = A B with A (64, 16) and B (16, 8) of f16: each warp group copies both to shared memory as 8 x 8 core matrices.
A = (np.arange(64)[:, None] % 5 + np.arange(16) % 3 - 2).astype(np.float16)
B = (np.arange(16)[:, None] % 4 - np.arange(8) % 3).astype(np.float16)


def cores(matrix: np.ndarray) -> np.ndarray:
    """(rows, 16) in the layout of a descriptor without swizzle: 8 x 8 blocks, along the depth first."""
    return matrix.reshape(-1, 8, 2, 8).swapaxes(1, 2).copy()


# Descriptors, in units of 16 bytes: start; 8 (128 bytes) to the next block of the depth, 16 (256) to the next 8 rows. B
# starts at byte 2048.
WGMMA = Program(
    """
    mul.wide.u32 %d3, %r0, 16;  add.s64 %d4, %d0, %d3;
    mov.u32 %r2, tile;  shl.b32 %r3, %r0, 4;  add.s32 %r4, %r2, %r3;
    ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d4];
    st.shared.v4.u32 [%r4], {%r5, %r6, %r7, %r8};
    setp.lt.u32 %p1, %r0, 16;
    add.s64 %d5, %d1, %d3;
    @%p1 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d5];
    @%p1 st.shared.v4.u32 [%r4+2048], {%r5, %r6, %r7, %r8};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    shr.u32 %r9, %r2, 4;  cvt.u64.u32 %d6, %r9;
    or.b64 %d6, %d6, 0x0000001000080000;
    add.s64 %d7, %d6, 128;
    mov.pred %p2, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20, %r21, %r22, %r23}, %d6, %d7, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    // row 16 warp + lane / 4, columns 2 (lane % 4) and the next one; then 8 rows further down
    shr.u32 %r10, %r0, 2;  and.b32 %r11, %r10, 7;  shr.u32 %r12, %r0, 5;  mad.lo.s32 %r13, %r12, 16, %r11;
    and.b32 %r14, %r0, 3;  shl.b32 %r15, %r13, 5;  mad.lo.s32 %r16, %r14, 8, %r15;
    cvt.u64.u32 %d8, %r16;  add.s64 %d9, %d2, %d8;
    st.global.v2.f32 [%d9], {%r20, %r21};
    st.global.v2.f32 [%d9+256], {%r22, %r23};
    """,
    (cores(A), cores(B.T.copy())),
    A.astype(np.float32) @ B.astype(np.float32),
    block=128,
    target="sm_90a",
)

PROGRAMS = {
    "reverse": REVERSE, "reduce": REDUCE, "copy": COPY, "count": COUNT, "named": NAMED, "wgmma": WGMMA,
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_correct_programs_pass(name: str, seed: int | None) -> None:
    found, run = PROGRAMS[name].run(seed=seed)
    np.testing.assert_array_equal(found, PROGRAMS[name].expected)
    assert (run.executions > 0).all() or name == "reduce"  # its branch for a vote of zero is not taken


@dataclass(frozen=True)
class Bug:
    program: Program
    old: str
    new: str
    says: str


BUGS = {
    "no barrier": Bug(REVERSE, "bar.sync 0;", "", "race on shared byte .* written by another warp"),
    "barrier of the warp only": Bug(REVERSE, "bar.sync 0;", "bar.warp.sync -1;", "race on shared byte"),
    "write after read": Bug(REVERSE, "st.global.u32 [%d4], %r8;", "st.shared.u32 [%r5], 0;", "race .* read by another"),
    "two values in one word": Bug(REVERSE, "bar.sync 0;", "bar.sync 0; st.shared.u32 [%r3+512], %r0;", "differently"),
    "beyond shared memory": Bug(REVERSE, "[%r7]", "[%r7+3844]", "out of bounds of shared memory: byte 4096 of 4096"),
    "before shared memory": Bug(REVERSE, "[%r7]", "[%r7+-4]", "out of bounds of shared memory: byte -4"),
    "uninitialised shared memory": Bug(REVERSE, "st.shared", "@%p2 st.shared", "read of uninitialised memory: shared"),
    "uninitialised global memory": Bug(REVERSE, "[%d3]", "[%d1]", "read of uninitialised memory: output"),
    "reads past the end": Bug(REVERSE, "[%d3]", "[%d3+4]", r"out of bounds: input0\+256 of 256 bytes, thread 63"),
    "reads before the start": Bug(REVERSE, "[%d3]", "[%d3+-4]", "out of bounds: input0-4 of 256 bytes, thread 0"),
    "writes past the end": Bug(REVERSE, "[%d4]", "[%d4+4]", r"out of bounds: output\+256"),
    "misaligned": Bug(REVERSE, "[%d3]", "[%d3+2]", "misaligned access of 4 bytes"),
    "misaligned vector": Bug(COPY, "v4.u32 [%d4]", "v4.u32 [%d4+4]", "misaligned access of 16 bytes"),
    "barrier in part of a warp": Bug(REVERSE, "bar.sync 0;", "@%p1 bar.sync 0;", "barrier reached by part of a warp"),
    "barrier in one of two warps": Bug(REVERSE, "bar.sync 0;", "@%p2 bar.sync 0;", "race on shared byte"),
    "barriers that do not meet": Bug(
        REVERSE, "bar.sync 0;", "@%p2 bar.sync 1; @!%p2 bar.sync 2;", "deadlock: not all threads .* thread 0"
    ),
    "exit before the barrier": Bug(REVERSE, "bar.sync 0;", "@%p2 exit; bar.sync 0;", "other threads have exited"),
    "trap": Bug(REVERSE, "bar.sync 0;", "@%p1 trap; bar.sync 0;", "trap, thread 0"),
    "shuffle in part of a warp": Bug(
        REDUCE, "shfl.sync.bfly.b32 %r3, %r2, 8", "@%p1 shfl.sync.bfly.b32 %r3, %r2, 8", "by part of a warp"
    ),
    "shuffle with a mask too small": Bug(REDUCE, "0x1f, 0xffffffff", "0x1f, 0xffff", "part of a warp: .* 0xffff"),
    "shuffle from outside the mask": Bug(
        REDUCE, "shfl.sync.bfly.b32 %r3, %r2, 16, 0x1f, 0xffffffff;",
        "@%p1 shfl.sync.bfly.b32 %r3, %r2, 16, 0x1f, 0xffff;", "lane outside its mask",
    ),
    "vote in part of a warp": Bug(REDUCE, "vote.sync", "@%p1 vote.sync", "executed by part of a warp"),
    "matrices in part of a warp": Bug(
        REVERSE, "sub.s32", "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r3]; sub.s32", "part of a warp"
    ),
    "copy not waited for": Bug(COPY, "cp.async.wait_group 1;", "", "read of in-flight memory: shared byte"),
    "copy waited for too early": Bug(COPY, "cp.async.wait_group 1;", "cp.async.wait_group 2;", "read of in-flight"),
    "copy not committed": Bug(COPY, "16;\n    cp.async.commit_group;", "16;", "in-flight"),
    "copy not waited for by all": Bug(COPY, "bar.sync 0;", "", "race|in-flight"),
    "barrier before the wait": Bug(
        COPY, "cp.async.wait_all;\n    barrier.sync 0;", "barrier.sync 0; cp.async.wait_all;", "race on shared byte"
    ),
    "write to what is in flight": Bug(COPY, "cp.async.wait_group 1;", "st.shared.u32 [%r4], 0;", "write to in-flight"),
    "copy onto what is in flight": Bug(COPY, "[%r4+1024], [%d3]", "[%r4], [%d3]", "write to in-flight"),
    "copy onto what is being read": Bug(
        COPY, "cp.async.wait_all;", "cp.async.cg.shared.global [%r4], [%d3], 16; cp.async.wait_all;", "race .* read by"
    ),
    "copy from outside": Bug(COPY, "[%d3], 16;", "[%d3+16], 16;", r"out of bounds: input0\+1024"),
    "copy reads more than it writes": Bug(COPY, "[%d3], 16, 8;", "[%d3], 16, 24;", "at most 16 bytes, got 24"),
    "sum without an atomic": Bug(
        COUNT, "atom.global.add.u32 %r3, [%d1], %r2;",
        "ld.global.u32 %r3, [%d1]; add.s32 %r3, %r3, %r2; st.global.u32 [%d1], %r3;", "race on output",
    ),
    "plain read beside atomics": Bug(COUNT, "atom.global", "ld.global.u32 %r4, [%d1]; atom.global", "race on output"),
    "plain write beside atomics": Bug(COUNT, "red.global", "st.global.u32 [%d1], %r0; red.global", "race on output"),
    "atomic on uninitialised memory": Bug(
        REVERSE, "st.global.u32 [%d4], %r8;", "red.global.add.u32 [%d4], %r8;", "atomic on uninitialised memory: output"
    ),
    "not all meet at the named barrier": Bug(NAMED, "bar.sync 1, 64;", "bar.sync 1, 96;", "other threads have exited"),
    "read before the named barrier": Bug(NAMED, "bar.sync 1, 64;", "", "race on shared byte"),
    "no proxy fence": Bug(WGMMA, "fence.proxy.async.shared::cta;", "", "written after the last fence.proxy.async"),
    "no barrier before wgmma": Bug(WGMMA, "bar.sync 0;", "", "race|uninitialised"),
    "wgmma not waited for": Bug(WGMMA, "wgmma.wait_group.sync.aligned 0;", "", "%r2[0-3] is in use by a wgmma"),
    "wgmma not committed": Bug(WGMMA, "wgmma.commit_group.sync.aligned;", "", "in use by a wgmma"),
    "wgmma waited for too early": Bug(WGMMA, "wait_group.sync.aligned 0", "wait_group.sync.aligned 1", "in use"),
    "overwritten under wgmma": Bug(
        WGMMA, "wgmma.wait", "bar.sync 0; st.shared.u32 [%r4], 0; wgmma.wait", "was written while a wgmma read it"
    ),
    "wgmma out of shared memory": Bug(WGMMA, "%d7, %d6, 128", "%d7, %d6, 255", "out of bounds of shared memory"),
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, seed: int | None) -> None:
    bug = BUGS[name]
    assert bug.program.body.count(bug.old) >= 1
    with pytest.raises(PtxError, match=bug.says):
        bug.program.run(bug.program.body.replace(bug.old, bug.new), seed=seed)


# ---- control flow, barriers, order


def run(body: str, block: int = 32, grid: int = 1, seed: int | None = None, words: int = 64) -> np.ndarray:
    """The output, zero before the launch and at %d0, after the body."""
    memory = GlobalMemory()
    address = memory.put("output", np.zeros(words, np.uint32))
    launch(assemble(body, 1), (grid,), (block,), [address], memory, seed=seed)
    return memory.get("output")


STORE = "mul.wide.u32 %d9, %r0, 4; add.s64 %d9, %d0, %d9; st.global.u32 [%d9], %r9;"


@pytest.mark.parametrize("seed", SEEDS)
def test_diverged_threads_reconverge(seed: int | None) -> None:
    """Thread t loops t + 1 times through one of two branches; the shuffle after the loop needs all threads."""
    found = run(
        f"""
        mov.u32 %r9, 0;  mov.u32 %r2, 0;
AGAIN:
        and.b32 %r3, %r2, 1;  setp.eq.u32 %p1, %r3, 0;
        @%p1 bra EVEN;
        add.s32 %r9, %r9, 100;
        bra JOIN;
EVEN:
        add.s32 %r9, %r9, 1;
JOIN:
        add.s32 %r2, %r2, 1;  setp.le.u32 %p2, %r2, %r0;
        @%p2 bra AGAIN;
        shfl.sync.down.b32 %r4, %r9, 1, 0x1f, -1;
        sub.s32 %r9, %r4, %r9;
        {STORE}
        """,
        seed=seed,
    )
    np.testing.assert_array_equal(found[:32], [*([100, 1] * 16)[:31], 0])


@pytest.mark.parametrize(("operation", "result"), [("popc.u32", 40), ("and.pred", 0), ("or.pred", 1)])
def test_barrier_with_a_reduction(operation: str, result: int) -> None:
    register = "%r9" if operation == "popc.u32" else "%p2"
    found = run(
        f"setp.lt.u32 %p1, %r0, 40; mov.u32 %r9, 0; bar.red.{operation} {register}, 0, %p1;"
        + ("" if register == "%r9" else "selp.u32 %r9, 1, 0, %p2;")
        + STORE,
        block=64,
    )
    np.testing.assert_array_equal(found, np.full(64, result))


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode: str, width: int) -> None:
    """CUDA programming guide: a lane with a source outside its segment keeps its own value."""
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    found = run(f"shfl.sync.{mode}.b32 %r9|%p1, %r0, 3, {clamp}, -1; @!%p1 add.u32 %r9, %r9, 1000; {STORE}")
    for lane in range(32):
        first = lane // width * width
        source = {"up": lane - 3, "down": lane + 3, "bfly": lane ^ 3, "idx": first + 3}[mode]
        assert found[lane] == (source if first <= source < first + width else lane + 1000)


def test_votes_and_masks() -> None:
    assert run(f"setp.ge.u32 %p1, %r0, 30; vote.sync.ballot.b32 %r9, %p1, -1; {STORE}")[5] == 0xC0000000
    assert run(f"shr.u32 %r2, %r0, 3; match.any.sync.b32 %r9, %r2, -1; {STORE}")[9] == 0xFF00
    assert run(f"redux.sync.max.u32 %r9, %r0, -1; {STORE}")[0] == 31
    found = run(f"setp.lt.u32 %p1, %r0, 4; @%p1 bra A; exit; A: activemask.b32 %r9; {STORE}")
    np.testing.assert_array_equal(found[:5], [15, 15, 15, 15, 0])


def test_the_order_of_warps_follows_the_seed() -> None:
    """Each of 32 warps takes the next number: in warp order without a seed, in another order with one."""
    body = "setp.eq.u32 %p1, %r0, 0; @%p1 atom.global.add.u32 %r9, [%d0], 1;" + (
        "mul.wide.u32 %d9, %r1, 4; add.s64 %d9, %d0, %d9; @%p1 st.global.u32 [%d9+4], %r9;"
    )
    orders = [run(body, grid=32, seed=seed)[1:33] for seed in (None, 1, 1, 2)]
    np.testing.assert_array_equal(orders[0], np.arange(32))
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(32))
    np.testing.assert_array_equal(orders[1], orders[2])
    assert len({tuple(order) for order in orders}) == 3


def test_races_are_found_in_every_order() -> None:
    """Warps write one word; if each warp runs to its end first, the values show no race."""
    bug = BUGS["no barrier"]
    for seed in range(20):
        with pytest.raises(PtxError, match="race"):
            bug.program.run(bug.program.body.replace(bug.old, bug.new), seed=seed)


def test_the_same_bytes_written_twice_are_no_race() -> None:
    found = run("and.b32 %r9, %r0, 31; mul.wide.u32 %d9, %r9, 4; add.s64 %d9, %d0, %d9; st.global.u32 [%d9], 7;", 64, 3)
    np.testing.assert_array_equal(found, [7] * 32 + [0] * 32)


def test_launches_are_in_order() -> None:
    """A launch may read the writes of an earlier one, from any CTA."""
    memory = GlobalMemory()
    first, second = memory.put("x", X), memory.empty("y", 64, np.uint32)
    third = memory.empty("z", 64, np.uint32)
    launch(assemble(REVERSE.body), (1,), (64,), [first, second], memory)
    launch(assemble(REVERSE.body), (1,), (64,), [second, third], memory)
    np.testing.assert_array_equal(memory.get("z"), X)


def test_an_endless_loop_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "STEPS", 1000)
    with pytest.raises(PtxError, match="still running after 1000"):
        run("HERE: add.s32 %r2, %r2, 1; bra HERE;")
