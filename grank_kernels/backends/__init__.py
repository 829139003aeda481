"""The backends, in order of preference: a module each, with one function an op and `<op>_unsupported(...) -> reason`.

A backend imports no op; it receives validated tensors.
"""

from types import ModuleType

from grank_kernels.backends import cpu, cuda, pytorch, reference, triton

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "torch": pytorch,
    "reference": reference,
}
