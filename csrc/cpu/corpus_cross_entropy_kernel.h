// The parts of corpus_cross_entropy and its gradient that are compiled once per instruction set.
//
// With x = scale u e^T + bias, over the eligible items of a row other than its target:
//
//   forward   peak near the largest x, mass = sum exp(x - peak), pooled = sum exp(x - peak) e, and the target's x
//   backward  s = slope exp(x - shift - log_sum), at the target s = target_slope;  grad_items = scale s^T u,
//             grad_bias = the sum of s over rows
//
// A step has up to kGroup tiles of 64 rows in the lanes, users in the forward pass and items in the backward pass, and
// meets the other side kKeys rows at a time (tile_product.h). 2 products of R N d multiply-adds each; nothing of size R
// x N. A row of the result is summed by one step in the order of the other side, hence the same bits for any number of
// threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace grank {

struct CorpusCrossEntropyProblem {
  int64_t num_rows, num_items, d;
  DType dtype;  // of users, items and grad_items
  float scale;
  int threads;
  const char* users;
  int64_t user_stride;  // bytes
  const char* items;
  int64_t item_stride;
  const int64_t* targets;                                          // all in [0, num_items)
  const float* bias;                                               // or null
  const int64_t *exclude_offsets, *exclude_ids, *exclude_windows;  // ids ascending in a list; null where there are none
  // Forward only.
  float *at_target, *peak, *mass;
  float* pooled;  // (num_rows, d), or null
  // Backward only.
  const float *slope, *target_slope, *shift, *log_sum;
  char* grad_items;  // contiguous
  float* grad_bias;

  // The excluded ids of a row from `least` on, up to *end.
  const int64_t* excluded(int64_t row, int64_t least, const int64_t** end) const;
};

struct CorpusPass {
  int64_t most_rows_a_step;
  int64_t (*scratch_bytes)(const CorpusCrossEntropyProblem& problem);
  // Rows (forward) or items (backward) [first, first + count), count from 1 to most_rows_a_step.
  void (*run_step)(const CorpusCrossEntropyProblem& problem, int64_t first, int64_t count, void* scratch);
};

}  // namespace grank
