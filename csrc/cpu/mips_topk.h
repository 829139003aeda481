// The k best rows of a table for every query: threshold, emit, finish.
//
// 1. Threshold. Score a sample of the rows and take its r-th best, so that with probability > 1 - 1e-5 at least k rows
//    of the table beat it (row_scan.h: sample_of). Any lower bound of the k-th best is valid.
// 2. Scan and emit. Tile by tile inner products, one compare a score; what reaches the threshold goes into the query's
//    reservoir. A full reservoir keeps its k best, and the worst of them is the new threshold for all threads.
// 3. Finish. Fewer than k and a sampled threshold: scan again without it. Then select and sort by (score, id).
//
// The result does not depend on the thresholds, hence neither on threads nor on their timing.
// Memory: 8 (k + max(k, 64)) + 4 d bytes a query (a fifth of that for int8), 72 bytes a query and thread, and for every
// thread 64 packed rows and one reservoir more; where queries have masks of their own, num_rows / 8 bytes a thread, 4
// MB at most.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace grank {

struct MipsTopkProblem {
  // Queries: (num_queries, d) float32, contiguous. int8 rows quantise them as api documents: s = max|q| / 127.
  const float* queries;
  int64_t num_queries;
  // Items: (num_rows, d), the last dimension contiguous.
  const void* rows;
  DType dtype;
  int64_t num_rows;  // below 2^32
  int64_t d;
  int64_t row_stride;      // bytes
  const float* row_scale;  // (num_rows,), int8 only
  const int64_t* ids;      // (num_rows,) external ids, unique; null: the positions are the ids
  // Rows never to return: those of query b stand at exclude_ids[exclude_offsets[b] .. exclude_offsets[b + 1]); -1 is no
  // id.
  const int64_t* exclude_offsets;  // (num_queries + 1,) or null
  const int64_t* exclude_ids;
  // Eligible rows: allow[b * allow_stride + i]; allow_stride 0: the same for all queries. Null: all.
  const bool* allow;
  int64_t allow_stride;
  int64_t k;  // 1 or more
  int threads;
  // Outputs, (num_queries, k): scores descending, equal scores by ascending id; -infinity and -1 where rows run out.
  float* values;
  int64_t* positions;
};

// Throws std::bad_alloc, and may have written to the outputs then.
void mips_topk(const MipsTopkProblem& problem, const Isa& isa);

// The same of the rows list[0 .. count) alone, all of them different.
void mips_topk_of_rows(const MipsTopkProblem& problem, const Isa& isa, const uint32_t* list, int64_t count);

// Answers the queries of which a mask of their own leaves at most a 32nd of the rows, each over these rows alone:
// gathering them takes less than the query's share of a scan of all, and a scan would meet few eligible rows above its
// thresholds. Returns which are answered; empty: none.
std::vector<char> mips_topk_of_few(const MipsTopkProblem& problem, const Isa& isa);

}  // namespace grank
