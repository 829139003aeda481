// mips_topk_kernel.h says what is computed here, and how.
#include "mips_topk_kernel.h"

#include "simd.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kVectors = kTileRows / kLanes;           // vectors that hold one number of every row of a tile
constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;   // times kQueryBlock accumulators fit the registers
constexpr int kUnitsPerFour = 4 / kInt8PerUnit;        // packed units of four int8

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32-bit units of a packed row of width d.
int64_t units_of(DType dtype, int64_t d) { return dtype == DType::kInt8 ? kUnitsPerFour * divide_up(d, 4) : d; }

int64_t panel_bytes(DType dtype, int64_t d) { return units_of(dtype, d) * kTileRows * 4; }

// For int8 one more unit a query, in front: what its accumulators start from.
int64_t packed_units(DType dtype, int64_t d) { return units_of(dtype, d) + (dtype == DType::kInt8); }

int64_t queries_bytes(DType dtype, int64_t count, int64_t d) { return count * packed_units(dtype, d) * 4; }

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

// Interleaves blocks of kQueryBlock queries unit by unit: what the multiplication reads, in its order.
void pack_queries(DType dtype, const void* queries, int64_t count, int64_t d, void* packed) {
  auto* out = static_cast<uint32_t*>(packed);
  for (int64_t first = 0; first < count; first += kQueryBlock) {
    const int64_t block = count - first < kQueryBlock ? count - first : kQueryBlock;
    for (int64_t b = 0; b < block; ++b) {
      uint32_t* unit = out + b;
      if (dtype != DType::kInt8) {
        const float* query = static_cast<const float*>(queries) + (first + b) * d;
        for (int64_t j = 0; j < d; ++j) __builtin_memcpy(unit + j * block, query + j, 4);
      } else {
        const int8_t* query = static_cast<const int8_t*>(queries) + (first + b) * d;
        int32_t start = 0;
        if constexpr (kInt8PerUnit == 4) {
          for (int64_t j = 0; j < d; ++j) start -= 128 * query[j];
        }
        __builtin_memcpy(unit, &start, 4);
        unit += block;
        for (int64_t j = 0; j < d; j += 4, unit += kUnitsPerFour * block) {
          uint32_t four = 0;
          __builtin_memcpy(&four, query + j, d - j < 4 ? d - j : 4);
          split_four(four, unit, block);
        }
      }
    }
    out += block * packed_units(dtype, d);
  }
}

// ---- packing a tile ----

// How kLanes units are read from a row, and written as packed units of kLanes rows.
template <DType kType>
struct Row;

template <>
struct Row<DType::kFloat32> {
  static constexpr int kUnitBytes = 4;
  static Units read(const char* p) { return load<Units>(p); }
  static Units read_first(const char* p, int64_t bytes) { return load_first<Units>(p, bytes); }
};

template <>
struct Row<DType::kFloat16> {
  static constexpr int kUnitBytes = 2;
  static Units read(const char* p) { return (Units)float_of_float16(load<Halves>(p)); }
  static Units read_first(const char* p, int64_t bytes) { return (Units)float_of_float16(load_first<Halves>(p, bytes)); }
};

template <>
struct Row<DType::kBFloat16> {
  static constexpr int kUnitBytes = 2;
  static Units read(const char* p) { return (Units)float_of_bfloat16(load<Halves>(p)); }
  static Units read_first(const char* p, int64_t bytes) {
    return (Units)float_of_bfloat16(load_first<Halves>(p, bytes));
  }
};

template <>
struct Row<DType::kInt8> : Row<DType::kFloat32> {};  // four int8 travel as one unit

template <DType kType>
inline void write_unit(uint32_t* panel, int64_t unit, Units column) {
  if constexpr (kType != DType::kInt8) {
    store(panel + unit * kTileRows, column);
  } else if constexpr (kInt8PerUnit == 4) {
    store(panel + unit * kTileRows, column ^ 0x80808080u);
  } else {
    const Shorts bytes = (Shorts)column;
    store(panel + 2 * unit * kTileRows, bytes << 8 >> 8);
    store(panel + (2 * unit + 1) * kTileRows, bytes >> 8);
  }
}

template <DType kType>
void pack(const MipsTopkTile& tile, int64_t d, uint32_t* panel) {
  const int64_t row_bytes = kType == DType::kInt8 ? d : d * Row<kType>::kUnitBytes;
  constexpr int64_t kChunk = kLanes * Row<kType>::kUnitBytes;
  for (int vector = 0; vector < kVectors; ++vector, panel += kLanes) {
    const void* const* rows = tile.rows + vector * kLanes;
    for (int64_t byte = 0; byte < row_bytes; byte += kChunk) {
      const int64_t left = row_bytes - byte;
      const int columns = left >= kChunk ? kLanes : divide_up(left, Row<kType>::kUnitBytes);
      Units units[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const char* p = static_cast<const char*>(rows[i]) + byte;
        __builtin_prefetch(p + tile.prefetch);
        units[i] = left >= kChunk ? Row<kType>::read(p) : Row<kType>::read_first(p, left);
      }
      transpose(units);
      const int64_t unit = byte / Row<kType>::kUnitBytes;
      if (columns == kLanes) {
        for (int i = 0; i < kLanes; ++i) write_unit<kType>(panel, unit + i, units[i]);
      } else {
        for (int i = 0; i < columns; ++i) write_unit<kType>(panel, unit + i, units[i]);
      }
    }
  }
}

// ---- multiplication: kQueries queries x kVectorsAtOnce vectors of rows, sums in registers ----

template <int kQueries>
inline void multiply_floats(const float* panel, const float* queries, int64_t d, float* scores) {
  for (int64_t begin = 0; begin == 0 || begin < d; begin += kSegment) {
    const int64_t end = d - begin < kSegment ? d : begin + kSegment;
    Floats sums[kQueries][kVectorsAtOnce] = {};
    for (int64_t j = begin; j < end; ++j) {
      Floats rows[kVectorsAtOnce];
      for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = load<Floats>(panel + j * kTileRows + v * kLanes);
      for (int q = 0; q < kQueries; ++q) {
        const Floats query = broadcast<Floats>(queries[j * kQueries + q]);
        for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = multiply_add(query, rows[v], sums[q][v]);
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int v = 0; v < kVectorsAtOnce; ++v) {
        float* score = scores + q * kTileRows + v * kLanes;
        store(score, begin == 0 ? sums[q][v] : load<Floats>(score) + sums[q][v]);
      }
    }
  }
}

template <int kQueries>
inline void multiply_int8(const uint32_t* panel, const uint32_t* queries, int64_t units, const float* row_scale,
                          const float* query_scale, float* scores) {
  Ints sums[kQueries][kVectorsAtOnce];
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = (Ints)broadcast<Units>(queries[q]);
  }
  queries += kQueries;
  for (int64_t unit = 0; unit < units; ++unit) {
    Units rows[kVectorsAtOnce];
    for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = load<Units>(panel + unit * kTileRows + v * kLanes);
    for (int q = 0; q < kQueries; ++q) {
      const Units query = broadcast<Units>(queries[unit * kQueries + q]);
      for (int v = 0; v < kVectorsAtOnce; ++v) sums[q][v] = dot(sums[q][v], rows[v], query);
    }
  }
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    const Floats scale = load<Floats>(row_scale + v * kLanes);
    for (int q = 0; q < kQueries; ++q) {
      store(scores + q * kTileRows + v * kLanes, __builtin_convertvector(sums[q][v], Floats) * (query_scale[q] * scale));
    }
  }
}

// ---- compare and emit ----

// The rows whose score reaches the threshold. Rows after the threshold's own lose a tie, so they must exceed it.
inline uint64_t passing(const float* scores, uint64_t threshold, uint32_t first_row) {
  const uint32_t last_winner = ~static_cast<uint32_t>(threshold);
  const Floats bound = broadcast<Floats>(score_of((threshold >> 32) + (first_row > last_winner)));
  uint64_t passed = 0;
  for (int v = 0; v < kVectors; ++v) passed |= at_least(load<Floats>(scores + v * kLanes), bound) << v * kLanes;
  return passed;
}

template <int kQueries>
void scan_block(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, int64_t first_query,
                const uint32_t* panel, MipsTopkEmit emit, void* context) {
  alignas(64) float scores[kQueries * kTileRows];
  const uint32_t* packed = static_cast<const uint32_t*>(queries.packed) + first_query * packed_units(dtype, d);
  for (int row = 0; row < kTileRows; row += kVectorsAtOnce * kLanes) {
    if (dtype == DType::kInt8) {
      multiply_int8<kQueries>(panel + row, packed, units_of(dtype, d), tile.row_scale + row,
                              queries.scale + first_query, scores + row);
    } else {
      multiply_floats<kQueries>(reinterpret_cast<const float*>(panel) + row, reinterpret_cast<const float*>(packed), d,
                                scores + row);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    const int64_t query = first_query + q;
    const uint64_t threshold = __atomic_load_n(queries.thresholds + query, __ATOMIC_RELAXED);
    const uint64_t passed = passing(scores + q * kTileRows, threshold, tile.first_row) & tile.valid;
    if (__builtin_expect(passed != 0, 0)) emit(context, query, scores + q * kTileRows, passed);
  }
}

void scan_tile(DType dtype, int64_t d, const MipsTopkTile& tile, const MipsTopkQueries& queries, void* panel,
               MipsTopkEmit emit, void* context) {
  auto* units = static_cast<uint32_t*>(panel);
  switch (dtype) {
    case DType::kFloat32: pack<DType::kFloat32>(tile, d, units); break;
    case DType::kFloat16: pack<DType::kFloat16>(tile, d, units); break;
    case DType::kBFloat16: pack<DType::kBFloat16>(tile, d, units); break;
    case DType::kInt8: pack<DType::kInt8>(tile, d, units); break;
  }
  int64_t query = 0;
  for (; query + kQueryBlock <= queries.count; query += kQueryBlock) {
    scan_block<kQueryBlock>(dtype, d, tile, queries, query, units, emit, context);
  }
  static_assert(kQueryBlock == 6, "one case for every smaller block");
  switch (queries.count - query) {
    case 1: return scan_block<1>(dtype, d, tile, queries, query, units, emit, context);
    case 2: return scan_block<2>(dtype, d, tile, queries, query, units, emit, context);
    case 3: return scan_block<3>(dtype, d, tile, queries, query, units, emit, context);
    case 4: return scan_block<4>(dtype, d, tile, queries, query, units, emit, context);
    case 5: return scan_block<5>(dtype, d, tile, queries, query, units, emit, context);
  }
}

}  // namespace

extern const MipsTopkKernel mips_topk_kernel;
const MipsTopkKernel mips_topk_kernel = {panel_bytes, queries_bytes, pack_queries, scan_tile};

}  // namespace GRANK_ISA
}  // namespace grank
