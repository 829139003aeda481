"""The C++ SIMD kernels (csrc/cpu): tensors to addresses, outputs allocated here."""

import warnings

import torch

try:
    from grank_kernels import _cpu
except ImportError as error:  # the package works without its native library, see unavailable()
    _cpu = None  # type: ignore[assignment]
    _import_error = str(error)
    warnings.warn(
        f"the native library of grank_kernels could not be loaded ({error}); the slow 'reference' backend is used",
        RuntimeWarning,
        stacklevel=2,
    )

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
_MAX_ROWS = (1 << 32) - 1
_MAX_INT8_WIDTH = 1 << 17  # 127^2 d stays below 2^31


def unavailable() -> str | None:
    """Why no op of this backend can run here."""
    return None if _cpu is not None else f"the native library could not be loaded: {_import_error}"


def isa() -> str:
    """The instruction set in use: the best of this processor, or what `GRANK_CPU_ISA` names."""
    return _cpu.isa()


def isas() -> dict[str, bool]:
    """Every instruction set compiled in, weakest first, and whether this processor has it."""
    return dict(_cpu.isas())


def mips_topk_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk` cannot run for these tensors."""
    if _cpu is None:
        return unavailable()
    if not queries.is_cpu:
        return f"queries are on {queries.device}, not on the CPU"
    if items.shape[0] > _MAX_ROWS:
        return f"items have {items.shape[0]} rows; one search takes at most {_MAX_ROWS}, split the table"
    if items.dtype == torch.int8 and items.shape[1] > _MAX_INT8_WIDTH:
        return f"int8 items have width {items.shape[1]}; int32 sums take at most {_MAX_INT8_WIDTH}"
    return None


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def mips_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    row_scale: torch.Tensor | None,
    ids: torch.Tensor | None,
    k: int,
    exclude_offsets: torch.Tensor | None,
    exclude_ids: torch.Tensor | None,
    allow: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows by (score, id): `values` (B, k) float32, `positions` (B, k) int64."""
    (B, d), N = queries.shape, items.shape[0]
    queries = queries.float().contiguous()
    row_stride, column_stride = items.stride()
    if column_stride != 1 and d > 1:
        items = items.contiguous()
        row_stride = d
    if exclude_offsets is not None and exclude_ids is not None:
        exclude_offsets, exclude_ids = exclude_offsets.contiguous(), exclude_ids.contiguous()
    if allow is not None and allow.stride(-1) != 1:
        allow = allow.contiguous()
    if ids is not None and N == 0:
        ids = ids.new_zeros(1)  # an empty tensor has the address 0, which says that positions are the ids
    values = queries.new_empty((B, k))
    positions = queries.new_empty((B, k), dtype=torch.int64)
    _cpu.mips_topk(
        queries.data_ptr(), B, items.data_ptr(), _DTYPES[items.dtype], N, d, row_stride * items.itemsize,
        _address(row_scale), _address(ids),
        _address(exclude_offsets), _address(exclude_ids), 0 if exclude_ids is None else len(exclude_ids),
        _address(allow), allow.stride(0) if allow is not None and allow.dim() == 2 else 0,
        k, torch.get_num_threads(), values.data_ptr(), positions.data_ptr(),
    )  # fmt: skip
    return values, positions
