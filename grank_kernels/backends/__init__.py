"""One module a backend; in each, one function an op, and `<op>_unsupported(...)` that says why it cannot run.

`BACKENDS` is the whole registry, in order of preference. A backend imports no op: it gets checked tensors.
"""

from types import ModuleType

from grank_kernels.backends import cpu, reference, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "reference": reference}
