// The parts of candidate_cross_attention and its gradient that are compiled once per instruction set.
//
// For one user and head, x = softmax_scale q k^T + bias over the user's L keys:
//
//   forward         w = softmax(x), lse = log sum exp(x);  or w = silu(x) / L;  out = w v
//   grad_queries    dx = w (grad v^T - delta), delta = grad . out - grad_lse;  or dx = silu'(x) grad v^T / L;
//                   dq = scale dx k
//   grad_keys       dk = scale dx^T q,  dv = w^T grad,  dbias = the sum of dx over queries
//
// Backward recomputes x, and w = exp(x - lse). A pass has 64 rows in the lanes, queries in the first two and keys in
// the last, and meets the other side's rows kKeys at a time: products as tile_product.h has them, with dx and w
// between, in the first-level cache. 2, 3 and 4 products of 2 C L d operations each; 1, 2 and 2 of lse alone. Every row
// of a gradient is summed by one step, in the order of the other side's rows: no atomics, the same bits for any number
// of threads. No user's step reads another user's rows.
//
// Forward of softmax is the online softmax of attention_tile.h. Memory a thread: forward 4 (128 kGroup d + kKeys (3 d +
// 128) + 64 d) bytes, backward 4 (kKeys (4 d + 256) + 512 d), half as much again where float32 has three parts;
// backward two float32 a query and head for delta and excess. Nothing of size C x L.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace grank {

enum class AttentionActivation : int { kSoftmax = 0, kSilu = 1 };

// Which rows of a tensor are a user's: [offsets[b], offsets[b + 1]) of all, or the first `used[b]` or `length` of the
// user's own.
struct AttentionSequence {
  const int64_t* offsets;  // (num_users + 1,) or null
  const int64_t* used;     // (num_users,) or null
  int64_t length;

  int64_t begin(int64_t user) const { return offsets != nullptr ? offsets[user] : 0; }
  int64_t count(int64_t user) const {
    return offsets != nullptr ? offsets[user + 1] - offsets[user] : used != nullptr ? used[user] : length;
  }
};

// (users, rows, heads, ...), the last dimension contiguous. Strides in bytes; that of users is 0 where they share all
// rows. Null where there is none.
struct AttentionTensor {
  char* data;
  int64_t user_stride, row_stride, head_stride;

  char* at(int64_t user, int64_t row, int64_t head) const {
    return data + user * user_stride + row * row_stride + head * head_stride;
  }
};

struct CandidateCrossAttentionProblem {
  int64_t num_users;
  int64_t num_heads;
  int64_t d;
  DType dtype;  // of all that is not float32 below
  AttentionActivation activation;
  float softmax_scale;
  int threads;
  AttentionSequence queries, keys;
  bool lse_only;  // v, out and their gradients are null; softmax only
  AttentionTensor q, k, v;
  AttentionTensor bias;  // float32, by key; or null
  AttentionTensor out;
  AttentionTensor lse;  // float32, by query; null for silu
  // Backward only.
  AttentionTensor grad_out, grad_q, grad_k, grad_v;
  AttentionTensor grad_lse;   // float32, by query; null: zeros
  AttentionTensor grad_bias;  // float32; or null
  AttentionTensor delta;      // float32, by query: grad_queries writes it, grad_keys reads it; null for silu
  AttentionTensor excess;     // the same; log2 of the sum of the weights where lse is too large to hold it, else 0
};

struct AttentionPass {
  int64_t rows_a_step;  // queries or keys
  int64_t (*scratch_bytes)(
      const CandidateCrossAttentionProblem& problem);  // a thread's, from a boundary of 64 bytes on
  // The rows [first, first + count) of a user and head, count from 1 to rows_a_step.
  void (*run_step)(const CandidateCrossAttentionProblem& problem, int64_t user, int64_t head, int64_t first,
                   int64_t count, void* scratch);
};

}  // namespace grank
