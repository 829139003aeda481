// The kernel of score_candidates, compiled once per instruction set. For user b and candidate c:
//
//   e      = scale[id] rows[id]
//   s      = softmax_scale e K^T + bias                         K (L, d), V (L, h): the user's keys and values
//   a      = softmax(s)
//   hidden = a V + e item_weight + user_hidden[b]
//   score  = out_weight act(hidden) + out_bias + lse_weight log(exp(lse_floor) + sum exp(s))
//
// A step is one user and kGroup tiles of 64 candidates, gathered and transposed once. For each block of kKeys keys and
// each tile: logits (kKeys, 64) in the L1 cache, online softmax (attention_tile.h), weighted sum into (h, 64). Then the
// head. Neither C x d nor C x L numbers are written to memory. Candidates lie in the vector lanes, so a score's bits
// depend on its candidate and user alone; they are the same on every instruction set with FMA, except AMX, and AVX-512
// BF16 for bfloat16. Summation order: tile_product.h; the head sums h ascending. The scale of an int8 row is folded
// into the scale of its logits and of e item_weight.
//
// Work per user: 2 C L (d + h) + 2 C d h operations and C L exponentials. Bytes read: C d of the table, and per step
// L (d + h) of keys and values from the L2 cache. Memory: per thread 4 (64 kGroup (d + h) + kKeys (d + 2 h + 128) +
// 64 d) bytes, and 8 d h for item_weight; 1.5 times that for float32 in three parts. Measured with AMX, two threads,
// d = h = 128: 1.5 MB for float32, 0.5 MB for bfloat16.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace grank {

enum class HeadActivation : int { kRelu = 0, kSilu = 1, kGelu = 2 };  // gelu: the exact one, with erf

struct ScoreCandidatesProblem {
  const int64_t* candidate_ids;  // (num_users, num_candidates), below num_rows; negative: the score is -infinity
  int64_t num_users;
  int64_t num_candidates;
  // The table: (num_rows, d), the last dimension contiguous; fewer than 2^32 rows.
  const void* rows;
  DType rows_dtype;
  int64_t num_rows;
  int64_t d;
  int64_t row_stride;      // bytes
  const float* row_scale;  // (num_rows,), int8 only
  // Histories: the last dimension contiguous; user b has the rows [cu_seqlens[b], cu_seqlens[b + 1]).
  DType dtype;  // dtype of keys, values and item_weight; not int8
  const void* keys;
  int64_t key_stride;  // bytes
  const void* values;
  int64_t value_stride;  // bytes
  int64_t h;             // 0: no head, its pointers are null
  const int64_t* cu_seqlens;
  const float* bias;  // by key; or null
  // The head.
  const float* user_hidden;  // (num_users, h)
  const void* item_weight;   // (d, h)
  const float* out_weight;   // (h,)
  float out_bias;
  float softmax_scale;
  HeadActivation activation;
  float lse_weight;  // 0: no such term
  float lse_floor;   // below infinity
  int threads;
  float* scores;  // (num_users, num_candidates)
};

struct ScoreCandidatesKernel {
  int64_t candidates_a_step;
  // Converts item_weight to the layout of the products, once per call.
  int64_t (*weight_bytes)(const ScoreCandidatesProblem& problem);
  void (*prepare_weight)(const ScoreCandidatesProblem& problem, void* weight);
  // Scratch memory per thread, 64-byte aligned.
  int64_t (*scratch_bytes)(const ScoreCandidatesProblem& problem);
  // Scores the candidates [first, first + count) of a user, count <= candidates_a_step.
  void (*run_step)(const ScoreCandidatesProblem& problem, const void* weight, int64_t user, int64_t first,
                   int64_t count, void* scratch);
};

}  // namespace grank
