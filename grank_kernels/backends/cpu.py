"""The C++ SIMD kernels (csrc/cpu): tensors to addresses, outputs allocated here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grank_kernels.backends.problems import (
    CandidateCrossAttentionProblem,
    CorpusCrossEntropyProblem,
    MipsTopkProblem,
    ScoreCandidatesProblem,
    SoftmaxSums,
)
from grank_kernels.table.quantise import Coarse, in_basis

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
_HEAD_ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2}
_ATTENTION_ACTIVATIONS = {"softmax": 0, "silu": 1}
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


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Replaces the instruction set of the whole process inside a `with` block: for tests."""
    before = isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


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


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _row_bytes(x: torch.Tensor) -> int:
    return x.stride(0) * x.itemsize


class _Search:
    """What the searching kernels are told of a call, and the outputs they write."""

    def __init__(self, problem: MipsTopkProblem) -> None:
        queries, items, row_scale, ids, k, exclude_offsets, exclude_ids, allow = problem
        (B, d), N = queries.shape, items.shape[0]
        queries = queries.float().contiguous()
        items = _rows_contiguous(items)
        if exclude_offsets is not None and exclude_ids is not None:
            exclude_offsets, exclude_ids = exclude_offsets.contiguous(), exclude_ids.contiguous()
        if allow is not None and allow.stride(-1) != 1:
            allow = allow.contiguous()
        if ids is not None and N == 0:
            ids = ids.new_zeros(1)  # an empty tensor has the address 0, which says that positions are the ids
        self.queries = queries
        try:
            self.values = torch.empty(B, k, dtype=torch.float32, device="cpu")  # whatever torch.set_default_* say
            self.positions = torch.empty(B, k, dtype=torch.int64, device="cpu")
        except RuntimeError as error:  # torch's allocator: "DefaultCPUAllocator: can't allocate memory"
            raise MemoryError(f"k must leave room for {B} x k results of 12 bytes, got {k}") from error
        self.alive = (items, row_scale, ids, exclude_offsets, exclude_ids, allow)
        self.arguments = (
            (queries.data_ptr(), B),
            (items.data_ptr(), _DTYPES[items.dtype], N, d, _row_bytes(items), _address(row_scale)),
            _address(ids),
            (_address(exclude_offsets), _address(exclude_ids), 0 if exclude_ids is None else len(exclude_ids)),
            (_address(allow), allow.stride(0) if allow is not None and allow.dim() == 2 else 0),
            (k, torch.get_num_threads(), self.values.data_ptr(), self.positions.data_ptr()),
        )


def mips_topk(problem: MipsTopkProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows by (score, id): `values` (B, k) float32, `positions` (B, k) int64."""
    search = _Search(problem)
    _cpu.mips_topk(*search.arguments)
    return search.values, search.positions


def mips_topk_certified_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk_certified` cannot run for these tensors."""
    if items.shape[1] > _MAX_INT8_WIDTH:
        return f"the int8 copy has width {items.shape[1]}; int32 sums take at most {_MAX_INT8_WIDTH}"
    return mips_topk_unsupported(queries, items)


def mips_topk_certified(problem: MipsTopkProblem, coarse: Coarse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as `mips_topk` of the rows, and how many of them were read for each query, `rescored` (B,) int64."""
    search = _Search(problem)
    rescored = torch.empty(len(search.queries), dtype=torch.int64, device="cpu")
    turned = in_basis(search.queries, coarse.basis).contiguous()
    rows, scale, error = coarse.rows, coarse.scale, coarse.error
    _cpu.mips_topk_certified(
        *search.arguments,
        (turned.data_ptr(), rows.data_ptr(), _row_bytes(rows), scale.data_ptr(), error.data_ptr()),
        rescored.data_ptr(),
    )
    return search.values, search.positions, rescored


def score_candidates_unsupported(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> str | None:
    """Why `score_candidates` cannot run for these tensors."""
    if _cpu is None:
        return unavailable()
    if not rows.is_cpu:
        return f"items are on {rows.device}, not on the CPU"
    if rows.shape[0] > _MAX_ROWS:
        return f"items have {rows.shape[0]} rows; this backend takes at most {_MAX_ROWS}"
    return None


def score_candidates(problem: ScoreCandidatesProblem) -> torch.Tensor:
    """Scores (B, C) float32 of every user's candidates."""
    (B, C), (N, d) = problem.candidate_ids.shape, problem.items.shape
    candidate_ids, cu_seqlens = problem.candidate_ids.contiguous(), problem.cu_seqlens.contiguous()
    rows, keys = _rows_contiguous(problem.items), _rows_contiguous(problem.keys)
    bias_k = None if problem.bias_k is None else problem.bias_k.contiguous()
    values = user_hidden = item_weight = out_weight = None
    if problem.head is not None:
        values, user_hidden, item_weight, out_weight = problem.head
        values, item_weight = _rows_contiguous(values), item_weight.contiguous()
        user_hidden, out_weight = user_hidden.float().contiguous(), out_weight.float().contiguous()
    scores = torch.empty(B, C, dtype=torch.float32, device="cpu")
    _cpu.score_candidates(
        candidate_ids.data_ptr(), B, C, rows.data_ptr(), _DTYPES[rows.dtype], N, d, _row_bytes(rows),
        _address(problem.row_scale), _DTYPES[keys.dtype], keys.data_ptr(), _row_bytes(keys), _address(values),
        0 if values is None else _row_bytes(values), 0 if values is None else values.shape[1], cu_seqlens.data_ptr(),
        _address(bias_k), _address(user_hidden), _address(item_weight), _address(out_weight), problem.out_bias,
        problem.scale, _HEAD_ACTIVATIONS[problem.activation], problem.lse_weight, problem.lse_floor,
        torch.get_num_threads(), scores.data_ptr(),
    )  # fmt: skip
    return scores


def candidate_cross_attention_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> str | None:
    """Why `candidate_cross_attention` or its backward cannot run for these tensors."""
    if _cpu is None:
        return unavailable()
    if not q.is_cpu:
        return f"q is on {q.device}, not on the CPU"
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}; this backend takes torch.float32, torch.float16 or torch.bfloat16"
    return None


class _Attention:
    """What the attention kernels are told of a call, forward and backward."""

    def __init__(self, problem: CandidateCrossAttentionProblem) -> None:
        self.q, self.k = _rows_contiguous(problem.q), _rows_contiguous(problem.k)
        self.v = None if problem.v is None else _rows_contiguous(problem.v)
        self.bias_k = problem.bias_k
        self.offsets = [
            None if x is None else x.contiguous()
            for x in (problem.cu_seqlens_q, problem.cu_seqlens_k, problem.seqused_k)
        ]
        offsets_q, offsets_k, used_k = self.offsets
        self.ragged_q, self.ragged_k = offsets_q is not None, offsets_k is not None
        self.softmax = problem.activation == "softmax"
        q, k = self.q, self.k
        users = len(q) if offsets_q is None else len(offsets_q) - 1
        self.head = (
            users, q.shape[-2], q.shape[-1], _DTYPES[q.dtype], _ATTENTION_ACTIVATIONS[problem.activation],
            problem.scale, torch.get_num_threads(), self.v is None,
            (_address(offsets_q), 0, 0 if self.ragged_q else q.shape[1]),
            (_address(offsets_k), _address(used_k), 0 if self.ragged_k else k.shape[1]),
        )  # fmt: skip
        self.all_keys = not self.ragged_k and used_k is None

    def operands(self, out: torch.Tensor, lse: torch.Tensor) -> list[Any]:
        """Arguments of both directions."""
        return [
            *self.head, self.by_query(self.q), self.by_key(self.k), self.by_key(self.v), self.by_key(self.bias_k),
            self.by_query(None if self.v is None else out), self.by_query(lse if self.softmax else None),
        ]  # fmt: skip

    def by_query(self, x: torch.Tensor | None) -> tuple[int, int, int, int]:
        """The address and strides of a tensor with a row a query; x without D is given one of 1."""
        return _by_user(x, self.ragged_q)

    def by_key(self, x: torch.Tensor | None) -> tuple[int, int, int, int]:
        return _by_user(x, self.ragged_k)


def _by_user(x: torch.Tensor | None, ragged: bool) -> tuple[int, int, int, int]:
    """An address and the strides in bytes of users, rows and heads; rows that lie one after another have no user's."""
    if x is None:
        return 0, 0, 0, 0
    strides = [0, *x.stride()] if ragged else list(x.stride())
    return x.data_ptr(), strides[0] * x.itemsize, strides[1] * x.itemsize, strides[2] * x.itemsize


def _fresh(x: torch.Tensor, written: bool) -> torch.Tensor:
    """Memory like x, contiguous; zeros where the kernels do not write all of it."""
    make = torch.empty if written else torch.zeros
    return make(x.shape, dtype=x.dtype, device="cpu")


def candidate_cross_attention(problem: CandidateCrossAttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` of q's shape and dtype, without v (0,), and `lse` of q's shape without D, float32; of silu (0,)."""
    call = _Attention(problem)
    out = call.q.new_empty(0) if call.v is None else _fresh(call.q, not call.ragged_q)
    lse = torch.full(call.q.shape[:-1] if call.softmax else (0,), torch.inf, dtype=torch.float32, device="cpu")
    _cpu.candidate_cross_attention(*call.operands(out, lse))
    return out, lse


def candidate_cross_attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    problem: CandidateCrossAttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients in q, k, v and bias_k, of their shapes and dtypes, contiguous; None for a v or bias_k of None."""
    call = _Attention(problem)
    grad_out, out = None if grad_out is None else _rows_contiguous(grad_out), _rows_contiguous(out)
    grad_q, grad_k = _fresh(call.q, not call.ragged_q), _fresh(call.k, call.all_keys)
    grad_v, grad_bias = (None if x is None else _fresh(x, call.all_keys) for x in (call.v, call.bias_k))
    delta, excess = torch.empty(2, *lse.shape, dtype=torch.float32, device="cpu") if call.softmax else (None, None)
    gradients = [
        call.by_query(grad_out), call.by_query(grad_q), call.by_key(grad_k), call.by_key(grad_v),
        call.by_key(grad_bias), call.by_query(grad_lse), call.by_query(delta), call.by_query(excess),
    ]  # fmt: skip
    _cpu.candidate_cross_attention_backward(*call.operands(out, lse), *gradients)
    return grad_q, grad_k, grad_v, grad_bias


def corpus_cross_entropy_unsupported(users: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `corpus_cross_entropy` or its backward cannot run for these tensors."""
    if _cpu is None:
        return unavailable()
    if not users.is_cpu:
        return f"users are on {users.device}, not on the CPU"
    return None


class _CorpusLoss:
    """Arguments of both kernels of corpus_cross_entropy: only the rows with a target are passed."""

    def __init__(self, problem: CorpusCrossEntropyProblem) -> None:
        self.with_target = (problem.targets >= 0).nonzero()[:, 0]
        users, items, targets = problem.users, _rows_contiguous(problem.items), problem.targets.contiguous()
        windows = problem.exclude_windows
        offsets, ids = _sorted_lists(problem.exclude_offsets, problem.exclude_ids, len(items))
        if len(self.with_target) < len(users):
            users, targets = users[self.with_target], targets[self.with_target]
            if offsets is not None:
                windows = self.with_target if windows is None else windows[self.with_target]
        users, bias = _rows_contiguous(users), None if problem.bias is None else problem.bias.contiguous()
        windows = None if windows is None else windows.contiguous()
        self.alive = (users, items, targets, bias, offsets, ids, windows)
        self.arguments = (
            (len(users), *items.shape), _DTYPES[items.dtype], problem.scale, torch.get_num_threads(),
            (users.data_ptr(), _row_bytes(users), items.data_ptr(), _row_bytes(items), targets.data_ptr(),
             _address(bias)),
            (_address(offsets), _address(ids), _address(windows)),
        )  # fmt: skip

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x with a target, contiguous."""
        return x.contiguous() if len(self.with_target) == len(x) else x[self.with_target]

    def all_rows(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """X with zeros for the rows without a target."""
        return x if len(x) == rows else x.new_zeros(rows, *x.shape[1:]).index_copy_(0, self.with_target, x)


def _sorted_lists(
    offsets: torch.Tensor | None, ids: torch.Tensor | None, N: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Offsets and ids of lists with ascending ids."""
    if offsets is None or ids is None:
        return None, None
    first, last = int(offsets[0]), int(offsets[-1])
    list_of = torch.repeat_interleave(torch.arange(len(offsets) - 1, device="cpu"), offsets.diff())
    keys = (list_of * (N + 1) + ids[first:last] + 1).sort().values  # ids of -1 come first
    return (offsets - first).contiguous(), keys % (N + 1) - 1


def corpus_cross_entropy(problem: CorpusCrossEntropyProblem, pool: bool) -> SoftmaxSums:
    """The sums of every row over the eligible items other than its target."""
    call, R = _CorpusLoss(problem), len(problem.users)
    rows, d = len(call.with_target), problem.users.shape[1]
    at_target, peak, mass = torch.empty(3, rows, dtype=torch.float32, device="cpu")
    pooled = torch.empty(rows, d, dtype=torch.float32, device="cpu") if pool else None
    _cpu.corpus_cross_entropy(*call.arguments, at_target.data_ptr(), peak.data_ptr(), mass.data_ptr(), _address(pooled))
    at_target, peak, mass = (call.all_rows(x, R) for x in (at_target, peak, mass))
    return SoftmaxSums(at_target, peak, mass, None if pooled is None else call.all_rows(pooled, R))


def corpus_cross_entropy_backward(
    problem: CorpusCrossEntropyProblem, slope: torch.Tensor, target_slope: torch.Tensor, normaliser: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of items, of their dtype, and of the bias, float32."""
    call = _CorpusLoss(problem)
    make = torch.empty if len(call.with_target) else torch.zeros  # the kernel writes nothing without rows
    grad_items = make(problem.items.shape, dtype=problem.items.dtype, device="cpu")
    grad_bias = make(len(problem.items), dtype=torch.float32, device="cpu")
    slope, target_slope, shift, log_sum = (call.of_rows(x) for x in (slope, target_slope, *normaliser))
    if len(call.with_target):
        _cpu.corpus_cross_entropy_backward(
            *call.arguments, slope.data_ptr(), target_slope.data_ptr(), shift.data_ptr(), log_sum.data_ptr(),
            grad_items.data_ptr(), grad_bias.data_ptr(),
        )  # fmt: skip
    return grad_items, grad_bias
