// The part of score_candidates that is compiled once per instruction set.
//
//   s = softmax_scale e K^T + bias, a = softmax(s), hidden = a V + e item_weight + user_hidden[b],
//   score = out_weight act(hidden) + out_bias + lse_weight log(exp(lse_floor) + sum exp(s))
//
// for every user b and candidate c, e = scale[id] rows[id]; K (L, d) and V (L, h) are the user's rows of keys and
// values.
//
// A step is one user and kGroup tiles of 64 candidates, whose rows are gathered and transposed once. Then the user's
// keys and values, kKeys at a time, meet one tile after the other: logits (keys, 64) in the first-level cache, online
// softmax (attention_tile.h), weighted sum into (h, 64). The head stands at the end, so that neither C x d nor C x L
// numbers are ever written to memory. Candidates lie in the lanes: a score depends on its candidate and user alone, bit
// for bit, and has the same bits on every instruction set with FMA, but for AMX and, of bfloat16 numbers, AVX512-BF16.
// (The hidden layer adds e item_weight to the attended part and user_hidden; the head sums h ascending.) Products and
// accumulators: tile_product.h.
// An int8 row's scale is multiplied into its logits' scale and its share of the hidden layer.
//
// Work: 2 C L (d + h) + 2 C d h operations and C L exponentials a user; bytes read: C d of the table, and for every
// step L (d + h) of keys and values, from the second-level cache. Memory: 4 (64 kGroup (d + h) + kKeys (d + 2 h + 128)
// + 64 d) bytes a thread and 8 d h for item_weight, half as much again where float32 has three parts: measured 1.5 MB
// for float32 and 0.5 MB for bfloat16 with AMX, two threads, d = h = 128.
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
  DType dtype;  // of keys, values and item_weight; not int8
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
  // item_weight as the products take it.
  int64_t (*weight_bytes)(const ScoreCandidatesProblem& problem);
  void (*prepare_weight)(const ScoreCandidatesProblem& problem, void* weight);
  // What a thread needs for a step, from a boundary of 64 bytes on.
  int64_t (*scratch_bytes)(const ScoreCandidatesProblem& problem);
  // The scores of one user's candidates [first, first + count), count up to candidates_a_step.
  void (*run_step)(const ScoreCandidatesProblem& problem, const void* weight, int64_t user, int64_t first,
                   int64_t count, void* scratch);
};

}  // namespace grank
