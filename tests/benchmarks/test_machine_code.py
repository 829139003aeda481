"""The disassembly readers, on stored listings: a misread listing is an error, not a kernel without faults."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpus import ARCHITECTURES
from benchmarks.machine_code import Instruction, read_amdgcn, read_sass

# A loop as ptxas places it: the rare branch is at a label further down, with an exit in between.
SASS = """
//--------------------- .text.scan                --------------------------
scan:
.text.scan:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R20, [R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_140:
        /*0030*/                   DEPBAR.LE SB0, 0x1 ;
        /*0040*/                   LDSM.16.M88.4 R64, [R10+0x18000] ;
        /*0050*/                   HMMA.16816.F32 R12, R64.reuse, R128, RZ ;
        /*0060*/                   HMMA.16816.F32 R12, R64, R130, R12 ;
        /*0070*/               @P2 LDGSTS.E.BYPASS.128 [R33+0x400], desc[UR48][R30.64], P3 ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/              @!P5 BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R4 ;
        /*00b0*/                   STG.E [R2.64], R4 ;
        /*00c0*/                   STL.64 [R1], R4 ;
        /*00d0*/               @P6 BRA `(.L_x_2) ;
.L_x_1:
        /*00e0*/              @!P0 CALL.REL.NOINC `(.L_x_0) ;
        /*00f0*/                   BRA `(.L_x_140) ;
.L_x_0:
        /*0100*/                   EXIT ;
.L_x_131:
        /*0110*/                   BRA `(.L_x_131);
        /*0120*/                   NOP;
.L_x_132:
"""

# AMD: the emit block is before the loop's head, and execz skips a masked load.
AMDGCN = """
\t.text
\t.type\tscan,@function
scan:                                   ; @scan
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_3
.LBB0_1:                                ;   in Loop: Header=BB0_3 Depth=1
\tglobal_atomic_add v0, v[2:3], v4, off sc0
\tglobal_store_dword v[2:3], v0, off
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=1
\ts_cbranch_scc0 .LBB0_5
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 10 21                         ; scan.py:10:21
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_4
; %bb.1:                                ;   in Loop: Header=BB0_3 Depth=1
\tglobal_load_dwordx4 v[98:101], v[2:3], off
.LBB0_4:                                ;   in Loop: Header=BB0_3 Depth=1
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], 0
\tds_read_b128 v[0:3], v4
\ts_cbranch_vccnz .LBB0_1
\ts_branch .LBB0_2
.LBB0_5:
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\t.amdhsa_kernel scan
"""


def test_sass_loop() -> None:
    function = read_sass(SASS)["scan"]
    assert len(function.instructions) == 19
    (loop,) = function.loops()
    assert loop.counts == {"mma": 2, "shared": 1, "async copy": 1, "other": 5}
    assert len(loop.body) == len(loop.path) + 4  # the rare branch
    assert function.count("spill") == 1
    assert [i.bytes for i in function.instructions if i.kind in ("global load", "async copy")] == [16, 16]
    assert next(i for i in function.instructions if i.kind == "spill").bytes == 8
    assert loop.path[0] == Instruction("DEPBAR.LE", "SB0, 0x1")


def test_sass_loop_in_a_loop() -> None:
    """The innermost loop with matrix instructions is first; loops without any are left out."""
    inner = "        /*0050*/                   HMMA.16816.F32 R12, R64.reuse, R128, RZ ;\n"
    nested = SASS.replace(inner, f".L_x_7:\n{inner}        /*0058*/               @P1 BRA `(.L_x_7) ;\n")
    first, second = read_sass(nested)["scan"].loops()
    assert [i.opcode for i in first.path] == ["HMMA.16816.F32", "BRA"]
    assert first.blocks < second.blocks
    assert second.counts["mma"] == 2
    assert read_sass(re.sub(r"HMMA\S+", "FFMA", SASS))["scan"].loops() == []


def test_sass_prefers_the_path_with_matrix_instructions() -> None:
    """On sm_100 one warp issues for all and the others branch around it; the counted path is the issuing warp's."""
    around = SASS.replace(
        "        /*0050*/", "        /*0048*/                   BRA.U UP2, `(.L_x_9) ;\n        /*0050*/"
    )
    around = around.replace("        /*0070*/", ".L_x_9:\n        /*0070*/")
    (loop,) = read_sass(around)["scan"].loops()
    assert loop.counts["mma"] == 2


@pytest.mark.parametrize("text", [SASS.replace("/*", "//"), "\n.text.scan:\n"], ids=["no code", "no lines"])
def test_sass_without_instructions_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="scan: no instructions found"):
        read_sass(text)
    assert read_sass("") == {}


def test_sass_copies_behind_a_branch() -> None:
    """The shortest path skips the copies; `with_copies` finds the path with them."""
    copy = "        /*0070*/               @P2 LDGSTS"
    behind = SASS.replace(copy, "        /*0068*/               @P3 BRA `(.L_x_8) ;\n" + copy)
    behind = behind.replace("        /*0090*/", ".L_x_8:\n        /*0090*/")
    (loop,) = read_sass(behind)["scan"].loops()
    assert (loop.counts["mma"], loop.counts["async copy"]) == (2, 0)
    found = loop.with_copies(1)
    assert (found.counts["mma"], found.counts["async copy"]) == (2, 1)
    assert len(found.path) == len(loop.path) + 2
    with pytest.raises(ValueError, match="copies must be at most 1, the most that a path of the loop starts, got 2"):
        loop.with_copies(2)


def test_sass_indirect_jump_is_refused() -> None:
    with pytest.raises(ValueError, match="BRX is an indirect jump"):
        read_sass(SASS.replace("LDGDEPBAR ", "BRX R4 -0x120 "))


def test_amdgcn_loop() -> None:
    function = read_amdgcn(AMDGCN)
    (loop,) = function.loops()
    assert loop.counts == {"mfma": 1, "global load": 1, "shared": 1, "other": 5}
    assert len(loop.body) == len(loop.path) + 2
    assert [i.bytes for i in loop.path if i.kind == "global load"] == [16]
    assert function.count("atomic") == 1
    with pytest.raises(ValueError, match="no function"):
        read_amdgcn("")


@pytest.mark.parametrize(
    ("opcode", "kind", "nbytes"),
    [
        ("HGMMA.64x128x16.F32", "wgmma", None),
        ("IGMMA.64x64x32.S8.S8", "wgmma", None),
        ("IMMA.16832.S8.S8", "mma", None),
        ("UTCHMMA", "tcgen05", None),
        ("UTCIMMA", "tcgen05", None),
        ("UTCBAR", "other", None),
        ("UTCATOMSWS.FIND_AND_SET.ALIGN", "other", None),
        ("LDG.E.64.CONSTANT", "global load", 8),
        ("LDG.E.U8", "global load", 1),
        ("LDG.E.ENL2.256", "global load", 32),
        ("LDG.E", "global load", 4),
        ("LDGDEPBAR", "other", None),
        ("LDGSTS.E.BYPASS.LTC128B.128", "async copy", 16),
        ("UTMALDG.2D", "async copy", None),
        ("LDSM.16.M88.4", "shared", None),
        ("LDL.LU.64", "spill", 8),
        ("REDUX.SUM.S32", "other", None),
        ("RED.E.ADD.STRONG.GPU", "atomic", None),
        ("FFMA.FTZ", "fma", None),
        ("v_mfma_i32_16x16x32_i8", "mfma", None),
        ("buffer_load_dwordx4", "global load", 16),
        ("buffer_load_ubyte", "global load", 1),
        ("global_load_lds_dword", "async copy", 4),
        ("global_load_dwordx2", "global load", 8),
        ("ds_read_b128", "shared", 16),
        ("scratch_store_dword", "spill", 4),
        ("v_fmac_f32_e32", "fma", None),
    ],
)
def test_kinds_and_widths(opcode: str, kind: str, nbytes: int | None) -> None:
    instruction = Instruction(opcode)
    assert instruction.kind == kind
    assert nbytes is None or instruction.bytes == nbytes


def test_slots_are_taken_by_vector_instructions_alone_on_amd() -> None:
    taken = [
        Instruction(opcode).takes_slot for opcode in ("v_max_f32_e32", "s_add_u32", "ds_read_b128", "UIADD3", "LDS")
    ]
    assert taken == [True, False, False, True, True]


def test_buffer_load_to_lds_is_a_copy() -> None:
    assert Instruction("buffer_load_dwordx4", "v0, s[0:3], 0 offen lds").kind == "async copy"
    assert Instruction("buffer_load_dwordx4", "v[0:3], v4, s[0:3], 0 offen").kind == "global load"


OCCUPANCY = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, registers, threads, shared, shared_sm;
  while (std::scanf("%d %d %d %d %d", &major, &registers, &threads, &shared, &shared_sm) == 5) {
    cudaOccDeviceProp p;
    p.computeMajor = major, p.computeMinor = 0, p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 2048;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.numSms = 100;
    p.sharedMemPerMultiprocessor = shared_sm, p.sharedMemPerBlock = 48 * 1024;
    p.sharedMemPerBlockOptin = shared_sm - 1024, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.sharedSizeBytes = 0, a.numBlockBarriers = 1;
    a.partitionedGCConfig = PARTITIONED_GC_OFF, a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState s;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &a, &s, threads, shared);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_occupancy_is_nvidias(tmp_path: Path) -> None:
    """Equal to cuda_occupancy.h, NVIDIA's calculator in plain C++."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("cuda_occupancy.h is missing: the CUDA toolkit is not installed")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(OCCUPANCY)
    subprocess.run([nvcc, "-w", source, "-o", program], check=True)
    cases = [
        (arch, registers, threads, shared)
        for arch in ("sm_80", "sm_90", "sm_100")
        for registers in (16, 32, 40, 64, 65, 96, 128, 129, 168, 200, 255)
        for threads in (32, 96, 128, 256, 512)
        for shared in (0, 1000, 16 * 1024, 40960, 80000, 113664, 160 * 1024)
    ]
    given = "\n".join(
        f"{int(arch[3:]) // 10} {registers} {threads} {shared} {ARCHITECTURES[arch].shared}"
        for arch, registers, threads, shared in cases
    )
    done = subprocess.run([program], input=given, capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    found = [ARCHITECTURES[arch].blocks_per_sm(*rest) for arch, *rest in cases]
    assert len(found) == len(expected)
    wrong = [(case, f, e) for case, f, e in zip(cases, found, expected, strict=True) if f != e]
    assert not wrong, f"{len(wrong)} of {len(cases)}, first: {wrong[0]}"
    assert {0, 1, 2, 4, 32} <= set(expected)
