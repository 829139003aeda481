"""The CUDA C++ kernels (csrc/cuda): tensors to addresses and a stream; outputs and work space allocated here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grank_kernels.backends.problems import CandidateCrossAttentionProblem, ScoreCandidatesProblem

try:
    from grank_kernels import _cuda
except ImportError as error:  # built without nvcc, or a driver library is missing: other backends still run
    _cuda = None  # type: ignore[assignment]
    _import_error = str(error)

_BFLOAT = {torch.float16: False, torch.bfloat16: True}
_WIDTHS = (16, 32, 64, 128)
_MAX_ROWS = (1 << 31) - 65  # a tile past the last row is still an int
_ALIGNMENT = 16  # bytes of a copy from global to shared memory
_HEAD_ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2}
_ACTIVATIONS = {"softmax": 0, "silu": 1}


def unavailable() -> str | None:
    """Why no op of this backend can run here."""
    if _cuda is None:
        return f"the CUDA module could not be loaded: {_import_error}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _device_unsupported(name: str, x: torch.Tensor) -> str | None:
    if not x.is_cuda:
        return f"{name} are on {x.device}, not on a CUDA device"
    if unavailable() is not None:
        return unavailable()
    properties = torch.cuda.get_device_properties(x.device)  # torch.compile folds this, but not get_device_capability
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        return f"{x.device} has compute capability {capability}; the kernels need (8, 0)"
    return None


@contextmanager
def _stream_of(device: torch.device) -> Iterator[int]:
    """The handle of the device's current stream, with the device made current."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` contiguous and 16-byte aligned, copied if necessary."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


# ---- score_candidates ----


def score_candidates_unsupported(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> str | None:
    """Why `score_candidates` cannot run for these tensors."""
    reason = _device_unsupported("items", rows)
    if reason is not None:
        return reason
    if keys.dtype not in _BFLOAT:
        return f"keys are {keys.dtype}; the kernels take torch.float16 and torch.bfloat16"
    if rows.dtype not in (keys.dtype, torch.int8):
        return f"items are {rows.dtype} and keys {keys.dtype}; the kernels take items of the keys' dtype, or torch.int8"
    for name, x in (("items", rows), ("values", values)):
        if x is not None and x.shape[1] not in _WIDTHS:
            return f"{name} have width {x.shape[1]}; the kernels take {', '.join(map(str, _WIDTHS))}"
    if len(keys) > _MAX_ROWS:
        return f"there are {len(keys)} keys; the kernels take at most {_MAX_ROWS}"
    if rows.stride(1) != 1 or rows.stride(0) * rows.itemsize % _ALIGNMENT:
        return f"items have strides {rows.stride()}; the kernels take rows that begin at multiples of 16 bytes"
    return None


def score_candidates(problem: ScoreCandidatesProblem) -> torch.Tensor:
    """Scores (B, C) float32 of every user's candidates."""
    rows = problem.items
    if rows.data_ptr() % _ALIGNMENT:  # the table is not copied, and while torch.compile traces there is no address
        raise ValueError(f"items begin at {rows.data_ptr():#x}; the kernels take a multiple of {_ALIGNMENT} bytes")
    (B, C), d, h = problem.candidate_ids.shape, rows.shape[1], _WIDTHS[0]  # without a head, any hidden width
    candidate_ids, cu_seqlens = problem.candidate_ids.contiguous(), problem.cu_seqlens.contiguous()
    row_scale = None if problem.row_scale is None else problem.row_scale.contiguous()
    keys, bias_k = _aligned(problem.keys), None if problem.bias_k is None else problem.bias_k.contiguous()
    values = user_hidden = item_weight = out_weight = None
    if problem.head is not None:
        values, user_hidden, item_weight, out_weight = (_aligned(x) for x in problem.head)
        h = len(out_weight)
    scores = torch.empty(B, C, dtype=torch.float32, device=rows.device)
    with _stream_of(rows.device) as stream:
        _cuda.score_candidates(
            _address(candidate_ids), B, C,
            _address(rows), _address(row_scale), len(rows), rows.stride(0) * rows.itemsize,
            _address(keys), _address(values), len(keys), _address(cu_seqlens), _address(bias_k),
            _address(user_hidden), _address(item_weight), _address(out_weight),
            float(problem.out_bias), problem.scale, _HEAD_ACTIVATIONS[problem.activation],
            float(problem.lse_weight), float(problem.lse_floor),
            _address(scores), _BFLOAT[keys.dtype], d, h, stream,
        )  # fmt: skip
    return scores


# ---- candidate_cross_attention ----


def candidate_cross_attention_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> str | None:
    """Why `candidate_cross_attention` or its backward cannot run for these tensors."""
    reason = _device_unsupported("queries", q)
    if reason is not None:
        return reason
    if q.dtype not in _BFLOAT:
        return f"q is {q.dtype}; the kernels take torch.float16 and torch.bfloat16"
    if q.shape[-1] not in _WIDTHS:
        return f"q has heads of width {q.shape[-1]}; the kernels take {', '.join(map(str, _WIDTHS))}"
    for name, x in (("q", q), ("k", k)):
        if max(x.shape[:2]) > _MAX_ROWS:
            return f"{name} has shape {tuple(x.shape)}; the kernels take at most {_MAX_ROWS} rows"
    return None


class _Operands:
    """The tensors of a call in the layout of the kernels; keeps their memory alive until the launch."""

    def __init__(self, problem: CandidateCrossAttentionProblem) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, _, bias_k, activation = problem
        offsets = cu_seqlens_q if cu_seqlens_q is not None else cu_seqlens_k
        self.users = len(q) if offsets is None else len(offsets) - 1
        self.shape, self.ragged_q, self.ragged_k = q.shape, cu_seqlens_q is not None, cu_seqlens_k is not None
        self.shared = cu_seqlens_q is None and q.stride(0) == 0 and self.users > 1
        self.q, self.k = (_aligned(x) for x in (q[0] if self.shared else q, k))
        self.v = None if v is None else _aligned(v)
        self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_k, self.bias_k = (
            None if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k, seqused_k, bias_k)
        )
        self.scale, self.activation = problem.scale, activation

    def problem(self, out: torch.Tensor, lse: torch.Tensor) -> "_cuda.CandidateCrossAttention":
        """The argument of both directions; `out` is contiguous."""
        *rows, heads, _ = self.shape
        *key_rows, _, _ = self.k.shape
        return _cuda.CandidateCrossAttention(
            self.users, heads,
            _address(self.q), _address(self.cu_seqlens_q), rows[-1], self.shape[:-2].numel(), self.shared,
            _address(self.k), _address(self.v), _address(self.cu_seqlens_k), _address(self.seqused_k),
            key_rows[-1], self.k.shape[:-2].numel(),
            _address(self.bias_k), self.scale, _ACTIVATIONS[self.activation],
            _address(None if self.v is None else out), _address(lse),
        )  # fmt: skip


def _fresh(shape: torch.Size, like: torch.Tensor, dtype: torch.dtype, ragged: bool, value: float = 0.0) -> torch.Tensor:
    """Memory for a result. The kernels write the rows of all users; ragged rows of no user keep `value`."""
    x = torch.empty(shape, dtype=dtype, device=like.device)
    return x.fill_(value) if ragged else x


def candidate_cross_attention(problem: CandidateCrossAttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` of q's shape and dtype, without v (0,), and `lse` of q's shape without D, float32."""
    q, operands = problem.q, _Operands(problem)
    out = _fresh(q.shape if problem.v is not None else torch.Size((0,)), q, q.dtype, operands.ragged_q)
    lse_shape = q.shape[:-1] if problem.activation == "softmax" else torch.Size((0,))
    lse = _fresh(lse_shape, q, torch.float32, operands.ragged_q, torch.inf)
    with _stream_of(q.device) as stream:
        _cuda.candidate_cross_attention(operands.problem(out, lse), _BFLOAT[q.dtype], q.shape[-1], stream)
    return out, lse


def candidate_cross_attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    problem: CandidateCrossAttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients in q, k, v and bias_k, of their shapes and dtypes, contiguous; None for a v or bias_k of None.

    Deterministic, without atomics. The gradient of shared queries is by user, (B, C, H, D).
    """
    q, k, v, bias_k, operands = *problem[:3], problem.bias_k, _Operands(problem)
    grad_out, out, lse = None if grad_out is None else _aligned(grad_out), _aligned(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    grad_q = _fresh(q.shape, q, q.dtype, operands.ragged_q)
    grad_k = _fresh(k.shape, k, k.dtype, operands.ragged_k)
    grad_v = None if v is None else _fresh(v.shape, v, v.dtype, operands.ragged_k)
    grad_bias = None if bias_k is None else _fresh(bias_k.shape, k, torch.float32, operands.ragged_k)
    with _stream_of(q.device) as stream:
        _cuda.candidate_cross_attention_backward(
            operands.problem(out, lse),
            _address(grad_out), _address(grad_lse), _address(delta),
            _address(grad_q), _address(grad_k), _address(grad_v), _address(grad_bias),
            _BFLOAT[q.dtype], q.shape[-1], stream,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_bias
