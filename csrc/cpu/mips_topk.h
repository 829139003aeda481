// Exact top-k of the inner products of each query with the rows of a table: threshold, emit, finish.
//
// 1. Threshold. Scores a row sample and takes its r-th best score; with probability > 1 - 1e-5 at least k rows of the
//    table are above it (row_scan.h: sample_of). Any lower bound of the k-th best score is a valid threshold.
// 2. Scan and emit. Computes inner products tile by tile, with one comparison per score; scores >= the threshold go to
//    the query's reservoir. A full reservoir keeps its k best, and the worst of these is the new threshold of all
//    threads.
// 3. Finish. With fewer than k candidates above a sampled threshold, scans again without it. Sorts by (score, id).
//
// The result does not depend on the thresholds, hence not on thread count or timing.
// Memory: per query 8 (k + max(k, 64)) + 4 d bytes (int8: a fifth of the 4 d), per (query, thread) 72 bytes, per thread
// 64 packed rows and one reservoir, and with per-query masks num_rows / 8 bytes, at most 4 MB.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace grank {

struct MipsTopkProblem {
  // Queries: (num_queries, d) float32, contiguous. Quantised for int8 rows (row_scan.h: quantise).
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
  // Excluded ids of query b: exclude_ids[exclude_offsets[b] .. exclude_offsets[b + 1]); -1 is padding.
  const int64_t* exclude_offsets;  // (num_queries + 1,) or null
  const int64_t* exclude_ids;
  // (num_queries,): index of query b in exclude_offsets, allow, values and positions; null: b.
  const int64_t* places;
  // Row mask: row i is eligible for query b if allow[b * allow_stride + i]; allow_stride 0: one mask for all queries.
  // Null: all rows.
  const bool* allow;
  int64_t allow_stride;
  int64_t k;  // 1 or more
  // (num_queries,): per query, a score that probably k rows reach, the initial threshold; null: from a sample.
  const float* floors;
  int threads;
  // Outputs, (num_queries, k): scores descending, ties by ascending id; padded with (-infinity, -1).
  float* values;
  int64_t* positions;

  int64_t place(int64_t query) const { return places != nullptr ? places[query] : query; }
};

// Throws std::bad_alloc; the outputs are then undefined.
void mips_topk(const MipsTopkProblem& problem, const Isa& isa);

// The same over the rows list[0 .. count) only, without duplicates.
void mips_topk_of_rows(const MipsTopkProblem& problem, const Isa& isa, const uint32_t* list, int64_t count);

// Answers the queries whose own mask allows at most 1/32 of the rows, by gathering these rows: cheaper than the query's
// share of a full scan, whose sampled threshold few eligible rows would reach. Returns a flag per query; empty: no
// query was answered.
std::vector<char> mips_topk_of_few(const MipsTopkProblem& problem, const Isa& isa);

}  // namespace grank
