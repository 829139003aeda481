"""The reference backend: plain torch on any device, the definition of every op and the oracle of the tests.

The docstring of a function named like an op states the contract of that function in every backend; its argument is
documented in problems.py.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
from torch.nn import functional as F

from grank_kernels.backends.noise import gumbel, item_keys, row_keys
from grank_kernels.backends.problems import (
    CandidateCrossAttentionProblem,
    CorpusCrossEntropyProblem,
    MipsTopkProblem,
    SampleNegativesProblem,
    ScoreCandidatesProblem,
    SoftmaxSums,
)
from grank_kernels.table.quantise import Coarse, certify_queries, quantise

SEGMENT = 128  # dimensions of a partial sum
CHUNK_SCORES = 1 << 22  # scores in memory at a time


def unavailable() -> str | None:
    """Why no op of this backend can run here."""
    return None


def mips_topk_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk` cannot run for these tensors."""
    if items.device != queries.device:
        return f"queries are on {queries.device} and items on {items.device}"
    return None


def mips_topk(problem: MipsTopkProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best rows by (score, id), chunk by chunk: `values` (B, k) float32, `positions` (B, k) int64."""
    queries, items, row_scale, ids, k, exclude_offsets, exclude_ids, allow = problem
    B, N = len(queries), len(items)
    device = queries.device
    excluded = _excluded_positions(exclude_offsets, exclude_ids, ids, B, N)
    values = torch.empty(B, 0, dtype=torch.float32, device=device)
    positions = torch.empty(B, 0, dtype=torch.int64, device=device)
    eligible = torch.empty(B, 0, dtype=torch.bool, device=device)
    for start, stop in _chunks(B, N):
        scores = _scores(queries, items[start:stop], None if row_scale is None else row_scale[start:stop])
        allowed = _allowed(~scores.isnan(), allow, excluded, start, stop)
        values = torch.cat([values, scores.masked_fill(~allowed, -torch.inf) + 0.0], 1)  # -0.0 becomes 0.0
        positions = torch.cat([positions, torch.arange(start, stop, device=device).expand(B, -1)], 1)
        eligible = torch.cat([eligible, allowed], 1)
        order = _best_first(values, eligible, positions if ids is None else ids[positions])[:, :k]
        values, positions, eligible = (x.gather(1, order) for x in (values, positions, eligible))
    positions = positions.masked_fill(~eligible, -1)
    missing = (0, k - values.shape[1])
    return F.pad(values, missing, value=-torch.inf), F.pad(positions, missing, value=-1)


def mips_topk_certified_unsupported(queries: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `mips_topk_certified` cannot run for these tensors."""
    return mips_topk_unsupported(queries, items)


def mips_topk_certified(problem: MipsTopkProblem, coarse: Coarse) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bits of `mips_topk` of the rows, and the number of rows scored for each query, `rescored` (B,) int64.

    A row is scored if its upper bound from the int8 copy (quantise.py) reaches the k-th largest lower bound.
    """
    queries, items, _, ids, k, exclude_offsets, exclude_ids, allow = problem
    B, N = len(queries), len(items)
    excluded = _excluded_positions(exclude_offsets, exclude_ids, ids, B, N)
    numbers, query_scale, radius = certify_queries(queries, coarse.basis)
    chunks = list(_chunks(B, N))

    def bounds(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        score = _int8_scores(numbers, query_scale, coarse.rows[start:stop], coarse.scale[start:stop])
        off = radius[:, None] * coarse.error[start:stop]  # NaN: no bound
        allowed = _allowed(torch.ones_like(score, dtype=torch.bool), allow, excluded, start, stop)
        lower = (score - off).nan_to_num(-torch.inf, neginf=-torch.inf).masked_fill(~allowed, -torch.inf)
        return lower, (score + off).nan_to_num(torch.inf, posinf=torch.inf).masked_fill(~allowed, torch.nan)

    lowest = torch.full((B, k), -torch.inf, device=queries.device)
    for start, stop in chunks:
        lowest = torch.cat([lowest, bounds(start, stop)[0]], 1).topk(k).values
    candidates = [torch.empty(2, 0, dtype=torch.int64, device=queries.device)]  # (query, position)
    for start, stop in chunks:
        query, place = (bounds(start, stop)[1] >= lowest[:, -1:]).nonzero(as_tuple=True)
        candidates.append(torch.stack([query, start + place]))
    query, position = torch.cat(candidates, 1)
    values = torch.empty(B, k, dtype=torch.float32, device=queries.device)
    positions = torch.empty(B, k, dtype=torch.int64, device=queries.device)
    for b in range(B):
        mine = position[query == b]
        own_ids = None if ids is None else ids[mine]
        value, place = mips_topk(MipsTopkProblem(queries[b : b + 1], items[mine], None, own_ids, k))
        values[b] = value[0]
        positions[b] = F.pad(mine, (0, 1), value=-1)[place[0]]  # place -1 reads the padding, -1
    return values, positions, query.bincount(minlength=B)


def _chunks(B: int, N: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of chunks of rows with `CHUNK_SCORES` scores."""
    step = max(1, CHUNK_SCORES // max(B, 1))
    for start in range(0, N, step):
        yield start, min(N, start + step)


def _allowed(
    allowed: torch.Tensor,
    allow: torch.Tensor | None,
    excluded: tuple[torch.Tensor, torch.Tensor] | None,
    start: int,
    stop: int,
) -> torch.Tensor:
    """(B, stop - start) bool: `allowed` and the filters, written in place."""
    if allow is not None:
        allowed &= allow[..., start:stop]
    if excluded is not None:
        query, position = excluded
        inside = (position >= start) & (position < stop)
        allowed[query[inside], position[inside] - start] = False
    return allowed


def _scores(queries: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    """(B, n) float32 scores; the bits of each depend on its query and its row alone."""
    queries = queries.float()
    if row_scale is not None:
        return _int8_scores(*quantise(queries), rows, row_scale)
    columns = rows.T.float().contiguous()
    total = torch.zeros(len(queries), len(rows), dtype=torch.float32, device=queries.device)
    for begin in range(0, queries.shape[1], SEGMENT):
        partial = torch.zeros_like(total)
        for j in range(begin, min(begin + SEGMENT, queries.shape[1])):
            partial += queries[:, j, None] * columns[j]
        total += partial
    return total


def _int8_scores(
    numbers: torch.Tensor, query_scale: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor
) -> torch.Tensor:
    sums = numbers.double() @ rows.double().T  # integers below 2^53: exact in any order
    return sums.float() * (query_scale[:, None] * row_scale)


def _best_first(values: torch.Tensor, eligible: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, n) order by (eligible first, score descending, id ascending): stable sorts from the last key to the first."""
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order.gather(1, eligible.gather(1, order).argsort(dim=1, descending=True, stable=True))


def _excluded_positions(
    offsets: torch.Tensor | None, excluded: torch.Tensor | None, ids: torch.Tensor | None, B: int, N: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Excluded pairs as (queries, positions); ids without a row are dropped."""
    if offsets is None or excluded is None:
        return None
    offsets, excluded = offsets.contiguous(), excluded.contiguous()  # searchsorted warns otherwise
    entry = torch.arange(len(excluded), device=excluded.device)
    query = torch.searchsorted(offsets, entry, right=True) - 1
    known = (query >= 0) & (query < B) & (excluded >= 0)
    if ids is None:
        known &= excluded < N
        return query[known], excluded[known]
    by_id, position = ids.sort(stable=True)
    place = (torch.searchsorted(by_id, excluded, right=True) - 1).clamp(min=0)  # the newest of the rows of one id
    known &= by_id[place] == excluded if N else torch.zeros_like(known)
    return query[known], position[place[known]]


# ---- the Ranker's ops: a loop over users, in float32 ----

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of the head; gelu with erf, not tanh
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


P = ParamSpec("P")
R = TypeVar("R")


def in_full(op: Callable[P, R]) -> Callable[P, R]:
    """Disables autocast, so that sums are float32."""

    @wraps(op)
    def run(*operands: P.args, **named: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return op(*operands, **named)

    return run


def score_candidates_unsupported(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> str | None:
    """Why `score_candidates` cannot run for these tensors."""
    return None


@in_full
def score_candidates(problem: ScoreCandidatesProblem) -> torch.Tensor:
    """Scores (B, C) float32 of the candidates.

    For user b and `e = items[candidate_ids[b, c]]` (times its scale), K, V and bias the user's rows of keys, values
    and bias_k, `s = scale e K^T + bias`: the sum of `out_bias`; with a head `out_weight @ act(softmax(s) V +
    e item_weight + user_hidden[b])`; and with an `lse_weight` not 0 `lse_weight * log(exp(lse_floor) + sum exp(s))`.
    """
    candidate_ids, rows, row_scale = problem.candidate_ids, problem.items, problem.row_scale
    keys, bias_k = problem.keys, problem.bias_k
    head = None if problem.head is None else [x.float() for x in problem.head]
    activate = ACTIVATIONS[problem.activation]
    scores = torch.full(candidate_ids.shape, -torch.inf, dtype=torch.float32, device=rows.device)
    for b, user in enumerate(_sequences(keys, problem.cu_seqlens)):
        known = (candidate_ids[b] >= 0) & (candidate_ids[b] < len(rows))
        positions = candidate_ids[b][known]
        e = rows[positions].float()
        if row_scale is not None:
            e = e * row_scale[positions, None]
        logits = problem.scale * (e @ keys[user].float().T)
        if bias_k is not None:
            logits = logits + bias_k[user]
        total = e.new_full((len(e),), problem.out_bias)
        if head is not None:
            values, user_hidden, item_weight, out_weight = head
            hidden = _softmax(logits) @ values[user] + e @ item_weight + user_hidden[b]
            total = activate(hidden) @ out_weight + problem.out_bias
        if problem.lse_weight != 0:
            total = total + problem.lse_weight * F.pad(logits, (1, 0), value=problem.lse_floor).logsumexp(1)
        scores[b, known] = total
    return scores


def candidate_cross_attention_unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> str | None:
    """Why `candidate_cross_attention` or its backward cannot run for these tensors."""
    return None


@in_full
def candidate_cross_attention(problem: CandidateCrossAttentionProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` of q's shape and dtype, without v (0,), and `lse` of q's shape without D, float32.

    By user and head, for `s = scale q k^T + bias_k` over the user's L keys: `out = softmax(s) v` and `lse` the
    logarithm of the sum of exp(s); for `activation` "silu" `out = silu(s) v / L`, and `lse` is (0,).
    `out = 0` and `lse = +inf` for a user without keys, a query whose logits are all -inf, and rows outside all offsets.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, _, bias_k, activation = problem
    out = q.new_zeros(q.shape if v is not None else 0)
    lse = torch.full(
        q.shape[:-1] if activation == "softmax" else (0,), torch.inf, dtype=_wide(q).dtype, device=q.device
    )
    for user_q, user_k in zip(_sequences(q, cu_seqlens_q), _sequences(k, cu_seqlens_k, seqused_k), strict=True):
        logits = _logits(q[user_q], k[user_k], problem.scale, None if bias_k is None else bias_k[user_k])
        if activation == "silu":
            weights = F.silu(logits) / max(logits.shape[-1], 1)
        else:
            weights, total = _softmax(logits), logits.logsumexp(-1)
            lse[user_q] = total.masked_fill(total == -torch.inf, torch.inf).T
        if v is not None:
            out[user_q] = torch.einsum("hcl,lhd->chd", weights, _wide(v[user_k])).to(out.dtype)
    return out, lse


@in_full
def candidate_cross_attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    problem: CandidateCrossAttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients in q, k, v and bias_k, of their shapes and dtypes, contiguous; None for a v or bias_k of None.

    `grad_out` is None if v is, and only then. `grad_lse`, float32, is 0 where `lse` is +inf; None stands for zeros.
    Deterministic: the order of every sum is fixed. Rows and keys outside all offsets and lengths have gradient 0. The
    gradient of shared queries is by user, (B, C, H, D): the caller sums over users.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, _, bias_k, activation = problem
    grad_q, grad_k = q.new_zeros(q.shape), k.new_zeros(k.shape)
    grad_v, grad_bias = (None if x is None else x.new_zeros(x.shape) for x in (v, bias_k))
    for user_q, user_k in zip(_sequences(q, cu_seqlens_q), _sequences(k, cu_seqlens_k, seqused_k), strict=True):
        queries, keys = _wide(q[user_q]), _wide(k[user_k])
        logits = _logits(queries, keys, problem.scale, None if bias_k is None else bias_k[user_k])
        grad_weights = torch.zeros_like(logits)
        if v is not None and grad_out is not None:
            grad = _wide(grad_out[user_q])
            grad_weights = torch.einsum("chd,lhd->hcl", grad, _wide(v[user_k]))
        if activation == "silu":
            length, gate = max(logits.shape[-1], 1), logits.sigmoid()
            weights = logits * gate / length
            grad_logits = grad_weights * gate * (1 + logits * (1 - gate)) / length
        else:
            weights = _softmax(logits)  # not exp(logits - lse): lse rounds to the largest logit from 2^24 on
            delta = torch.zeros_like(lse[user_q]) if v is None else (grad * _wide(out[user_q])).sum(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[user_q]
            grad_logits = weights * (grad_weights - delta.T[..., None])
        grad_q[user_q] = (torch.einsum("hcl,lhd->chd", grad_logits, keys) * problem.scale).to(q.dtype)
        grad_k[user_k] = (torch.einsum("hcl,chd->lhd", grad_logits, queries) * problem.scale).to(k.dtype)
        if grad_v is not None:
            grad_v[user_k] = torch.einsum("hcl,chd->lhd", weights, grad).to(grad_v.dtype)
        if grad_bias is not None:
            grad_bias[user_k] = grad_logits.sum(1).T
    return grad_q, grad_k, grad_v, grad_bias


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """The softmax over the last dimension; zeros where every logit is -inf."""
    return logits.softmax(-1).masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)


def _sequences(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None = None
) -> list[tuple[int | slice, ...]]:
    """An index of each user's rows: into x (B, L, ...), or with offsets into x (total, ...)."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.clamp(0, len(x)).tolist()
        return [(slice(start, stop),) for start, stop in pairwise(bounds)]
    lengths = [x.shape[1]] * len(x) if seqused is None else seqused.clamp(0, x.shape[1]).tolist()
    return [(b, slice(0, length)) for b, length in enumerate(lengths)]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32; float64 stays, for tests by finite differences."""
    return x if x.dtype == torch.float64 else x.float()


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """Logits (H, C, L) of one user, from q (C, H, D), k (L, H, D) and bias (L, H)."""
    logits = scale * torch.einsum("chd,lhd->hcl", _wide(q), _wide(k))
    return logits if bias is None else logits + bias.T[:, None]


# ---- the softmax over the whole corpus: one row after the other, float32 ----


def corpus_cross_entropy_unsupported(users: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `corpus_cross_entropy` or its backward cannot run for these tensors."""
    return None


@in_full
def corpus_cross_entropy(problem: CorpusCrossEntropyProblem, pool: bool) -> SoftmaxSums:
    """The sums of every row over the eligible items other than its target; `pool`: whether a gradient is wanted."""
    (R, d), device = problem.users.shape, problem.users.device
    at_target, mass = torch.zeros(2, R, device=device)
    peak = torch.full((R,), -torch.inf, device=device)
    pooled = torch.zeros(R, d, device=device)
    items = problem.items.float()
    for r, target, eligible in _rows_with_target(problem):
        logits = _corpus_logits(problem, r, items)
        at_target[r] = logits[target]
        others = logits[eligible]
        if len(others):
            peak[r] = others.amax()
            weights = (others - (0 if peak[r] == -torch.inf else peak[r])).exp()
            mass[r], pooled[r] = weights.sum(), weights @ items[eligible]
    return SoftmaxSums(at_target, peak, mass, pooled if pool else None)


@in_full
def corpus_cross_entropy_backward(
    problem: CorpusCrossEntropyProblem, slope: torch.Tensor, target_slope: torch.Tensor, normaliser: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of items, of their dtype, and of the bias, float32: sums over rows in ascending order.

    Args:
        problem: as in the forward pass.
        slope: (R,) float32, the gradient of the loss.
        target_slope: (R,) float32, the derivative with respect to the target's logit.
        normaliser: (2, R) float32; the probability of an item with logit x is `exp(x - normaliser[0] - normaliser[1])`.
    """
    items = problem.items.float()
    grad_items, grad_bias = torch.zeros_like(items), torch.zeros(len(items), device=items.device)
    for r, target, eligible in _rows_with_target(problem):
        steep = torch.zeros_like(grad_bias)
        logits = _corpus_logits(problem, r, items)[eligible]
        steep[eligible] = slope[r] * (logits - normaliser[0, r] - normaliser[1, r]).exp()
        steep[target] = target_slope[r]
        grad_items += problem.scale * steep[:, None] * problem.users[r].float()
        grad_bias += steep
    return grad_items.to(problem.items.dtype), grad_bias


def sample_negatives_unsupported(users: torch.Tensor, items: torch.Tensor) -> str | None:
    """Why `sample_negatives` cannot run for these tensors."""
    return None


@in_full
def sample_negatives(problem: SampleNegativesProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` (R, m) int64 and `log_q` (R, m) float32, ordered by noisy logit; -1 and -inf where fewer are eligible."""
    (R, _), N, device = problem.users.shape, len(problem.items), problem.users.device
    ids = torch.full((R, problem.m), -1, device=device)
    log_q = torch.full((R, problem.m), -torch.inf, device=device)
    rows, columns = row_keys(problem.seed, R, device), item_keys(N, device)
    items = problem.items.float()
    for r in range(R):
        logits = problem.scale * (items @ problem.users[r].float())
        logits[_excluded_by(problem, r)] = -torch.inf
        noisy = (logits + gumbel(rows[r], columns)).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        best = noisy.topk(min(problem.m, N))
        drawn = best.indices[best.values > -torch.inf]
        ids[r, : len(drawn)] = drawn
        log_q[r, : len(drawn)] = logits[drawn] - logits.logsumexp(0)
    return ids, log_q


def _corpus_logits(problem: CorpusCrossEntropyProblem, r: int, items: torch.Tensor) -> torch.Tensor:
    """(N,) logits of row r."""
    logits = problem.scale * (items @ problem.users[r].float())
    return logits if problem.bias is None else logits + problem.bias


def _excluded_by(problem: CorpusCrossEntropyProblem | SampleNegativesProblem, r: int) -> torch.Tensor:
    """The ids that row r excludes."""
    offsets, ids, windows = problem.exclude_offsets, problem.exclude_ids, problem.exclude_windows
    if offsets is None or ids is None:
        return torch.empty(0, dtype=torch.int64, device=problem.users.device)
    w = r if windows is None else int(windows[r])
    mine = ids[int(offsets[w]) : int(offsets[w + 1])]
    return mine[mine >= 0]


def _rows_with_target(problem: CorpusCrossEntropyProblem) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Row, target, and (N,) bool: the eligible items other than the target."""
    for r, target in enumerate(problem.targets.tolist()):
        if target >= 0:
            eligible = torch.ones(len(problem.items), dtype=torch.bool, device=problem.users.device)
            eligible[_excluded_by(problem, r)] = False
            eligible[target] = False
            yield r, target, eligible
