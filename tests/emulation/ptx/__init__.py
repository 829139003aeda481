"""Simulates PTX from nvcc or Triton on the host: every thread of every CTA, in NumPy.

    memory = GlobalMemory()
    x = memory.put("x", array)
    y = memory.empty("y", 128, np.float32)
    run = launch(parse(ptx), grid=(4,), block=(128,), arguments=[x, y, 128], memory=memory)
    memory.get("y")

A fault of the kernel raises PtxError with the instruction, source line and thread: an access out of bounds, misaligned,
uninitialised or of a copy in flight; a race; a barrier or warp instruction that only some of the threads reach. Not
modelled: weak memory order, races within a warp, the rounding inside a tensor-core instruction, clusters, mbarrier, TMA
and tcgen05.
"""

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import Kernel, PtxError, parse

__all__ = ["Coverage", "GlobalMemory", "Kernel", "PtxError", "Run", "launch", "parse"]
