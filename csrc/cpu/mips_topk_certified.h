// Exact top-k of a float table through its certified int8 copy: bit for bit the result of mips_topk. The bound, proved
// in grank_kernels/table/quantise.py:
//
//   |score[b, i] - coarse[b, i]| <= radius[b] * error[i],     coarse[b, i] the int8 score of the copies
//
//   1. Threshold. The k-th largest lower bound coarse - radius * error over any eligible rows is <= the k-th best
//   score.
//   2. Scan of the copy. Rows with an upper bound coarse + radius * error >= the threshold are candidates. A full
//      buffer raises the threshold, drops candidates below it, and grows if most remain. The kernel compares each score
//      once, with the largest error of 2048 rows; the row's own error is applied to the scores that pass.
//   3. Rescoring. mips_topk's kernel scores the candidates in the table, hence the same bits: 2 to 3 k rows of a
//      Gaussian table.
//
// Queries outside the range of the bound, and those for which rescoring would take longer than a full search, are
// searched by mips_topk as one batch. The number of candidates is estimated from the sample, before the scan, and
// limited during it. Small batches are bound by memory, so that one such query sends all of them to mips_topk. Memory:
// per query 12 (2 k + 256) bytes, 12 bytes per further candidate up to max(4 k + 1024, 2^24 / num_queries) candidates,
// per (query, thread) 104 bytes, and per thread the memory of mips_topk for one query.
#pragma once

#include <cstdint>

#include "mips_topk.h"

namespace grank {

struct CoarseRows {
  const float* queries;  // (num_queries, d), rotated into the basis of the copy
  const void* rows;      // (num_rows, d) int8
  int64_t row_stride;    // bytes
  const float* scale;    // (num_rows,)
  const float* error;    // (num_rows,), not negative, not NaN
};

// rescored: (num_queries,), number of table rows scored per query. d <= kMaxInt8Width.
// Throws std::bad_alloc.
void mips_topk_certified(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, int64_t* rescored);

}  // namespace grank
