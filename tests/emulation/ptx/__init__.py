"""PTX simulator in NumPy: runs every thread of every CTA of kernels compiled by nvcc or Triton.

    memory = GlobalMemory()
    x = memory.put("x", array)
    y = memory.empty("y", 128, np.float32)
    run = launch(parse(ptx), grid=(4,), block=(128,), arguments=[x, y, 128], memory=memory)
    memory.get("y")

A fault of the kernel raises PtxError with the instruction, source line and thread. Faults are

- accesses out of bounds, misaligned, to uninitialised memory, or to the destination of a copy in flight,
- races between warps,
- barriers and warp instructions that only some of their threads reach.

Not modelled: weak memory order, races within a warp, rounding inside a tensor-core instruction, clusters, mbarrier,
TMA, tcgen05.
"""

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import Kernel, PtxError, parse

__all__ = ["Coverage", "GlobalMemory", "Kernel", "PtxError", "Run", "launch", "parse"]
