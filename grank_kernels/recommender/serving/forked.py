"""Torch's threads in a forked process: the threads of its OpenMP pool exist in the parent alone.

A child of a process that has used several threads waits forever in its first parallel torch operation. Whether the pool
was used cannot be asked, only how many threads the parent allowed.
"""

import os
import warnings

import torch

_threads_of_parent = 1


def _note_threads() -> None:
    global _threads_of_parent
    _threads_of_parent = max(_threads_of_parent, torch.get_num_threads())


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_note_threads)


def limit_threads() -> None:
    """In a child forked by a process of several torch threads: one thread from now on, with a warning."""
    if _threads_of_parent > 1 and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            f"this process was forked by one with {_threads_of_parent} torch threads, which a child does not have: it "
            "goes on with torch.set_num_threads(1); load the retriever after the fork, or start processes by spawn",
            RuntimeWarning,
            stacklevel=3,
        )
