// mips_topk_kernel.h says what is computed here, and how.
#include "mips_topk_kernel.h"

#include <type_traits>

#include "mips_topk_amx.h"
#include "simd.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;  // times kQueryBlock accumulators fit the registers
constexpr int64_t kPrefetchBytes = 8192;              // from what is transposed to what is fetched meanwhile
constexpr int64_t kPagesBytes = 16384;           // from a tile to the pages whose addresses are looked up meanwhile
constexpr int kUnitsPerFour = 4 / kInt8PerUnit;  // packed units of four int8
constexpr uint32_t kFlipInt8 = kInt8PerUnit == 4 ? 0x80808080u : 0;  // of a packed row: s8 to u8

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32-bit units of a packed row of width d.
int64_t units_of(DType dtype, int64_t d) { return dtype == DType::kInt8 ? kUnitsPerFour * divide_up(d, 4) : d; }

// With AMX, int8 rows are read by whole products; what the panel holds behind their width is multiplied by zeros.
int64_t panel_bytes(DType dtype, int64_t d) {
  const bool whole = kAmx && dtype == DType::kInt8;
  return (whole ? amx_steps(d) * kAmxUnits : units_of(dtype, d)) * kTileRows * 4;
}

// For int8 one more unit a query, in front: what its accumulators start from. Not with AMX, where they start from zero.
int64_t packed_units(DType dtype, int64_t d) {
  if (kAmx && dtype == DType::kInt8) return amx_steps(d) * kAmxUnits;
  return units_of(dtype, d) + (dtype == DType::kInt8);
}

int64_t queries_bytes(DType dtype, int64_t count, int64_t d) {
  const int64_t block = kAmx && dtype == DType::kInt8 ? 1 : kQueryBlock;
  return divide_up(count, block) * block * packed_units(dtype, d) * 4;
}

// Four int8 as the packed units of dot(): s16 pairs (0, 2) and (1, 3), or the four bytes.
void split_four(uint32_t four, uint32_t* units, int64_t stride) {
  if constexpr (kInt8PerUnit == 4) {
    units[0] = four;
  } else {
    const auto wide = [four](int byte) {
      return static_cast<uint32_t>(static_cast<int8_t>(four >> 8 * byte)) & 0xffffu;
    };
    units[0] = wide(0) | wide(2) << 16;
    units[stride] = wide(1) | wide(3) << 16;
  }
}

// What the sum of an int8 query's products starts from: rows are multiplied as u8, 128 more than they are.
int32_t start_of(const int8_t* query, int64_t d) {
  int32_t start = 0;
  for (int64_t j = 0; j < d; ++j) start -= 128 * query[j];
  return start;
}

// Writes a query's floats kQueryBlock units apart. (Restricted, or the compiler's code would ask which memory lies
// first, and the instructions that a call executes would differ.)
void spread(const float* __restrict query, int64_t d, uint32_t* __restrict units) {
  for (int64_t j = 0; j < d; ++j) __builtin_memcpy(units + j * kQueryBlock, query + j, 4);
}

// Interleaves blocks of kQueryBlock queries unit by unit: what the multiplication reads, in its order. The last block
// is filled up with zeros.
void pack_queries(DType dtype, const void* queries, int64_t count, int64_t d, void* packed) {
#if GRANK_AMX
  if (dtype == DType::kInt8) {
    return pack_tiles(static_cast<const int8_t*>(queries), count, d, static_cast<char*>(packed));
  }
#endif
  const int64_t block_units = kQueryBlock * packed_units(dtype, d);
  auto* out = static_cast<uint32_t*>(packed);
  for (int64_t first = 0; first < count; first += kQueryBlock, out += block_units) {
    const int64_t block = count - first < kQueryBlock ? count - first : kQueryBlock;
    if (block < kQueryBlock) __builtin_memset(out, 0, block_units * 4);
    for (int64_t b = 0; b < block; ++b) {
      uint32_t* unit = out + b;
      if (dtype != DType::kInt8) {
        spread(static_cast<const float*>(queries) + (first + b) * d, d, unit);
      } else {
        const int8_t* query = static_cast<const int8_t*>(queries) + (first + b) * d;
        const int32_t start = kInt8PerUnit == 4 ? start_of(query, d) : 0;
        __builtin_memcpy(unit, &start, 4);
        unit += kQueryBlock;
        for (int64_t j = 0; j < d; j += 4, unit += kUnitsPerFour * kQueryBlock) {
          uint32_t four = 0;
          __builtin_memcpy(&four, query + j, d - j < 4 ? d - j : 4);
          split_four(four, unit, kQueryBlock);
        }
      }
    }
  }
}

// ---- packing a tile ----

// Hands what `column` holds of one element (or of four int8) of consecutive rows to sink(unit, vector, values): kLanes
// rows, or twice as many of 16-bit elements, which become floats here.
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

// Fetches memory while something else is done. Rows are packed across, so the hardware sees no order in them; asked for
// line by line, in the order of memory, they arrive at its full bandwidth.
struct Ahead {
  const char* line;  // the next to ask for
  const char* end;

  template <int kLines, int kCache>  // 3: into the first-level cache; 2: only into the second
  [[gnu::always_inline]] void fetch() {
    if (line >= end) return;
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + 64 * i, 0, kCache);
    line += 64 * kLines;
  }
};

// Hands the two 16-bit elements in every lane of `column` to sink(unit, 0, values) and sink(unit + 1, 0, values).
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

// Transposes 16 bytes of every row of a square of kLanes rows and columns of pairs of 16-bit elements, or `bytes` of
// them.
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

// Transposes 16 bytes, or the last `bytes` ones, of every row of a square of rows and columns; `unit` is the first of
// them.
template <DType kType, bool kListed, bool kWhole, typename Sink>
[[gnu::always_inline]] inline void transpose_square(const char* row, int64_t stride, const uint32_t* list,
                                                    int64_t bytes, int64_t unit, Sink& sink) {
  constexpr int kBytes = kType == DType::kInt8 ? 4 : element_bytes(kType);  // what is moved as one
  constexpr int kSize = 16 / kBytes;
  constexpr int kUnits = kType == DType::kInt8 ? kUnitsPerFour : 1;  // packed units of a column
  Units columns[kSize];
  load_columns<kBytes, kListed, kWhole>(row, stride, list, bytes, columns);
#pragma GCC unroll 8
  for (int j = 0; j < kSize; ++j) {
    if (kWhole || j * kBytes < bytes) give_column<kType>(unit + j * kUnits, columns[j], sink);
  }
}

// Rows that are transposed together: a vector of them, or two of 16-bit elements, if these are not moved in pairs.
template <DType kType, bool kPairs = false>
constexpr int kRowsOfSquare = element_bytes(kType) == 2 && !kPairs ? 2 * kLanes : kLanes;

// Transposes dimensions begin to end of the rows of a tile from number `first` on, kRowsOfSquare of them, units
// ascending. `begin` is a multiple of 16.
template <DType kType, bool kListed, bool kPairs = false, typename Sink>
[[gnu::always_inline]] inline void transpose_rows(const MipsTopkTile& tile, int first, int64_t begin, int64_t end,
                                                  Ahead& ahead, Sink sink) {
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
    ahead.fetch<16 * kRowsOfSquare<kType, kPairs> / 64, 3>();
    square(std::true_type(), 16);
    unit += units_of(kType, 16 / element_bytes(kType));
  }
  if (left > 0) square(std::false_type(), left);
}

template <DType kType, bool kListed>
void pack(const MipsTopkTile& tile, int64_t d, Ahead ahead, uint32_t* panel) {
  constexpr uint32_t kFlip = kType == DType::kInt8 && !kAmx ? kFlipInt8 : 0;  // AMX multiplies signed bytes
  for (int first = 0; first < kTileRows; first += kRowsOfSquare<kType>) {
    transpose_rows<kType, kListed>(tile, first, 0, d, ahead, [&](int64_t unit, int v, Units values) {
      store(panel + unit * kTileRows + first + v * kLanes, values ^ kFlip);
    });
  }
}

template <DType kType>
void pack(const MipsTopkTile& tile, int64_t d, Ahead ahead, uint32_t* panel) {
  tile.list != nullptr ? pack<kType, true>(tile, d, ahead, panel) : pack<kType, false>(tile, d, ahead, panel);
}

// ---- multiply, compare, emit: kQueries queries x kVectorsAtOnce vectors of rows, sums in registers ----

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

#if GRANK_AMX
static_assert(kRowsAtOnce == kTileRows, "a block of queries meets all rows of a tile at once");

void scan_packed_amx(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, const uint32_t* panel,
                     Ahead ahead, MipsTopkEmit emit, void* context) {
  TileRegisters registers;
  alignas(64) int32_t sums[kAmxQueries][kTileRows];
  const auto* packed = static_cast<const char*>(queries.packed);
  for (int64_t first = 0; first < queries.count; first += kAmxQueries) {
    const bool whole = queries.count - first >= kAmxQueries;
    const int block = whole ? kAmxQueries : static_cast<int>(queries.count - first);
    if (first == 0 || !whole) registers.configure(block);
    multiply_tiles(panel, packed + queries_bytes(DType::kInt8, first, d), block, amx_steps(d), ahead, sums);
    for (int q = 0; q < block; ++q) {
      Ints sum[1][kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) sum[0][v] = load<Ints>(&sums[q][v * kLanes]);
      emit_wanted<Int8Products, 1>(sum, tile, queries, first + q, 0, emit, context);
    }
  }
}
#endif

// As many queries as leave most of the next tile to be fetched when their products are done.
int64_t few_queries(DType dtype) {
  if (kAmx && dtype == DType::kInt8) return 3 * kAmxQueries;
  return most_of_few(dtype) > kQueryBlock ? most_of_few(dtype) : kQueryBlock;
}

// `early` fetches while rows are transposed, `late` while packed rows are multiplied.
template <typename Products, DType kType>
void scan_tile(int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, uint32_t* panel, Ahead early,
               Ahead late, MipsTopkEmit emit, void* context) {
  if (queries.count <= most_of_few(kType)) {
    return scan_at_least<Products, kType, 1>(d, tile, queries, early, emit, context);
  }
  pack<kType>(tile, d, early, panel);
#if GRANK_AMX
  if (kType == DType::kInt8) return scan_packed_amx(d, tile, queries, panel, late, emit, context);
#endif
  scan_packed<Products>(kType, d, tile, queries, panel, late, emit, context);
}

void scan_tile(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
               MipsTopkEmit emit, void* context) {
  auto* units = static_cast<uint32_t*>(panel);
  // With few queries packing takes the time, so it fetches, a little ahead of itself; with many the multiplications do,
  // the whole next tile.
  const int64_t tile_bytes = tile.list == nullptr ? kTileRows * tile.row_stride : 0;
  const bool few = queries.count <= few_queries(dtype);
  const char* near = tile.rows + kPrefetchBytes;
  const char* next = tile.rows + tile_bytes;
  for (int64_t page = 0; page < tile_bytes; page += 4096) {  // or every page would be waited for
    __builtin_prefetch(tile.rows + kPagesBytes + page, 0, 2);
  }
  const Ahead early{near, few ? near + tile_bytes : near}, late{next, few ? next : next + tile_bytes};
  switch (dtype) {
    case DType::kFloat32:
      return scan_tile<FloatProducts, DType::kFloat32>(d, tile, queries, units, early, late, emit, context);
    case DType::kFloat16:
      return scan_tile<FloatProducts, DType::kFloat16>(d, tile, queries, units, early, late, emit, context);
    case DType::kBFloat16:
      return scan_tile<FloatProducts, DType::kBFloat16>(d, tile, queries, units, early, late, emit, context);
    case DType::kInt8:
      return scan_tile<Int8Products, DType::kInt8>(d, tile, queries, units, early, late, emit, context);
  }
}

}  // namespace

extern const MipsTopkKernel mips_topk_kernel;
const MipsTopkKernel mips_topk_kernel = {panel_bytes, queries_bytes, pack_queries, scan_tile};

}  // namespace GRANK_ISA
}  // namespace grank
