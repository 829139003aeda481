"""torch ops inside `torch.func` transforms (grad, jacrev, jvp, vmap, ...) and forward-mode differentiation.

`torch.library.register_autograd` covers neither: reverse mode raises under `torch.func`, and forward mode passes
tangents of zero. An `autograd.Function` with `setup_context`, `jvp` and `vmap` covers both.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch.autograd import forward_ad

_functorch_level = torch._C._functorch.maybe_current_level


def in_transform() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active, other than in torch.compile."""
    return not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or _functorch_level() is not None)


def dispatch(op: Any, in_transforms: "type[TransformableOp]", *operands: Any) -> Any:
    """The op's result by torch's dispatcher, or inside a transform by the op's `autograd.Function`."""
    return in_transforms.apply(*operands) if in_transform() else op(*operands)  # type: ignore[no-untyped-call]


def refused(message: str) -> Callable[..., NoReturn]:
    """A derivative that an op does not have: calling it raises NotImplementedError."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(message)

    return refuse


class TransformableOp(torch.autograd.Function):
    """A torch op with derivatives for transforms: subclasses define `op`, `setup_context`, `backward` and `jvp`."""

    op: ClassVar[Any]

    @classmethod
    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        op = cls.op

        def forward(*operands: Any) -> Any:
            return op(*operands)

        def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> Any:
            return each_slice(cls, info.batch_size, in_dims, operands)

        cls.forward, cls.vmap = staticmethod(forward), staticmethod(vmap)  # type: ignore[method-assign]


def save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """`setup_context` of an op without a derivative."""


def each_slice(function: Any, size: int, in_dims: tuple[int | None, ...], operands: tuple[Any, ...]) -> Any:
    """One call a slice of the mapped dimension, results stacked: for every combination of mapped operands."""
    results = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(operands, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
