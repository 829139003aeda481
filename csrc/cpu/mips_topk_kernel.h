// The kernel of mips_topk, compiled once per instruction set: packs a tile of rows, multiplies, compares.
//
//   score[b, i] = sum_j queries[b, j] * rows[i, j]               float32, float16, bfloat16 rows
//   score[b, i] = float(sum_j q8[b, j] * x8[i, j]) * (query_scale[b] * row_scale[i])              int8
//
// Rows lie in the vector lanes, so the accumulation order is the same for every register width: float32 fused
// multiply-adds over ascending j in segments of kSegment, each from zero, segment sums added in order. (The baseline
// has no FMA and rounds product and sum.) int8 sums are exact in int32 for d <= kMaxInt8Width: 127^2 d < 2^31.
//
// Packing transposes a tile of kTileRows rows into `panel`: a 32-bit unit (a float, or four int8) of each row, unit by
// unit. The panel stays in the L1 cache for all queries, so each row is read from memory once per call.
//
//   path         queries                                register block
//   small batch  32 registers: up to 16, int8 up to 6   multiplies the transposed registers, writes no panel
//   panel        others                                 6 queries x 4 vectors of 16 rows (16 registers: 6 x 2)
//   AMX int8     2 or more                              16 queries x 4 tiles of 16 rows (mips_topk_amx.h)
//
// Work per tile: 64 d sizeof(element) bytes read, 64 d num_queries multiply-adds, one comparison per score.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace grank {

constexpr int kTileRows = 64;         // one bit each of a 64-bit mask
constexpr int kSegment = 128;         // dimensions per partial sum
constexpr int kQueryBlock = 6;        // queries per register block; packed queries are interleaved in full blocks
constexpr int kQueriesMultiple = 48;  // a multiple of every kernel's query block: packed queries are split here
static_assert(kQueriesMultiple % kQueryBlock == 0, "splits fall between blocks");
constexpr int64_t kMaxInt8Width = 131072;

struct MipsTopkTile {
  const char* rows;        // row i is at rows + (list ? list[i] : i) * row_stride
  int64_t row_stride;      // bytes
  const uint32_t* list;    // kTileRows positions, or null
  const float* row_scale;  // (kTileRows,), int8 only
  uint64_t valid;          // bit i: row i may be emitted; all kTileRows rows are readable
};

struct MipsTopkQueries {
  const void* packed;  // written by pack_queries
  const float* scale;  // int8 only
  int64_t count;
  // Least score to emit. int8 rows: divided by the query's scale and lowered by the rounding error, for a comparison
  // with float(sum) * row_scale, one multiplication less per score.
  float* bounds;
};

// Called for a query with scores >= its bound: bit i of `passed` is set if scores[i], of row first + i of the tile, is.
// Returns the query's new bound.
using MipsTopkEmit = float (*)(void* context, int64_t query, int first, const float* scores, uint64_t passed);

// Scores that can be among the best: score + radius * row_error >= least, and of those equal to `least` ids <= `id`.
struct MipsTopkWanted {
  float least;
  float radius;
  const float* row_error;  // of the rows, or null: 0
  int64_t id;
  const int64_t* ids;  // of the rows, or null: equal scores are wanted whatever their ids
};

struct MipsTopkKernel {
  // Bytes of `panel` for rows of width d, and of `count` packed queries. Query n, a multiple of kQueriesMultiple,
  // begins at byte queries_bytes(n).
  int64_t (*panel_bytes)(DType dtype, int64_t d);
  int64_t (*queries_bytes)(DType dtype, int64_t count, int64_t d);
  // queries (count, d), row-major: float32, or int8 for int8 rows.
  void (*pack_queries)(DType dtype, const void* queries, int64_t count, int64_t d, void* packed);
  void (*scan_tile)(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
                    MipsTopkEmit emit, void* context);
  // Bit i: scores[i], one of those that MipsTopkEmit is given, is wanted.
  uint64_t (*wanted)(const float* scores, const MipsTopkWanted& wanted);
};

// Order-preserving map of floats to integers, and back; not for -0.0 and NaN.
inline uint32_t ordered_bits(float score) {
  uint32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float score_of_bits(uint32_t ordered) {
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

}  // namespace grank
