// The part of mips_topk that is compiled once per instruction set: pack a tile of rows, multiply, compare.
//
//   score[b, i] = sum_j queries[b, j] * rows[i, j]               float32, float16, bfloat16 rows
//   score[b, i] = float(sum_j q8[b, j] * x8[i, j]) * (query_scale[b] * row_scale[i])              int8
//
// Lanes are rows, so the order of accumulation is the same for every register width: float32 fused multiply-adds over
// j ascending from zero in segments of kSegment, the segments' sums added in order. (The baseline has no FMA: a
// multiplication and an addition, each rounded.) int8 sums are exact in int32 for d <= kMaxInt8Width: 127^2 d < 2^31.
//
// A tile is kTileRows rows. Packing transposes it into `panel`, one 32-bit unit (a float, or four int8) of every row
// after the other, which stays in the first-level cache while all queries pass over it: a row is read from memory once
// a call. For few queries what is transposed is multiplied at once and no panel is written; with 32 registers for up to
// 16 queries of float rows and 6 of int8. Registers of the others: 6 queries x 4 vectors of 16 accumulators with 32
// registers, 6 x 2 with 16. int8 with AMX: 16 queries x 4 tiles of 16 rows; 64 dimensions of them take 5 tile
// loads and 4 products (mips_topk_amx.h). Per tile: 64 d sizeof(row element) bytes read, 64 d num_queries
// multiply-adds, one compare a score.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace grank {

constexpr int kTileRows = 64;         // one bit of a 64-bit mask each
constexpr int kSegment = 128;         // dimensions summed before the partial sum is added to the total
constexpr int kQueryBlock = 6;        // queries multiplied together; packed ones are interleaved in full blocks
constexpr int kQueriesMultiple = 48;  // where packed queries may be cut: every kernel's block divides it
static_assert(kQueriesMultiple % kQueryBlock == 0, "or packed queries would be cut within a block");
constexpr int64_t kMaxInt8Width = 131072;

struct MipsTopkTile {
  const char* rows;        // row i stands at rows + (list ? list[i] : i) * row_stride
  int64_t row_stride;      // bytes
  const uint32_t* list;    // kTileRows positions, or null
  const float* row_scale;  // (kTileRows,), int8 only
  uint64_t valid;          // bit i: row i counts; all kTileRows can be read
};

struct MipsTopkQueries {
  const void* packed;  // as pack_queries laid them out
  const float* scale;  // int8 only
  int64_t count;
  // What a score must reach to be wanted. For int8 rows in units of the query's scale, and low enough for rounding: it
  // is compared with float(sum) * row_scale, which spares a multiplication a score.
  float* bounds;
};

// Called for a query when some of its scores reach its bound: bit i of `passed` stands for row first + i of the tile
// and scores[i]. Returns the query's bound from now on.
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
  // Bytes of `panel` for rows of width d, and of packed queries: those from number n on, a multiple of
  // kQueriesMultiple, begin at queries_bytes(n).
  int64_t (*panel_bytes)(DType dtype, int64_t d);
  int64_t (*queries_bytes)(DType dtype, int64_t count, int64_t d);
  // queries (count, d), row-major: float32, or int8 for int8 rows.
  void (*pack_queries)(DType dtype, const void* queries, int64_t count, int64_t d, void* packed);
  void (*scan_tile)(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
                    MipsTopkEmit emit, void* context);
  // Bit i: scores[i], one of those that MipsTopkEmit is given, is wanted.
  uint64_t (*wanted)(const float* scores, const MipsTopkWanted& wanted);
};

// Scores as integers of the same order, and back. -0.0 must have been made +0.0 before; NaN has no place.
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
