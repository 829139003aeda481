// The part of mips_topk that is compiled once per instruction set: pack a tile of rows, multiply, compare.
//
//   score[b, i] = sum_j queries[b, j] * rows[i, j]               float32, float16, bfloat16 rows
//   score[b, i] = float(sum_j q8[b, j] * x8[i, j]) * (query_scale[b] * row_scale[i])              int8
//
// Lanes are rows, so the order of accumulation is the same for every register width: float32 fused multiply-adds over
// j ascending from zero in segments of kSegment, the segments' sums added in order. (The baseline has no FMA: a
// multiplication and an addition, each rounded.) int8 sums are exact in int32 for d <= kMaxInt8Width: 127^2 d < 2^31.
//
// A tile is kTileRows rows. Packing transposes it into `panel`, one 32-bit unit (a float, or four int8) of every row after
// the other, which stays in the first-level cache while all queries pass over it: a row is read from memory once a call.
// Registers: 6 queries x 4 vectors of 16 accumulators with 32 registers, 6 x 2 with 16.
// Per tile: 64 d sizeof(row element) bytes read, 64 d num_queries multiply-adds, one compare a score.
#pragma once

#include <cstdint>

namespace grank {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3 };

constexpr int kTileRows = 64;       // one bit of a 64-bit mask each
constexpr int kSegment = 128;       // dimensions summed before the partial sum is added to the total
constexpr int kQueryBlock = 6;      // queries multiplied together; packed queries are interleaved in such blocks
constexpr int64_t kMaxInt8Width = 131072;

struct MipsTopkTile {
  const void* rows[kTileRows];    // all valid addresses; past the last row of a short tile the last one again
  float row_scale[kTileRows];     // int8 only
  uint64_t valid;                 // bit i: rows[i] counts
  uint32_t first_row;             // position of rows[0]; positions ascend with i
  int64_t prefetch;               // bytes from a row to the same place of the tile that comes next
};

struct MipsTopkQueries {
  const void* packed;             // as pack_queries laid them out
  const float* scale;             // int8 only
  int64_t count;
  // A lower bound of each query's k-th best, packed as MipsTopkKey (mips_topk.cpp); other threads raise it meanwhile.
  const uint64_t* thresholds;
};

// Called for a query when bits of `passed` mark rows whose score reaches its threshold; scores[i] belongs to rows[i].
using MipsTopkEmit = void (*)(void* context, int64_t query, const float* scores, uint64_t passed);

struct MipsTopkKernel {
  // Bytes of `panel` for rows of width d, and of packed queries.
  int64_t (*panel_bytes)(DType dtype, int64_t d);
  int64_t (*queries_bytes)(DType dtype, int64_t count, int64_t d);
  // queries (count, d), row-major: float32, or int8 for int8 rows.
  void (*pack_queries)(DType dtype, const void* queries, int64_t count, int64_t d, void* packed);
  void (*scan_tile)(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
                    MipsTopkEmit emit, void* context);
};

// Scores as integers of the same order, and back. -0.0 must have been made +0.0 before; NaN has no place.
inline uint32_t ordered_bits(float score) {
  uint32_t bits;
  __builtin_memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float score_of(uint32_t ordered) {
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

}  // namespace grank
