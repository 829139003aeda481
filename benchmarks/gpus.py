"""Limits and peak rates of the GPUs that kernels are compiled for, from datasheets and programming guides.

Whatever is computed from these figures is derived, not measured.
"""

from typing import NamedTuple


class Architecture(NamedTuple):
    """A compiler target: limits of one multiprocessor (AMD: compute unit), and its rates per clock."""

    registers: int  # of 32 bits
    register_unit: int  # registers are allocated to a warp in multiples of this
    warp_split: int  # schedulers, each with an equal share of warps and registers
    shared: int  # bytes
    shared_unit: int
    shared_reserved: int  # bytes per block taken by the system
    warps: int
    blocks: int
    warp: int  # lanes
    lanes: int  # lanes that execute an instruction per clock
    fma: dict[str, int]  # multiply-adds per clock by type of the factors
    special: int  # exponentials, reciprocals, ... per clock

    def blocks_per_sm(self, registers: int, threads: int, shared: int) -> int:
        """Resident blocks per multiprocessor; 0 if one does not fit."""
        warps = -(-threads // self.warp)
        registers_a_warp = -(-max(registers, 1) * self.warp // self.register_unit) * self.register_unit
        warps_by_registers = self.registers // self.warp_split // registers_a_warp * self.warp_split
        shared_a_block = -(-(shared + self.shared_reserved) // self.shared_unit) * self.shared_unit
        by_shared = self.shared // shared_a_block if shared_a_block else self.blocks
        return min(self.warps // warps, self.blocks, warps_by_registers // warps, by_shared)

    def clocks_per_score(self, dtype: str, d: int) -> float:
        """Clocks per score at the peak rate of the matrix unit (of the FMA units for float32)."""
        return d / self.fma[dtype]


def _nvidia(shared: int, half: int, single: int) -> Architecture:
    """`half`: FMA in one clock on 16-bit factors. The four schedulers issue one warp instruction a clock each."""
    fma = {"float16": half, "bfloat16": half, "int8": 2 * half, "float32": single}
    return Architecture(65536, 256, 4, shared * 1024, 128, 1024, 64, 32, 32, 4 * 32, fma, 16)


ARCHITECTURES = {
    "sm_80": _nvidia(shared=164, half=1024, single=64),
    "sm_90": _nvidia(shared=228, half=2048, single=128),
    "sm_100": _nvidia(shared=228, half=4096, single=128),
    # Four vector units of 16 lanes, each with 512 registers of 64 lanes for at most 8 waves.
    "gfx942": Architecture(
        4 * 512 * 64,
        8 * 64,
        4,
        64 * 1024,
        512,
        0,
        32,
        32,
        64,
        64,
        {"float16": 1024, "bfloat16": 1024, "int8": 2048, "float32": 128},
        16,
    ),
}


class Card(NamedTuple):
    """A product: number of multiprocessors, and rates."""

    architecture: str
    sms: int
    half_flops: float  # dense peak on 16-bit factors, a multiplication and an addition counted as two
    read: float  # memory bandwidth, bytes per second

    def seconds(self, nbytes: float, fma: float, dtype: str) -> float:
        """The roofline: the longer of reading and multiplying."""
        rates = ARCHITECTURES[self.architecture].fma
        return max(nbytes / self.read, 2 * fma / (self.half_flops * rates[dtype] / rates["float16"]))

    @property
    def clock(self) -> float:
        """Clock rate at the peak, in Hz."""
        return self.half_flops / (2 * self.sms * ARCHITECTURES[self.architecture].fma["float16"])


CARDS = {
    "A100": Card("sm_80", 108, 312e12, 2.039e12),  # SXM, 80 GB
    "H100": Card("sm_90", 132, 989e12, 3.35e12),  # SXM
    "H200": Card("sm_90", 132, 989e12, 4.8e12),
    "B200": Card("sm_100", 148, 2250e12, 8.0e12),
    "MI300X": Card("gfx942", 304, 1307e12, 5.3e12),
}
