"""The error of the functions with FAISS's names."""


class FaissError(RuntimeError, ValueError):
    """A call that FAISS refuses, too, or that an exact index cannot honour.

    A RuntimeError, as FAISS raises from C++, and a ValueError, as the rest of this package raises.
    """
