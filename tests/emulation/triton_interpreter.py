"""A correct, strict and faster version of Triton's interpreter, for tests.

`strict()` replaces parts of the interpreter inside a `with` block:

- correct: bfloat16 products multiply the numbers (Triton 3.7 multiplies their bit patterns); products add in a single
  order, k ascending, for every shape, so that bits can be compared; a maximum ignores NaN, as the hardware does.
- strict: the undefined values of a masked load without `other` are garbage, not zeros. A `KernelFaultError` with the
  tensor and the line reports an access outside every tensor passed to the kernel, a race with another program, and two
  lanes of a store that write the same element. Atomic operations may race with each other.
- faster: reductions and scans apply the combining function to whole slices, not to single elements; the language is
  patched once per launch, not once per call; additions are not checked for overflow; the attributes of a block type are
  computed once.

Programs still run one after another: faults that need interleaved programs or threads only show in compiled code.
"""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class KernelFaultError(AssertionError):
    """A kernel made an access that is an error or undefined on a GPU."""


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Runs kernels in the interpreter as described above."""
    builder = interpreter.interpreter_builder
    changes: list[tuple[Any, str, Any]] = [
        (InterpreterBuilder, "create_dot", _dot),
        (InterpreterBuilder, "create_masked_load", _masked_load),
        (InterpreterBuilder, "create_masked_store", _masked_store),
        (InterpreterBuilder, "create_atomic_rmw", _atomic_rmw),
        (InterpreterBuilder, "create_atomic_cas", _atomic_cas),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
        (interpreter.ReduceOps, "min_max", _min_max),
        (interpreter.ScanOps, "generic_scan", _scan),
        (interpreter.GridExecutor, "__call__", _launch),
        (interpreter.InterpretedFunction, "__call__", _call),
        (builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
        (interpreter, "_get_np_dtype", _numpy_dtype),
        (tl.block_type, "__init__", _block_type),
        (tl.tensor, "__init__", _tensor),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    try:
        for where, name, new in changes:
            setattr(where, name, new)
        with np.errstate(all="ignore"):  # numbers overflow and become NaN as on a GPU
            yield
    finally:
        for where, name, old in before:
            setattr(where, name, old)


# ---- correct ----


def _numbers(x: TensorHandle) -> np.ndarray:
    if x.dtype == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
    x, y, total = _numbers(a), _numbers(b), d.data.copy()
    if total.dtype.kind == "i":
        return TensorHandle(total + (x.astype(np.float64) @ y).astype(total.dtype), d.dtype.scalar)  # exact below 2^53
    for k in range(x.shape[1]):
        total += x[:, k, None].astype(total.dtype) * y[None, k]
    return TensorHandle(total, d.dtype.scalar)


def _min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    data = (input[0] if isinstance(input, tuple) else input).handle.data
    axis = self.axis
    if idx_reduce_op is not None:
        raise NotImplementedError("argmin and argmax are not made strict")
    reduce = np.fmax.reduce if val_reduce_op is np.nanmax else np.fmin.reduce
    return self.to_tensor(reduce(data, axis=axis, keepdims=self.keep_dims), input.dtype)


# ---- faster ----


def _slices(ops: Any, input: Any, axis: int) -> list[tuple[Any, ...]]:
    moved = [np.moveaxis(x.handle.data, axis, 0) for x in input]
    return [
        tuple(ops.to_tensor(np.ascontiguousarray(m[i]), x.dtype) for m, x in zip(moved, input, strict=True))
        for i in range(moved[0].shape[0])
    ]


def _combine(ops: Any, one: Any, other: Any) -> tuple[Any, ...]:
    combined = ops.combine_fn.fn(*one, *other)
    return combined if isinstance(combined, tuple) else (combined,)


def _reduce(self: Any, input: Any) -> list[Any]:
    whole = self.axis is None
    shape = input[0].handle.data.shape
    input, axis = self.unravel(input, self.axis)
    first, *rest = _slices(self, input, axis)
    for x in rest:
        first = _combine(self, first, x)
    results = []
    for total, x in zip(first, input, strict=True):
        data = np.asarray(total.handle.data).reshape(
            input[0].handle.data.shape[:axis] + input[0].handle.data.shape[axis + 1 :]
        )
        if self.keep_dims:
            data = data.reshape((1,) * len(shape)) if whole else np.expand_dims(data, axis)
        elif whole:
            data = data.item()
        results.append(self.to_tensor(data, x.dtype))
    return results


def _scan(self: Any, input: Any) -> list[Any]:
    first, *rest = _slices(self, input, self.axis)  # a reversed scan comes reversed already
    totals = [first]
    for x in rest:
        totals.append(_combine(self, totals[-1], x))
    return [
        self.to_tensor(np.stack([np.asarray(t[i].handle.data) for t in totals], self.axis), x.dtype)
        for i, x in enumerate(input)
    ]


_original_numpy_dtype = interpreter._get_np_dtype
_original_block_type = tl.block_type.__init__
_original_tensor = tl.tensor.__init__
_numpy_dtypes: dict[str, np.dtype] = {}  # by name of the element type
_block_types: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}  # attributes by element type and shape


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    name = dtype.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _original_numpy_dtype(dtype.scalar)
    return _numpy_dtypes[name]


def _block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    key = element_ty.name, tuple(int(n) for n in shape)
    if key not in _block_types:
        _original_block_type(self, element_ty, shape)
        _block_types[key] = dict(self.__dict__)
    self.__dict__.update(_block_types[key])


def _tensor(self: Any, handle: Any, dtype: tl.dtype) -> None:
    """Shape and size of a tensor are computed once for all tensors of a block type."""
    if not isinstance(dtype, tl.block_type):
        _original_tensor(self, handle, dtype)
        return
    attributes = _block_types[dtype.element_ty.name, tuple(dtype.shape)]
    if "tensor" not in attributes:
        _original_tensor(self, handle, dtype)
        attributes["tensor"] = {"numel": self.numel, "shape": self.shape}
    self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
    self.__dict__.update(attributes["tensor"])


_modules: set[int] = set()  # ids of the modules patched in this launch
_scopes: list[Any] = []  # undo the patches


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _modules:
        _modules.add(module)
        _scopes.append(interpreter._patch_lang(self.fn))
    return self.rewrite()(*args, **kwargs)


# ---- strict ----


class _Memory:
    """The writer and the reader of each byte of a tensor: program number + 1; 0 for none, -1 for several readers."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name = name
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        elements = 1 + last if tensor.numel() else 0
        self.begin = tensor.data_ptr()
        self.end = self.begin + elements * tensor.element_size()
        small = self.end - self.begin <= _TRACKED
        self.writer, self.reader = (np.zeros(self.end - self.begin if small else 0, np.int32) for _ in range(2))
        self.atomic = np.zeros(len(self.writer), bool)

    def access(self, kind: str, places: np.ndarray, size: int, program: int) -> None:
        """Records an access of `size` bytes at each of `places`; raises if it races with another program."""
        if len(self.writer) == 0:
            return  # too large to track: only its bounds are checked
        cells = (places[:, None] + np.arange(size)).ravel()
        foreign_write = (self.writer[cells] != 0) & (self.writer[cells] != program)
        foreign_read = (self.reader[cells] != 0) & (self.reader[cells] != program)
        if kind == "load":
            bad = foreign_write
        elif kind == "store":
            bad = foreign_write | foreign_read
        else:
            bad = (foreign_write & ~self.atomic[cells]) | foreign_read
        if bad.any():
            element = int(cells[bad][0]) // size
            raise KernelFaultError(
                f"race: {kind} of {self.name}[{element}], which another program accesses too, {_line()}"
            )
        if kind == "store" and len(np.unique(places)) != len(places):
            raise KernelFaultError(f"race: two lanes of one store write one element of {self.name}, {_line()}")
        if kind == "load":
            old = self.reader[cells]
            self.reader[cells] = np.where((old == 0) | (old == program), program, -1)
        else:
            self.writer[cells] = program
            self.atomic[cells] = kind == "atomic"


_TRACKED = 1 << 26
_memories: list[_Memory] | None = None


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        own = frame.filename == __file__ or "/site-packages/" in frame.filename
        if not own:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return "at an unknown line"


def _access(kind: str, pointers: TensorHandle, mask: Any) -> None:
    if _memories is None:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    places, chosen = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
    places = places[chosen.astype(bool)].astype(np.int64)
    x, y, z = interpreter.interpreter_builder.grid_idx
    nx, ny, _ = interpreter.interpreter_builder.grid_dim
    program = int(x + nx * (y + ny * z)) + 1
    outside = np.ones(len(places), bool)
    for memory in _memories:
        inside = outside & (places >= memory.begin) & (places + size <= memory.end)
        if inside.any():
            outside &= ~inside
            memory.access(kind, places[inside] - memory.begin, size, program)
    if outside.any():
        first = int(places[outside][0])
        nearest = min(_memories, key=lambda m: min(abs(first - m.begin), abs(first - m.end)))
        where = f"element {(first - nearest.begin) // size} of {(nearest.end - nearest.begin) // size}"
        raise KernelFaultError(f"out of bounds: {kind} near {nearest.name}, {where}, {_line()}")


_original_load = InterpreterBuilder.create_masked_load
_original_store = InterpreterBuilder.create_masked_store
_original_rmw = InterpreterBuilder.create_atomic_rmw
_original_cas = InterpreterBuilder.create_atomic_cas
_original_launch = interpreter.GridExecutor.__call__


def _masked_load(self: Any, pointers: TensorHandle, mask: TensorHandle, other: Any, *more: Any) -> TensorHandle:
    _access("load", pointers, mask)
    loaded = _original_load(self, pointers, mask, other, *more)
    off = ~np.broadcast_to(mask.data.astype(bool), loaded.data.shape)
    if other is None and off.any():
        data = loaded.data.copy()
        data.view(np.uint8).reshape(*data.shape, data.itemsize)[off] = 0x7F if data.dtype.kind in "iu" else 0xFF
        loaded = TensorHandle(data, loaded.dtype)
    return loaded


def _masked_store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *more: Any) -> Any:
    _access("store", pointers, mask)
    return _original_store(self, pointers, value, mask, *more)


def _atomic_rmw(self: Any, op: Any, pointers: TensorHandle, value: Any, mask: Any, *more: Any) -> Any:
    _access("atomic", pointers, mask)
    return _original_rmw(self, op, pointers, value, mask, *more)


def _atomic_cas(self: Any, pointers: TensorHandle, *more: Any) -> Any:
    _access("atomic", pointers, None)
    return _original_cas(self, pointers, *more)


def _leaves(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument by name; the fields of a named tuple as "argument.field"."""
    for name, value in arguments.items():
        if hasattr(value, "_asdict"):
            yield from _leaves({f"{name}.{field}": x for field, x in value._asdict().items()})
        else:
            yield name, value


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    global _memories
    named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
    _memories = [_Memory(name, x) for name, x in _leaves(named) if isinstance(x, torch.Tensor)]
    try:
        return _original_launch(self, *args, **kwargs)
    except interpreter.InterpreterError as error:
        raise error.__cause__ or error from None
    finally:
        _memories = None
        _modules.clear()
        while _scopes:
            _scopes.pop().restore()
