// Scores of every user's candidates: single-head attention to the user's history, then a hidden layer. See
// score_candidates.cuh for the kernel.
#pragma once

#include <cstdint>

namespace grank::cuda {

enum class HeadActivation { kRelu, kSilu, kGelu };

// Device pointers. Rows of keys, values and weights are contiguous. All but ids, offsets, scales and scores are 16-byte
// aligned.
// `element` below is float16 or bfloat16.
struct ScoreCandidates {
  const int64_t* candidate_ids;  // (users, candidates); outside [0, num_items): the score is -infinity
  int64_t users;
  int64_t candidates;
  const void* items;       // (num_items, width) of element, or of int8
  const float* row_scale;  // (num_items,) of int8 items, else null
  int64_t num_items;
  int64_t item_stride;        // bytes between rows, a multiple of 16
  const void* keys;           // (num_keys, width) of element
  const void* values;         // (num_keys, hidden) of element; without a head null
  int64_t num_keys;           // below 2^31 - 64
  const int64_t* cu_seqlens;  // (users + 1,)
  const float* bias_k;        // (num_keys,), added to every logit of a key; or null
  const void* user_hidden;    // (users, hidden) of element; without a head null
  const void* item_weight;    // (width, hidden) of element; without a head null
  const void* out_weight;     // (hidden,) of element; without a head null
  float out_bias;
  float softmax_scale;
  HeadActivation activation;
  float lse_weight;  // 0: there is no term of the log-sum-exp
  float lse_floor;   // below infinity
  float* scores;     // (users, candidates)
};

// How a launch is divided into blocks.
struct ScorePlan {
  int stages;           // tiles of keys and values in shared memory
  int tiles_per_block;  // tiles of 64 candidates that a block scores sequentially
};

// Enqueues the kernel; width and hidden are 16, 32, 64 or 128. A plan changes the run time only;
// null: chosen from the shapes. Does not allocate or synchronise. Throws std::invalid_argument for other widths and
// for more blocks than a grid takes, std::runtime_error if the launch fails.
void score_candidates(const ScoreCandidates& problem, bool bfloat, int width, int hidden, void* stream,
                      const ScorePlan* plan = nullptr);

}  // namespace grank::cuda
