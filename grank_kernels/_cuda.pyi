class CandidateCrossAttention:
    def __init__(
        self,
        users: int, heads: int,
        q: int, cu_seqlens_q: int, queries_per_user: int, num_queries: int, shared_queries: bool,
        k: int, v: int, cu_seqlens_k: int, seqused_k: int, keys_per_user: int, num_keys: int,
        bias_k: int, softmax_scale: float, activation: int,
        out: int, lse: int,
    ) -> None: ...  # fmt: skip

def score_candidates(
    candidate_ids: int, users: int, candidates: int,
    items: int, row_scale: int, num_items: int, item_stride: int,
    keys: int, values: int, num_keys: int, cu_seqlens: int, bias_k: int,
    user_hidden: int, item_weight: int, out_weight: int, out_bias: float, softmax_scale: float, activation: int,
    lse_weight: float, lse_floor: float, scores: int, bfloat: bool, width: int, hidden: int, stream: int,
) -> None: ...  # fmt: skip
def candidate_cross_attention(problem: CandidateCrossAttention, bfloat: bool, width: int, stream: int) -> None: ...
def candidate_cross_attention_backward(
    problem: CandidateCrossAttention,
    grad_out: int, grad_lse: int, delta: int, grad_q: int, grad_k: int, grad_v: int, grad_bias: int,
    bfloat: bool, width: int, stream: int,
) -> None: ...  # fmt: skip
def cuda_runtime_version() -> int: ...
def architectures() -> list[str]: ...
def device_count() -> int: ...
