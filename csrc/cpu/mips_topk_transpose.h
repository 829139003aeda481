// Transposes the rows of a tile into a panel, or passes each transposed vector to a sink, and prefetches the next rows.
// Included by mips_topk_kernel.cpp only.
#pragma once

#include "mips_topk_pack.h"

namespace grank {
namespace GRANK_ISA {
namespace {

// `column` holds one element (int8: four) of kLanes consecutive rows, or 16-bit elements of 2 kLanes rows. Converts
// them to packed units and passes these to sink(unit, vector, values).
template <DType kType, typename Sink>
[[gnu::always_inline]] inline void give_column(int64_t unit, Units column, Sink& sink) {
  if constexpr (kType == DType::kFloat32) {
    sink(unit, 0, column);
  } else if constexpr (kType != DType::kInt8) {
    Halves halves[2];
    __builtin_memcpy(halves, &column, sizeof column);
    for (int i = 0; i < 2; ++i) {
      sink(unit, i, (Units)(kType == DType::kFloat16 ? float_of_float16(halves[i]) : float_of_bfloat16(halves[i])));
    }
  } else if constexpr (kInt8PerUnit == 4) {
    sink(unit, 0, column);
  } else {
    const Shorts bytes = (Shorts)column;
    sink(unit, 0, (Units)(bytes << 8 >> 8));
    sink(unit + 1, 0, (Units)(bytes >> 8));
  }
}

// Software prefetcher. Packing reads 64 rows in turn, a pattern that hardware prefetchers do not follow; prefetching
// line by line in memory order reaches the full memory bandwidth.
struct Prefetcher {
  const char* line;  // the next to fetch
  const char* end;

  template <int kLines, int kCache>  // kCache: locality hint of __builtin_prefetch, 3: L1, 2: L2
  [[gnu::always_inline]] void fetch() {
    if (line >= end) return;
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + 64 * i, 0, kCache);
    line += 64 * kLines;
  }
};

// Passes the two 16-bit elements in each lane of `column` to sink(unit, 0, values) and sink(unit + 1, 0, values).
template <DType kType, bool kBoth, typename Sink>
[[gnu::always_inline]] inline void give_pair(int64_t unit, Units column, Sink& sink) {
  if constexpr (kType == DType::kFloat16) {
    sink(unit, 0, (Units)float_of_float16(__builtin_convertvector(column & 0xffff, Halves)));
    if (kBoth) sink(unit + 1, 0, (Units)float_of_float16(__builtin_convertvector(column >> 16, Halves)));
  } else {
    sink(unit, 0, column << 16);
    if (kBoth) sink(unit + 1, 0, column & 0xffff0000u);
  }
}

// Transposes 16 bytes (kWhole) or the last `bytes` bytes of kLanes rows of 16-bit elements, moved in pairs.
template <DType kType, bool kListed, bool kWhole, typename Sink>
[[gnu::always_inline]] inline void transpose_pairs(const char* row, int64_t stride, const uint32_t* list, int64_t bytes,
                                                   int64_t unit, Sink& sink) {
  Units columns[4];
  load_columns<4, kListed, kWhole>(row, stride, list, bytes, columns);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (kWhole || 4 * j + 2 < bytes) {
      give_pair<kType, true>(unit + 2 * j, columns[j], sink);
    } else if (4 * j < bytes) {
      give_pair<kType, false>(unit + 2 * j, columns[j], sink);
    }
  }
}

// Transposes 16 bytes (kWhole) or the last `bytes` bytes of a square of rows; `unit` is the index of the first packed
// unit.
template <DType kType, bool kListed, bool kWhole, typename Sink>
[[gnu::always_inline]] inline void transpose_square(const char* row, int64_t stride, const uint32_t* list,
                                                    int64_t bytes, int64_t unit, Sink& sink) {
  constexpr int kBytes = kType == DType::kInt8 ? 4 : element_bytes(kType);  // granularity of the transposition
  constexpr int kSize = 16 / kBytes;
  constexpr int kUnits = kType == DType::kInt8 ? kUnitsPerFour : 1;  // packed units of a column
  Units columns[kSize];
  load_columns<kBytes, kListed, kWhole>(row, stride, list, bytes, columns);
#pragma GCC unroll 8
  for (int j = 0; j < kSize; ++j) {
    if (kWhole || j * kBytes < bytes) give_column<kType>(unit + j * kUnits, columns[j], sink);
  }
}

// Rows transposed together: kLanes, or 2 kLanes of 16-bit elements that are not moved in pairs.
template <DType kType, bool kPairs = false>
constexpr int kRowsOfSquare = element_bytes(kType) == 2 && !kPairs ? 2 * kLanes : kLanes;

// Transposes dimensions [begin, end) of kRowsOfSquare rows of a tile from row `first`, units ascending. `begin` is a
// multiple of 16.
template <DType kType, bool kListed, bool kPairs = false, typename Sink>
[[gnu::always_inline]] inline void transpose_rows(const MipsTopkTile& tile, int first, int64_t begin, int64_t end,
                                                  Prefetcher& prefetcher, Sink sink) {
  const uint32_t* list = kListed ? tile.list + first : nullptr;
  const char* row = tile.rows + (kListed ? 0 : first * tile.row_stride) + begin * element_bytes(kType);
  int64_t unit = units_of(kType, begin);
  int64_t left = (end - begin) * element_bytes(kType);
  const auto square = [&](auto whole, int64_t bytes) {
    if constexpr (kPairs) {
      transpose_pairs<kType, kListed, decltype(whole)::value>(row, tile.row_stride, list, bytes, unit, sink);
    } else {
      transpose_square<kType, kListed, decltype(whole)::value>(row, tile.row_stride, list, bytes, unit, sink);
    }
  };
  for (; left >= 16; left -= 16, row += 16) {
    prefetcher.fetch<16 * kRowsOfSquare<kType, kPairs> / 64, 3>();
    square(std::true_type(), 16);
    unit += units_of(kType, 16 / element_bytes(kType));
  }
  if (left > 0) square(std::false_type(), left);
}

template <DType kType, bool kListed>
void pack(const MipsTopkTile& tile, int64_t d, Prefetcher prefetcher, uint32_t* panel) {
  constexpr uint32_t kFlip = kType == DType::kInt8 && !kAmx ? kFlipInt8 : 0;  // AMX multiplies s8 x s8
  for (int first = 0; first < kTileRows; first += kRowsOfSquare<kType>) {
    transpose_rows<kType, kListed>(tile, first, 0, d, prefetcher, [&](int64_t unit, int v, Units values) {
      store(panel + unit * kTileRows + first + v * kLanes, values ^ kFlip);
    });
  }
}

template <DType kType>
void pack(const MipsTopkTile& tile, int64_t d, Prefetcher prefetcher, uint32_t* panel) {
  tile.list != nullptr ? pack<kType, true>(tile, d, prefetcher, panel) : pack<kType, false>(tile, d, prefetcher, panel);
}

}  // namespace
}  // namespace GRANK_ISA
}  // namespace grank
