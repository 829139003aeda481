// How mips_topk lays out its operands: the packed units of rows and queries, and the packing of queries. Included by
// mips_topk_kernel.cpp only; mips_topk_kernel.h has the formula.
#pragma once

#include "mips_topk_amx.h"
#include "mips_topk_kernel.h"
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

}  // namespace
}  // namespace GRANK_ISA
}  // namespace grank
