// Multiplies a packed tile, compares the sums with the bounds of their queries and emits what reaches them: kQueries
// queries times kVectorsAtOnce vectors of rows, sums in registers. Small batches are multiplied while rows are
// transposed, without a panel. Included by mips_topk_kernel.cpp only.
#pragma once

#include <type_traits>

#include "mips_topk_transpose.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kRowsAtOnce = kVectorsAtOnce * kLanes;

// What a kind of row needs: the sums of some queries and rows, what is compared of a sum, and the score it makes.
struct FloatProducts {
  using Sum = Floats;

  template <int kQueries>
  [[gnu::always_inline]] static void sum(const uint32_t* panel, const uint32_t* packed, int64_t d, Ahead& ahead,
                                         Sum (&sums)[kQueries][kVectorsAtOnce]) {
    const float* queries = reinterpret_cast<const float*>(packed);
    Floats totals[kQueries][kVectorsAtOnce];  // touched only by rows of more than one segment
    for (int64_t begin = 0; begin == 0 || begin < d; begin += kSegment) {
      const int64_t end = d - begin < kSegment ? d : begin + kSegment;
      for (int q = 0; q < kQueries; ++q) {
        for (int v = 0; v < kVectorsAtOnce; ++v) {
          if (begin > 0) totals[q][v] = begin > kSegment ? totals[q][v] + sums[q][v] : sums[q][v];
          sums[q][v] = Floats{};
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        ahead.fetch<2, 2>();
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

  // The same sums for vectors `vector` and following of the rows of a tile, kRowsOfSquare of them, straight from the
  // transposition.
  template <DType kType, bool kListed, bool kPairs, int kQueries>
  [[gnu::always_inline]] static void sum_few(const MipsTopkTile& tile, int first, const uint32_t* packed, int64_t d,
                                             Ahead& ahead, int vector, Sum (&sums)[kQueries][kVectorsAtOnce]) {
    const float* queries = reinterpret_cast<const float*>(packed);
    constexpr int kVectors = kRowsOfSquare<kType, kPairs> / kLanes;
    for (int64_t begin = 0; begin == 0 || begin < d; begin += kSegment) {
      const int64_t end = d - begin < kSegment ? d : begin + kSegment;
      Floats partial[kQueries][kVectors] = {};
      transpose_rows<kType, kListed, kPairs>(tile, first, begin, end, ahead, [&](int64_t unit, int v, Units values) {
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
  [[gnu::always_inline]] static void sum(const uint32_t* panel, const uint32_t* packed, int64_t d, Ahead& ahead,
                                         Sum (&sums)[kQueries][kVectorsAtOnce]) {
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = (Ints)broadcast<Units>(packed[q]);
    }
    packed += kQueryBlock;
    const int64_t units = units_of(DType::kInt8, d);
    for (int64_t unit = 0; unit < units; ++unit) {
      ahead.fetch<2, 2>();
      Units rows[kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = load<Units>(panel + unit * kTileRows + v * kLanes);
      for (int q = 0; q < kQueries; ++q) {
        const Units query = broadcast<Units>(packed[unit * kQueryBlock + q]);
        for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = dot(sums[q][v], rows[v], query);
      }
    }
  }

  template <DType kType, bool kListed, bool, int kQueries>
  [[gnu::always_inline]] static void sum_few(const MipsTopkTile& tile, int first, const uint32_t* packed, int64_t d,
                                             Ahead& ahead, int vector, Sum (&sums)[kQueries][kVectorsAtOnce]) {
    static_assert(!kAmx || kQueries == 1, "those are packed in tiles");
    constexpr int kStep = kAmx ? 1 : kQueryBlock;  // of packed units of a query
    const int64_t block_units = kQueryBlock * packed_units(DType::kInt8, d);
    const uint32_t* units = kAmx ? packed : packed + kQueryBlock;
    Ints few[kQueries];
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) {
      few[q] = (Ints)broadcast<Units>(kAmx ? start_of(reinterpret_cast<const int8_t*>(packed), d)
                                           : packed[q / kQueryBlock * block_units + q % kQueryBlock]);
    }
    transpose_rows<kType, kListed>(tile, first, 0, d, ahead, [&](int64_t unit, int, Units values) {
      const Units flipped = values ^ kFlipInt8;
#pragma GCC unroll 16
      for (int q = 0; q < kQueries; ++q) {
        const uint32_t query = units[q / kQueryBlock * block_units + unit * kStep + q % kQueryBlock];
        few[q] = dot(few[q], flipped, broadcast<Units>(query));
      }
    });
#pragma GCC unroll 16
    for (int q = 0; q < kQueries; ++q) sums[q][vector] = few[q];
  }

  static Floats row_scale(const MipsTopkTile& tile, int row) { return load<Floats>(tile.row_scale + row); }
  static Floats compared(Ints sum, Floats scale) { return __builtin_convertvector(sum, Floats) * scale; }
  static Floats score(Ints sum, Floats scale, const MipsTopkQueries& queries, int64_t query) {
    return __builtin_convertvector(sum, Floats) * (queries.scale[query] * scale);
  }
};

// Compares the sums of kQueries queries, from `first` on, and of kRowsAtOnce rows, from `row` on. Emits what is wanted.
// Without kAll there may be fewer queries.
template <typename Products, int kQueries, bool kAll = true>
[[gnu::always_inline]] inline void emit_wanted(const typename Products::Sum (&sums)[kQueries][kVectorsAtOnce],
                                               const MipsTopkTile& tile, const MipsTopkQueries& queries, int64_t first,
                                               int row, MipsTopkEmit emit, void* context) {
  Floats scale[kVectorsAtOnce];
  for (int v = 0; v < kVectorsAtOnce; ++v) scale[v] = Products::row_scale(tile, row + v * kLanes);
  alignas(64) float scores[kQueries][kRowsAtOnce];
  uint64_t passed[kQueries];
  unsigned hits = 0;  // one bit a query; what was found is emitted when no sum is needed any more
#pragma GCC unroll 8  // or the sums would leave the registers
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

// Passes the queries from `first` on, kQueries at a time, over a packed tile. Returns the first that is left.
template <typename Products, int kQueries>
int64_t scan_queries(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, int64_t first,
                     const uint32_t* panel, Ahead& shared_ahead, MipsTopkEmit emit, void* context) {
  Ahead ahead = shared_ahead;  // in registers
  const int64_t one_query = packed_units(dtype, d);
  for (; first + kQueries <= queries.count; first += kQueries) {
    const uint32_t* packed = static_cast<const uint32_t*>(queries.packed) + first * one_query;
    for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
      typename Products::Sum sums[kQueries][kVectorsAtOnce];
      Products::template sum<kQueries>(panel + row, packed, d, ahead, sums);
      emit_wanted<Products, kQueries>(sums, tile, queries, first, row, emit, context);
    }
  }
  shared_ahead = ahead;
  return first;
}

template <typename Products>
void scan_packed(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries,
                 const uint32_t* panel, Ahead ahead, MipsTopkEmit emit, void* context) {
  const int64_t first = scan_queries<Products, kQueryBlock>(dtype, d, tile, queries, 0, panel, ahead, emit, context);
  static_assert(kQueryBlock == 6, "one case for every smaller block");
  switch (queries.count - first) {
    case 1:
      scan_queries<Products, 1>(dtype, d, tile, queries, first, panel, ahead, emit, context);
      break;
    case 2:
      scan_queries<Products, 2>(dtype, d, tile, queries, first, panel, ahead, emit, context);
      break;
    case 3:
      scan_queries<Products, 3>(dtype, d, tile, queries, first, panel, ahead, emit, context);
      break;
    case 4:
      scan_queries<Products, 4>(dtype, d, tile, queries, first, panel, ahead, emit, context);
      break;
    case 5:
      scan_queries<Products, 5>(dtype, d, tile, queries, first, panel, ahead, emit, context);
      break;
  }
}

// Few queries, at most kQueries: what is transposed is multiplied at once, and no panel is written.
template <typename Products, DType kType, bool kListed, int kQueries>
void scan_few(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Ahead ahead, MipsTopkEmit emit,
              void* context) {
  constexpr bool kPairs = element_bytes(kType) == 2 && kQueries > kQueryBlock;  // or the sums would fill the registers
  const auto* packed = static_cast<const uint32_t*>(queries.packed);
  for (int row = 0; row < kTileRows; row += kRowsAtOnce) {
    typename Products::Sum sums[kQueries][kVectorsAtOnce];
    for (int v = 0; v < kVectorsAtOnce; v += kRowsOfSquare<kType, kPairs> / kLanes) {
      Products::template sum_few<kType, kListed, kPairs>(tile, row + v * kLanes, packed, d, ahead, v, sums);
    }
    emit_wanted<Products, kQueries, false>(sums, tile, queries, 0, row, emit, context);
  }
}

template <typename Products, DType kType, int kQueries>
void scan_few(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Ahead ahead, MipsTopkEmit emit,
              void* context) {
  tile.list != nullptr ? scan_few<Products, kType, true, kQueries>(d, tile, queries, ahead, emit, context)
                       : scan_few<Products, kType, false, kQueries>(d, tile, queries, ahead, emit, context);
}

// Up to how many queries writing and reading a panel takes longer than it saves.
constexpr int most_of_few(DType dtype) {
  if (dtype == DType::kInt8) return kAmx ? 1 : kLanes == 16 ? 6 : kLanes == 8 ? 2 : 1;
  return kLanes == 16 ? 16 : kLanes == 8 || dtype == DType::kFloat32 ? 4 : 1;
}

// With the least number of queries that is compiled and enough: 1, 2, 4, 6, 12 or 16, for all of which there are packed
// blocks.
template <typename Products, DType kType, int kQueries>
void scan_at_least(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, Ahead ahead, MipsTopkEmit emit,
                   void* context) {
  if constexpr (kQueries < most_of_few(kType)) {
    constexpr int kMore = kQueries == 4 ? 6 : kQueries == 12 ? 16 : 2 * kQueries;
    if (queries.count > kQueries) {
      return scan_at_least<Products, kType, kMore>(d, tile, queries, ahead, emit, context);
    }
  }
  scan_few<Products, kType, kQueries>(d, tile, queries, ahead, emit, context);
}

}  // namespace
}  // namespace GRANK_ISA
}  // namespace grank
