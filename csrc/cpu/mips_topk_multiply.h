// Multiplies a tile with queries, compares the scores with the queries' bounds and emits those that reach them.
// Register block: kQueries queries x kVectorsAtOnce vectors of rows. The small-batch path multiplies the transposed
// registers and writes no panel. Included by mips_topk_kernel.cpp only.
#pragma once

#include <type_traits>

#include "mips_topk_transpose.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kRowsAtOnce = kVectorsAtOnce * kLanes;

// Products and scores of float rows. Int8Products has the same interface.
struct FloatProducts {
  using Sum = Floats;

  template <int kQueries>
  [[gnu::always_inline]] static void sum(const uint32_t* panel, const uint32_t* packed, int64_t d,
                                         Prefetcher& prefetcher, Sum (&sums)[kQueries][kVectorsAtOnce]) {
    const float* queries = reinterpret_cast<const float*>(packed);
    Floats totals[kQueries][kVectorsAtOnce];  // used with more than one segment only
    for (int64_t begin = 0; begin == 0 || begin < d; begin += kSegment) {
      const int64_t end = d - begin < kSegment ? d : begin + kSegment;
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kVectorsAtOnce; ++v) {
          if (begin > 0) totals[q][v] = begin > kSegment ? totals[q][v] + sums[q][v] : sums[q][v];
          sums[q][v] = Floats{};
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        prefetcher.fetch<2, 2>();
        Floats rows[kVectorsAtOnce];
        for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = load<Floats>(panel + j * kTileRows + v * kLanes);
        for (int q = 0; q < kQueries; ++q) {
          const Floats query = broadcast<Floats>(queries[j * kQueryBlock + q]);
          for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = multiply_add(query, rows[v], sums[q][v]);
        }
      }
    }
    if (d > kSegment) {
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = totals[q][v] + sums[q][v];
      }
    }
  }

  // Small-batch path: the same sums for kRowsOfSquare rows from `first`, into sums[..][vector ..], straight from the
  // transposed registers.
  template <DType kType, bool kListed, bool kPairs, int kQueries>
  [[gnu::always_inline]] static void sum_small_batch(const MipsTopkTile& tile, int first, const uint32_t* packed,
                                                     int64_t d, Prefetcher& prefetcher, int vector,
                                                     Sum (&sums)[kQueries][kVectorsAtOnce]) {
    const float* queries = reinterpret_cast<const float*>(packed);
    constexpr int kVectors = kRowsOfSquare<kType, kPairs> / kLanes;
    for (int64_t begin = 0; begin == 0 || begin < d; begin += kSegment) {
      const int64_t end = d - begin < kSegment ? d : begin + kSegment;
      Floats partial[kQueries][kVectors] = {};
      transpose_rows<kType, kListed, kPairs>(
          tile, first, begin, end, prefetcher, [&](int64_t unit, int v, Units values) {
#pragma GCC unroll 16
            for (int q = 0; q < kQueries; ++q) {
              const float query = queries[(q / kQueryBlock * d + unit) * kQueryBlock + q % kQueryBlock];
              partial[q][v] = multiply_add(broadcast<Floats>(query), (Floats)values, partial[q][v]);
            }
          });
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kVectors; ++v) {
          Sum& sum = sums[q][vector + v];
          sum = begin == 0 ? partial[q][v] : sum + partial[q][v];
        }
      }
    }
  }

  static Floats row_scale(const MipsTopkTile&, int) { return Floats{}; }
  static Floats compared(Floats sum, Floats) { return sum; }
  static Floats score(Floats sum, Floats, const MipsTopkQueries&, int64_t) { return sum; }
};

struct Int8Products {
  using Sum = Ints;

  template <int kQueries>
  [[gnu::always_inline]] static void sum(const uint32_t* panel, const uint32_t* packed, int64_t d,
                                         Prefetcher& prefetcher, Sum (&sums)[kQueries][kVectorsAtOnce]) {
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = (Ints)broadcast<Units>(packed[q]);
    }
    packed += kQueryBlock;
    const int64_t units = units_of(DType::kInt8, d);
    for (int64_t unit = 0; unit < units; ++unit) {
      prefetcher.fetch<2, 2>();
      Units rows[kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = load<Units>(panel + unit * kTileRows + v * kLanes);
      for (int q = 0; q < kQueries; ++q) {
        const Units query = broadcast<Units>(packed[unit * kQueryBlock + q]);
        for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = dot(sums[q][v], rows[v], query);
      }
    }
  }

  template <DType kType, bool kListed, bool, int kQueries>
  [[gnu::always_inline]] static void sum_small_batch(const MipsTopkTile& tile, int first, const uint32_t* packed,
                                                     int64_t d, Prefetcher& prefetcher, int vector,
                                                     Sum (&sums)[kQueries][kVectorsAtOnce]) {
    static_assert(!kAmx || kQueries == 1, "AMX packs queries in tiles");
    constexpr int kStep = kAmx ? 1 : kQueryBlock;  // between packed units of a query
    const int64_t block_units = kQueryBlock * packed_units(DType::kInt8, d);
    const uint32_t* units = kAmx ? packed : packed + kQueryBlock;
    Ints sums_of_vector[kQueries];
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      sums_of_vector[q] = (Ints)broadcast<Units>(kAmx ? compensation_of(reinterpret_cast<const int8_t*>(packed), d)
                                                      : packed[q / kQueryBlock * block_units + q % kQueryBlock]);
    }
    transpose_rows<kType, kListed>(tile, first, 0, d, prefetcher, [&](int64_t unit, int, Units values) {
      const Units flipped = values ^ kFlipInt8;
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        const uint32_t query = units[q / kQueryBlock * block_units + unit * kStep + q % kQueryBlock];
        sums_of_vector[q] = dot(sums_of_vector[q], flipped, broadcast<Units>(query));
      }
    });
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) sums[q][vector] = sums_of_vector[q];
  }

  static Floats row_scale(const MipsTopkTile& tile, int row) { return load<Floats>(tile.row_scale + row); }
  static Floats compared(Ints sum, Floats scale) { return __builtin_convertvector(sum, Floats) * scale; }
  static Floats score(Ints sum, Floats scale, const MipsTopkQueries& queries, int64_t query) {
    return __builtin_convertvector(sum, Floats) * (queries.scale[query] * scale);
  }
};

// Compares the sums of kQueries queries from `first` and kRowsAtOnce rows from `row`; emits those that reach the
// bounds. !kAll: the batch may end before first + kQueries.
template <typename Products, int kQueries, bool kAll = true>
[[gnu::always_inline]] inline void emit_wanted(const typename Products::Sum (&sums)[kQueries][kVectorsAtOnce],
                                               const MipsTopkTile& tile, const MipsTopkQueries& queries, int64_t first,
                                               int row, MipsTopkEmit emit, void* context) {
  Floats scale[kVectorsAtOnce];
  for (int v = 0; v < kVectorsAtOnce; ++v) scale[v] = Products::row_scale(tile, row + v * kLanes);
  alignas(64) float scores[kQueries][kRowsAtOnce];
  uint64_t passed[kQueries];
  unsigned hits = 0;  // one bit per query; emit() is called after the last use of `sums`, whose registers it clobbers
#pragma GCC unroll 8  // else the sums spill to memory
  for (int q = 0; q < kQueries; ++q) {
    if (!kAll && first + q >= queries.count) break;
    const Floats bound = broadcast<Floats>(queries.bounds[first + q]);
    Floats largest = Products::compared(sums[q][0], scale[0]);
    for (int v = 1; v < kVectorsAtOnce; ++v) largest = larger(largest, Products::compared(sums[q][v], scale[v]));
    if (__builtin_expect(at_least(largest, bound) == 0, 1)) continue;
    uint64_t reached = 0;
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      store(&scores[q][v * kLanes], Products::score(sums[q][v], scale[v], queries, first + q));
      reached |= at_least(Products::compared(sums[q][v], scale[v]), bound) << v * kLanes;
    }
    passed[q] = reached;
    hits |= 1u << q;
  }
  for (; hits != 0; hits &= hits - 1) {
    const int q = __builtin_ctz(hits);
    const uint64_t rows = passed[q] & tile.valid >> row;
    if (rows != 0) queries.bounds[first + q] = emit(context, first + q, row, scores[q], rows);
  }
}

// Multiplies blocks of kQueries queries from `first` with a packed tile. Returns the first query of the rest.
template <typename Products, int kQueries>
int64_t scan_queries(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, int64_t first,
                     const uint32_t* panel, Prefetcher& shared_prefetcher, MipsTopkEmit emit, void* context) {
  Prefetcher prefetcher = shared_prefetcher;  // in registers
  const int64_t one_query = packed_units(dtype, d);
  for (; first + kQueries <= queries.count; first += kQueries) {
    const uint32_t* packed = static_cast<const uint32_t*>(queries.packed) + first * one_query;
    for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
      typename Products::Sum sums[kQueries][kVectorsAtOnce];
      Products::template sum<kQueries>(panel + row, packed, d, prefetcher, sums);
      emit_wanted<Products, kQueries>(sums, tile, queries, first, row, emit, context);
    }
  }
  shared_prefetcher = prefetcher;
  return first;
}

template <typename Products>
void scan_packed(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries,
                 const uint32_t* panel, Prefetcher prefetcher, MipsTopkEmit emit, void* context) {
  const int64_t first =
      scan_queries<Products, kQueryBlock>(dtype, d, tile, queries, 0, panel, prefetcher, emit, context);
  static_assert(kQueryBlock == 6, "one case for every smaller block");
  switch (queries.count - first) {
    case 1:
      scan_queries<Products, 1>(dtype, d, tile, queries, first, panel, prefetcher, emit, context);
      break;
    case 2:
      scan_queries<Products, 2>(dtype, d, tile, queries, first, panel, prefetcher, emit, context);
      break;
    case 3:
      scan_queries<Products, 3>(dtype, d, tile, queries, first, panel, prefetcher, emit, context);
      break;
    case 4:
      scan_queries<Products, 4>(dtype, d, tile, queries, first, panel, prefetcher, emit, context);
      break;
    case 5:
      scan_queries<Products, 5>(dtype, d, tile, queries, first, panel, prefetcher, emit, context);
      break;
  }
}

// Small-batch path for at most kQueries queries.
template <typename Products, DType kType, bool kListed, int kQueries>
void scan_small_batch(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Prefetcher prefetcher,
                      MipsTopkEmit emit, void* context) {
  constexpr bool kPairs = element_bytes(kType) == 2 && kQueries > kQueryBlock;  // halves the accumulators per square
  const auto* packed = static_cast<const uint32_t*>(queries.packed);
  for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
    typename Products::Sum sums[kQueries][kVectorsAtOnce];
    for (int v = 0; v < kVectorsAtOnce; v += kRowsOfSquare<kType, kPairs> / kLanes) {
      Products::template sum_small_batch<kType, kListed, kPairs>(tile, row + v * kLanes, packed, d, prefetcher, v,
                                                                 sums);
    }
    emit_wanted<Products, kQueries, false>(sums, tile, queries, 0, row, emit, context);
  }
}

template <typename Products, DType kType, int kQueries>
void scan_small_batch(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Prefetcher prefetcher,
                      MipsTopkEmit emit, void* context) {
  tile.list != nullptr
      ? scan_small_batch<Products, kType, true, kQueries>(d, tile, queries, prefetcher, emit, context)
      : scan_small_batch<Products, kType, false, kQueries>(d, tile, queries, prefetcher, emit, context);
}

// Largest batch for which multiplying straight from the transposed registers beats packing a panel.
constexpr int max_small_batch(DType dtype) {
  if (dtype == DType::kInt8) return kAmx ? 1 : kLanes == 16 ? 6 : kLanes == 8 ? 2 : 1;
  return kLanes == 16 ? 16 : kLanes == 8 || dtype == DType::kFloat32 ? 4 : 1;
}

// Dispatches to the smallest compiled batch size that holds the queries: 1, 2, 4, 6, 12 or 16. (pack_queries pads to
// whole blocks, so the extra queries are zeros.)
template <typename Products, DType kType, int kQueries>
void scan_at_least(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Prefetcher prefetcher,
                   MipsTopkEmit emit, void* context) {
  if constexpr (kQueries < max_small_batch(kType)) {
    constexpr int kMore = kQueries == 4 ? 6 : kQueries == 12 ? 16 : 2 * kQueries;
    if (queries.count > kQueries) {
      return scan_at_least<Products, kType, kMore>(d, tile, queries, prefetcher, emit, context);
    }
  }
  scan_small_batch<Products, kType, kQueries>(d, tile, queries, prefetcher, emit, context);
}

}  // namespace
}  // namespace GRANK_ISA
}  // namespace grank
