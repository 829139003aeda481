"""Launches of the PTX simulator: counters, refused kernels and launches, layout of arguments."""

import numpy as np
import pytest
from emulation.ptx import Coverage, GlobalMemory, PtxError, launch, parse
from test_ptx_simulator import COPY, COUNT, WGMMA, assemble, run

# ---- counters


def test_coverage_counts_executed_instructions() -> None:
    """An instruction counts only if its guard is true in some thread."""
    kernel = assemble("setp.lt.u32 %p1, %r0, %r1; @%p1 st.global.u32 [%d0], 1;", 1)
    memory = GlobalMemory()
    address = memory.put("output", np.zeros(1, np.uint32))
    coverage = Coverage(kernel)
    coverage.add(launch(kernel, (1,), (32,), [address], memory))
    assert [i.name for i in coverage.missing()] == ["st"]
    assert coverage.fraction == (len(kernel.instructions) - 1) / len(kernel.instructions)
    coverage.add(launch(kernel, (2,), (32,), [address], memory))
    assert coverage.fraction == 1


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)])
def test_sectors(stride: int, sectors: int) -> None:
    kernel = assemble(f"mul.wide.u32 %d9, %r0, {stride}; add.s64 %d9, %d0, %d9; ld.global.u32 %r2, [%d9];", 1)
    memory = GlobalMemory()
    counters = launch(kernel, (2,), (64,), [memory.put("x", np.zeros(1024, np.uint32))], memory).counters
    assert counters["global_load_sectors"] == 4 * sectors
    assert counters["global_load_bytes"] == 4 * 32 * 4


@pytest.mark.parametrize(
    ("type", "stride", "passes"),
    [
        ("u32", 4, 1),
        ("u32", 8, 2),
        ("u32", 128, 32),
        ("u32", 0, 1),
        ("v4.u32", 16, 4),
        ("v4.u32", 32, 8),
        ("u16", 2, 1),
    ],
)
def test_bank_conflicts(type: str, stride: int, passes: int) -> None:
    value = "{%r2, %r2, %r2, %r2}" if "v4" in type else "%h2" if type == "u16" else "%r2"
    kernel = assemble(f"mov.u32 %r3, tile; mad.lo.s32 %r3, %r0, {stride}, %r3; st.shared.{type} [%r3], {value};", 0)
    if stride == 0:  # writes of several threads to one word are one pass
        assert "st.shared" in kernel.instructions[-2].text
    counters = launch(kernel, (1,), (32,), [], GlobalMemory()).counters
    assert counters["shared_wavefronts"] == passes
    assert counters["shared_wavefronts_ideal"] == (4 if "v4" in type else 1)


@pytest.mark.parametrize(("stride", "passes"), [(16, 1), (128, 8), (144, 1)])
def test_wavefronts_of_ldmatrix(stride: int, passes: int) -> None:
    kernel = assemble(
        f"""
        mov.u32 %r3, tile;  mad.lo.s32 %r4, %r0, 128, %r3;
        st.shared.v4.u32 [%r4], {{%r0, %r0, %r0, %r0}};  st.shared.v4.u32 [%r4+16], {{%r0, %r0, %r0, %r0}};
        st.shared.v4.u32 [%r4+32], {{%r0, %r0, %r0, %r0}};  st.shared.v4.u32 [%r4+48], {{%r0, %r0, %r0, %r0}};
        st.shared.v4.u32 [%r4+64], {{%r0, %r0, %r0, %r0}};  st.shared.v4.u32 [%r4+80], {{%r0, %r0, %r0, %r0}};
        st.shared.v4.u32 [%r4+96], {{%r0, %r0, %r0, %r0}};  st.shared.v4.u32 [%r4+112], {{%r0, %r0, %r0, %r0}};
        and.b32 %r5, %r0, 7;  mad.lo.s32 %r5, %r5, {stride}, %r3;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r5];
        """,
        0,
    )
    counters = launch(kernel, (1,), (32,), [], GlobalMemory()).counters
    assert counters["matrix_wavefronts"] == 4 * passes
    assert counters["matrix_wavefronts_ideal"] == 4


def test_other_counters() -> None:
    _, copied = COPY.run()
    assert copied.counters["cp_async_bytes"] == 64 * (16 + 8)
    assert copied.counters["barriers"] == 2
    assert copied.executed("cp.async.cg") == 2
    _, counted = COUNT.run()
    assert counted.counters["global_atomics"] == 2 * 4 * 64
    _, multiplied = WGMMA.run()
    assert multiplied.counters["wgmma"] == 4


# ---- refused kernels and launches


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("frobnicate.b32 %r2, %r0;", "unknown instruction frobnicate.b32"),
        ("add.frob.s32 %r2, %r0, %r0;", "unknown instruction add.frob.s32: .frob of add"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r2}, {%r3}, {%r4}, {%r5};", "unknown instruction mma"),
        ("add.s32 %q2, %r0, %r0;", "cannot write to .*q2"),
        ("mov.u32 %r2, %clock;", "unknown special register %clock"),
        ("bra NOWHERE;", "no such label"),
        (".reg .b32 %h1;", "declared twice, with 16 and 32 bits"),
        ("A: mov.u32 %r2, 0; A: mov.u32 %r2, 1;", "A is declared twice"),
        ("ld.param.u32 %r2, [z];", "not an address: .*z"),
        ("ld.param.u64 %d2, [a+8];", "out of bounds of the parameters: byte 8 of 8"),
    ],
)
def test_unknown_instructions_are_named(body: str, says: str) -> None:
    with pytest.raises(PtxError, match=says):
        run(body)


def test_invalid_launches_are_refused() -> None:
    kernel, memory = assemble("", 1), GlobalMemory()
    for block in (0, 33, 2048):
        with pytest.raises(PtxError, match="block must be a multiple of 32 threads"):
            launch(kernel, (1,), (block,), [0], memory)
    with pytest.raises(PtxError, match="takes 1 arguments, got 2"):
        launch(kernel, (1,), (32,), [0, 0], memory)
    with pytest.raises(PtxError, match="a takes 8 bytes, got 4"):
        launch(kernel, (1,), (32,), [np.float32(0)], memory)
    with pytest.raises(PtxError, match=r"no .entry with 'other' in its name; the text has \['k'\]"):
        parse(".entry k() { ret; }", "other")


def test_parameters_are_laid_out_as_c_does() -> None:
    kernel = parse("""
        .entry k(.param .u8 a, .param .u64 b, .param .align 8 .b8 c[12], .param .f32 d,
                 .param .u64 .ptr .global .align 1 e) { .reg .b32 %r<9>; .reg .b64 %d<9>;
          ld.param.u8 %r0, [a]; ld.param.u64 %d1, [b]; ld.param.v2.u32 {%r2, %r3}, [c]; ld.param.s16 %r4, [c+8];
          ld.param.f32 %r5, [d]; ld.param.u64 %d0, [e];
          st.global.v4.u32 [%d0], {%r0, %r2, %r3, %r4}; st.global.u32 [%d0+16], %r5; st.global.u64 [%d0+24], %d1;
          ret; }""")
    assert [(p.offset, p.size) for p in kernel.parameters.values()] == [(0, 1), (8, 8), (16, 12), (28, 4), (32, 8)]
    memory = GlobalMemory()
    address = memory.empty("output", 8, np.uint32)
    packed = np.array([5, 6], np.uint32).tobytes() + np.array([-2, 0], np.int16).tobytes()
    launch(kernel, (1,), (32,), [3, 2**40 + 1, packed, 1.5, address], memory)
    found = memory.get("output")
    np.testing.assert_array_equal(found[[0, 1, 2, 3, 4, 6, 7]], [3, 5, 6, 2**32 - 2, 0x3FC00000, 1, 256])
