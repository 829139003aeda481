// Attention of every candidate to its own user's history, forward and backward. The kernels:
// candidate_cross_attention.cuh and candidate_cross_attention_backward.cuh.
#pragma once

#include <cstdint>

namespace grank::cuda {

enum class AttentionActivation { kSoftmax, kSilu };

// Device pointers; rows 16-byte aligned, heads and width contiguous within a row. A row of a tensor holds `heads` times
// `width` elements, float16 or bfloat16. Offsets and lengths are clamped to valid values.
struct CandidateCrossAttention {
  int64_t users;
  int64_t heads;
  // Queries of user b: with offsets rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of num_queries, else `per_user` each.
  const void* q;
  const int64_t* cu_seqlens_q;  // (users + 1,) or null
  int64_t queries_per_user;     // without offsets
  int64_t num_queries;          // of all users, below 2^31 - 64
  bool shared_queries;          // without offsets: q holds the queries of one user, which all users share
  // Keys and values, likewise; v and out are null where only lse is wanted, for softmax only. seqused_k is the number
  // of valid rows among keys_per_user.
  const void* k;
  const void* v;
  const int64_t* cu_seqlens_k;  // (users + 1,) or null
  const int64_t* seqused_k;     // (users,) or null
  int64_t keys_per_user;
  int64_t num_keys;     // below 2^31 - 64
  const float* bias_k;  // (num_keys, heads) or null
  float softmax_scale;
  AttentionActivation activation;
  void* out;   // like q, but never shared
  float* lse;  // (num_queries, heads); softmax only
};

// Further pointers of the backward pass, which reads `out` and `lse`.
struct CandidateCrossAttentionGradients {
  const void* grad_out;
  const float* grad_lse;  // (num_queries, heads); softmax only. Null: zeros
  float* delta;           // (num_queries, heads) work space; softmax only
  void* grad_q;           // like out
  void* grad_k;           // like k
  void* grad_v;           // like v; grad_out and grad_v are null where v is
  float* grad_bias;       // like bias_k, or null
};

// Enqueue the kernels; width is 16, 32, 64 or 128. Do not allocate or synchronise. Rows of no user are not written.
// Throw std::invalid_argument for other widths and for more blocks than a grid takes, std::runtime_error if a
// launch fails.
void candidate_cross_attention(const CandidateCrossAttention& problem, bool bfloat, int width, void* stream);
void candidate_cross_attention_backward(const CandidateCrossAttention& problem,
                                        const CandidateCrossAttentionGradients& gradients, bool bfloat, int width,
                                        void* stream);

}  // namespace grank::cuda
