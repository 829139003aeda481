"""The processes of a torch.distributed group, one step of which fails on all of them or on none.

An exception on one rank would leave the others waiting for it. So it is caught, a mark of it takes the place of what
the rank was to send, and every rank raises: the one that failed its own exception, the others a `ShardError`.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
FACTS = 6


class ShardError(RuntimeError):
    """Another rank refused its arguments, failed, has ended or does not answer; the message says at which step.

    Where a rank refused or failed, the message names it too, all ranks have raised, and may go on. Where one is lost it
    cannot be told which, and the group is of no more use: processes under `torchrun --max-restarts` end, and are
    started anew.
    """


def leave() -> None:
    """Destroys the process groups that this process is in, if any, and ends their threads; no mesh can be used again.

    For the end of a process. A thread of gloo's that lets go of the last collective's tensors when the interpreter has
    ended aborts the process. These threads end with their group, but PyTorch's meshes keep their groups, and DTensor's
    caches keep the meshes.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for each in gc.get_objects():
        if type(each) is DeviceMesh:
            vars(each).get("_pg_registry", {}).clear()  # not there in older versions of PyTorch
    gc.collect()  # groups that are part of reference cycles


def attempt(run: Callable[..., T], *arguments: object) -> T | Exception:
    """What a function returns or raises."""
    try:
        return run(*arguments)
    except Exception as error:  # to be raised when all ranks know of it
        return error


class Ranks:
    """A process group, or the group of a one-dimensional mesh."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None):
        """Takes what `ShardedItemTable` does."""
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
            raise ValueError("group: this process is not in it")
        with_gpus = "nccl" in dist.get_backend_config(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if with_gpus else torch.device("cpu")
        self.bytes_received = 0  # from other ranks, since this was made

    def start_gather(self, step: str, message: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts an all-gather of messages of one shape. What it returns waits, and gives them: (G, *shape)."""
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
        """The messages of all ranks, of one shape: (G, *shape)."""
        return self.start_gather(step, message)()

    def deliver(self, step: str, messages: Sequence[torch.Tensor]) -> torch.Tensor:
        """To every rank its message, from every rank one of the shape that this rank sends itself: (G, length)."""
        received = messages[self.rank].new_empty((self.size, len(messages[self.rank])), device=self.device)
        sent = torch.cat(list(messages)).to(self.device)
        with self._step(step):
            lengths = [received.shape[1]] * self.size
            dist.all_to_all_single(received.view(-1), sent, lengths, list(map(len, messages)), group=self.group)
        self.bytes_received += received[0].nbytes * (self.size - 1)
        return received

    def start_agreeing(self, step: str, facts: Sequence[int] | Exception) -> Callable[[], list[list[int]]]:
        """Starts to tell all ranks up to `FACTS` numbers, or that there is an error instead.

        What it returns waits, and gives everybody's numbers, (G, FACTS), or raises.
        """
        error = facts if isinstance(facts, Exception) else None
        numbers = [] if isinstance(facts, Exception) else list(facts)
        message = [int(error is not None), *numbers]
        wait = self.start_gather(step, torch.tensor(message + [0] * (1 + FACTS - len(message))))

        @functools.cache
        def agreed() -> list[list[int]]:
            everybody = wait().tolist()
            self.check(step, [numbers[0] for numbers in everybody], error)
            return [numbers[1:] for numbers in everybody]

        return agreed

    def agree(self, step: str, facts: Sequence[int] | Exception) -> list[list[int]]:
        """Everybody's numbers, (G, FACTS), or an exception where there is one on any rank."""
        return self.start_agreeing(step, facts)()

    def together(self, step: str, run: Callable[[], T]) -> T:
        """What a function returns, when it has returned on all ranks; if it raises on one, all raise."""
        result = attempt(run)
        self.agree(step, result if isinstance(result, Exception) else ())
        return cast(T, result)  # or it would have been raised

    def check(self, step: str, failed: Sequence[int], error: Exception | None) -> None:
        """Raises on all ranks if one of them has failed; of that, all know."""
        if not any(failed):
            return
        texts: list[str] = [""] * self.size
        with self._step(step):
            dist.all_gather_object(texts, f"{type(error).__name__}: {error}", group=self.group)
        if error is not None:
            raise error
        other = next(rank for rank, has in enumerate(failed) if has)
        raise ShardError(f"rank {self.rank} of {self.size}, {step}: rank {other} raised {texts[other]}")

    @contextmanager
    def _step(self, step: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            after = time.monotonic() - start
            raise ShardError(
                f"rank {self.rank} of {self.size}, {step}: no answer after {after:.1f} s; a rank has ended, hangs or "
                f"makes other calls ({error})"
            ) from error
