"""Collective steps of a torch.distributed group that fail on all ranks or on none.

An exception on one rank would leave the others waiting. So it is caught, and the rank sends a flag in place of its
message; then every rank raises: the rank that failed its own exception, the others a `ShardError`.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
FACTS = 6  # numbers that a rank may send to an agreement


class ShardError(RuntimeError):
    """Another rank refused its arguments, failed, has ended, does not answer, or makes another call.

    The message names the step. If a rank refused, failed or makes another call, the message names it, all ranks have
    raised, and the group can be used further. If a rank is lost, the message cannot say which, and the group cannot be
    used further: `torchrun --max-restarts` ends and restarts its processes.
    """


def leave() -> None:
    """Destroys all process groups of this process, with their threads, for the end of the process.

    A gloo thread that frees the last collective's tensors after the interpreter has ended aborts the process. Groups
    end such threads when they are freed, but PyTorch's meshes hold groups, and DTensor's caches hold meshes.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for each in gc.get_objects():
        if type(each) is DeviceMesh:
            vars(each).get("_pg_registry", {}).clear()  # missing in older versions of PyTorch
    gc.collect()  # groups that are part of reference cycles


def attempt(run: Callable[..., T], *arguments: object) -> T | Exception:
    """The result of a function, or its exception."""
    try:
        return run(*arguments)
    except Exception as error:  # raised once all ranks know
        return error


class Ranks:
    """A process group, or the group of a one-dimensional mesh."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None):
        """`group` is as for `ShardedItemTable`."""
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group: call torch.distributed.init_process_group first, under torchrun"
            )
        group = group.get_group() if isinstance(group, DeviceMesh) else group
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must contain this process, got a group without it")
        with_gpus = "nccl" in dist.get_backend_config(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if with_gpus else torch.device("cpu")
        self.bytes_received = 0  # from other ranks

    def start_gather(self, step: str, message: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts an all-gather of messages of one shape; the function returned waits for them: (G, *shape)."""
        message = message.to(self.device)
        gathered = message.new_empty((self.size, *message.shape))
        with self._step(step):
            work = dist.all_gather(list(gathered), message, group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            with self._step(step):
                work.wait()
            return gathered

        self.bytes_received += message.nbytes * (self.size - 1)
        return wait

    def gather(self, step: str, message: torch.Tensor) -> torch.Tensor:
        """The messages of all ranks, which have one shape: (G, *shape)."""
        return self.start_gather(step, message)()

    def deliver(self, step: str, messages: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sends each rank its message, and returns the messages received: (G, length).

        All messages to a rank have the length of the one that it sends to itself.
        """
        received = messages[self.rank].new_empty((self.size, len(messages[self.rank])), device=self.device)
        sent = torch.cat(list(messages)).to(self.device)
        with self._step(step):
            lengths = [received.shape[1]] * self.size
            dist.all_to_all_single(received.view(-1), sent, lengths, list(map(len, messages)), group=self.group)
        self.bytes_received += received[0].nbytes * (self.size - 1)
        return received

    def start_agreeing(self, step: str, facts: Sequence[int] | Exception) -> Callable[[], list[list[int]]]:
        """Starts an exchange of up to `FACTS` numbers of every rank, or of the error that a rank has instead.

        Returns:
            A function that waits and returns the numbers of all ranks, (G, FACTS), or raises: the error of this rank,
            or a `ShardError` if another rank has one or is at another step.
        """
        error = facts if isinstance(facts, Exception) else None
        numbers = [] if isinstance(facts, Exception) else list(facts)
        call = xxhash.xxh32_intdigest(step.encode())
        first = 2 * call + int(error is not None)
        wait = self.start_gather(step, torch.tensor([first, *numbers] + [0] * (FACTS - len(numbers))))

        @functools.cache
        def agreed() -> list[list[int]]:
            everybody = wait().tolist()
            firsts = [numbers[0] for numbers in everybody]
            if any(first // 2 != call for first in firsts):
                steps = self._texts(step, step)
                raise ShardError(f"ranks must make the same calls in the same order, got by rank {steps}")
            self.check(step, [first % 2 for first in firsts], error)
            return [numbers[1:] for numbers in everybody]

        return agreed

    def agree(self, step: str, facts: Sequence[int] | Exception) -> list[list[int]]:
        """The numbers of all ranks, (G, FACTS); as `start_agreeing`."""
        return self.start_agreeing(step, facts)()

    def together(self, step: str, run: Callable[[], T]) -> T:
        """The result of a function once it has returned on all ranks; if it raises on one, all raise."""
        result = attempt(run)
        self.agree(step, result if isinstance(result, Exception) else ())
        return cast(T, result)  # an exception was raised by `agree`

    def check(self, step: str, failed: Sequence[int], error: Exception | None) -> None:
        """Raises on all ranks if a rank has failed; `failed` is the same on all ranks."""
        if not any(failed):
            return
        texts = self._texts(step, f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        other = next(rank for rank, has in enumerate(failed) if has)
        raise ShardError(f"rank {self.rank} of {self.size}, {step}: rank {other} raised {texts[other]}")

    def _texts(self, step: str, text: str) -> list[str]:
        """The texts of all ranks."""
        texts: list[str] = [""] * self.size
        with self._step(step):
            dist.all_gather_object(texts, text, group=self.group)
        return texts

    @contextmanager
    def _step(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            after = time.monotonic() - start
            raise ShardError(
                f"rank {self.rank} of {self.size}, {step}: no answer after {after:.1f} s; a rank has ended, hangs or "
                f"makes another call ({error})"
            ) from error
