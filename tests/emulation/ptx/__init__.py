"""Executes PTX on the host: what nvcc or Triton emitted, every thread of every CTA, in numpy.

    memory = GlobalMemory()
    x = memory.put("x", array)
    y = memory.empty("y", 128, np.float32)
    run = launch(parse(ptx), grid=(4,), block=(128,), arguments=[x, y, 128], memory=memory)
    memory.get("y")

An error of the kernel raises PtxError and names instruction, source line and thread: out of bounds, misaligned,
uninitialised or in flight, a race, a barrier or a warp instruction that part of the threads came to. Not modelled:
weak memory order, races within a warp, the rounding of the tensor cores inside one instruction, clusters, mbarrier, TMA
and tcgen05.
"""

from .launch import Coverage, Run, launch
from .memory import GlobalMemory
from .parser import Kernel, PtxError, parse

__all__ = ["Coverage", "GlobalMemory", "Kernel", "PtxError", "Run", "launch", "parse"]
