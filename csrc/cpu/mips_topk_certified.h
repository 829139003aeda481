// The k best rows of a float table for every query, found with its certified int8 copy: the result of mips_topk, bit
// for bit. grank_kernels/table/quantise.py has the inequality and its proof:
//
//   |score[b, i] - coarse[b, i]| <= radius[b] * error[i],     coarse[b, i] the int8 score of the copies
//
//   1. Threshold. The k-th largest of coarse - radius * error over some eligible rows is below the k-th best score.
//   2. Scan of the copy. Every row with coarse + radius * error at or above the threshold is a candidate; a full buffer
//      raises the threshold and drops what it rules out. One compare a score, with the largest error of 2048 rows; the
//      rest is done of what passes.
//   3. Rescoring. The candidates of a query are searched as mips_topk searches a table, by the same kernel, hence the
//      same bits: 2 to 3 k rows of Gaussian tables are read.
//
// A query to which the bound does not apply, or of which it rules out too little (more candidates than fit), is
// searched in the whole table by mips_topk; so are all if k is above num_rows / 32. Memory: 12 (4 (k + excluded ids, up
// to 4096) + 1024) bytes a query, 104 bytes a query and thread, and what mips_topk takes of one query a thread.
#pragma once

#include <cstdint>

#include "mips_topk.h"

namespace grank {

struct CoarseRows {
  const float* queries;  // (num_queries, d): the queries in the basis of the copy
  const void* rows;      // (num_rows, d) int8
  int64_t row_stride;    // bytes
  const float* scale;    // (num_rows,)
  const float* error;    // (num_rows,), not negative, not NaN
};

// rescored: (num_queries,), how many rows of the table itself were read for each query. d is at most kMaxInt8Width.
// Throws std::bad_alloc.
void mips_topk_certified(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, int64_t* rescored);

}  // namespace grank
