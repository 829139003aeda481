// Entry points of the CUDA kernels for the emulator, with the argument lists of csrc/bindings_cuda.cpp; a plan and what
// belongs to one direction alone come after them.
#include "candidate_cross_attention.h"
#include "score_candidates.h"

#define GRANK_ENTRY extern "C" __attribute__((visibility("default"))) void

namespace grank::cuda {

GRANK_ENTRY emulated_score_candidates(const int64_t* candidate_ids, int64_t users, int64_t candidates,
                                      const void* items, const float* row_scale, int64_t num_items, int64_t item_stride,
                                      const void* keys, const void* values, int64_t num_keys, const int64_t* cu_seqlens,
                                      const float* bias_k, const void* user_hidden, const void* item_weight,
                                      const void* out_weight, float out_bias, float softmax_scale, int64_t activation,
                                      float lse_weight, float lse_floor, float* scores, int64_t bfloat, int64_t width,
                                      int64_t hidden, void* stream, int64_t stages, int64_t tiles_per_block) {
  const ScoreCandidates problem{
      candidate_ids, users,       candidates, items,    row_scale,     num_items,
      item_stride,   keys,        values,     num_keys, cu_seqlens,    bias_k,
      user_hidden,   item_weight, out_weight, out_bias, softmax_scale, static_cast<HeadActivation>(activation),
      lse_weight,    lse_floor,   scores};
  const ScorePlan plan{static_cast<int>(stages), static_cast<int>(tiles_per_block)};
  score_candidates(problem, bfloat != 0, static_cast<int>(width), static_cast<int>(hidden), stream,
                   stages == 0 ? nullptr : &plan);
}

GRANK_ENTRY emulated_candidate_cross_attention(int64_t users, int64_t heads, const void* q, const int64_t* cu_seqlens_q,
                                               int64_t queries_per_user, int64_t num_queries, int64_t shared_queries,
                                               const void* k, const void* v, const int64_t* cu_seqlens_k,
                                               const int64_t* seqused_k, int64_t keys_per_user, int64_t num_keys,
                                               const float* bias_k, float softmax_scale, int64_t activation, void* out,
                                               float* lse, int64_t bfloat, int64_t width, void* stream) {
  const CandidateCrossAttention problem{users,
                                        heads,
                                        q,
                                        cu_seqlens_q,
                                        queries_per_user,
                                        num_queries,
                                        shared_queries != 0,
                                        k,
                                        v,
                                        cu_seqlens_k,
                                        seqused_k,
                                        keys_per_user,
                                        num_keys,
                                        bias_k,
                                        softmax_scale,
                                        static_cast<AttentionActivation>(activation),
                                        out,
                                        lse};
  candidate_cross_attention(problem, bfloat != 0, static_cast<int>(width), stream);
}

GRANK_ENTRY emulated_candidate_cross_attention_backward(
    int64_t users, int64_t heads, const void* q, const int64_t* cu_seqlens_q, int64_t queries_per_user,
    int64_t num_queries, int64_t shared_queries, const void* k, const void* v, const int64_t* cu_seqlens_k,
    const int64_t* seqused_k, int64_t keys_per_user, int64_t num_keys, const float* bias_k, float softmax_scale,
    int64_t activation, void* out, float* lse, const void* grad_out, const float* grad_lse, float* delta, void* grad_q,
    void* grad_k, void* grad_v, float* grad_bias, int64_t bfloat, int64_t width, void* stream) {
  const CandidateCrossAttention problem{users,
                                        heads,
                                        q,
                                        cu_seqlens_q,
                                        queries_per_user,
                                        num_queries,
                                        shared_queries != 0,
                                        k,
                                        v,
                                        cu_seqlens_k,
                                        seqused_k,
                                        keys_per_user,
                                        num_keys,
                                        bias_k,
                                        softmax_scale,
                                        static_cast<AttentionActivation>(activation),
                                        out,
                                        lse};
  const CandidateCrossAttentionGradients gradients{grad_out, grad_lse, delta, grad_q, grad_k, grad_v, grad_bias};
  candidate_cross_attention_backward(problem, gradients, bfloat != 0, static_cast<int>(width), stream);
}

}  // namespace grank::cuda
