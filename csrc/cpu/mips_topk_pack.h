// Layouts of the operands of mips_topk: packed units of rows and queries, and the packing of queries. Included by
// mips_topk_kernel.cpp only; formula in mips_topk_kernel.h.
#pragma once

#include "mips_topk_amx.h"
#include "mips_topk_kernel.h"
#include "simd.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kVectorsAtOnce = kLanes == 16 ? 4 : 2;  // kQueryBlock x kVectorsAtOnce accumulators fit the registers
constexpr int64_t kPrefetchBytes = 8192;              // prefetch distance of packing
constexpr int64_t kPagesBytes = 16384;                // prefetch distance of the TLB
constexpr int kUnitsPerFour = 4 / kInt8PerUnit;       // packed units of four int8
constexpr uint32_t kFlipInt8 = kInt8PerUnit == 4 ? 0x80808080u : 0;  // XOR of packed rows: s8 to u8 (+128)

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32-bit units of a packed row of width d.
int64_t units_of(DType dtype, int64_t d) { return dtype == DType::kInt8 ? kUnitsPerFour * divide_up(d, 4) : d; }

// AMX reads int8 rows in whole tiles of 64 bytes; the panel's padding meets zeros of the packed queries.
int64_t panel_bytes(DType dtype, int64_t d) {
  const bool whole = kAmx && dtype == DType::kInt8;
  return (whole ? amx_steps(d) * kAmxUnits : units_of(dtype, d)) * kTileRows * 4;
}

// An int8 query has one more unit in front: the u8/s8 compensation its accumulators start from. Not with AMX (s8 x s8).
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

// The u8/s8 compensation -128 sum(q): rows are multiplied as u8, +128.
int32_t compensation_of(const int8_t* query, int64_t d) {
  int32_t compensation = 0;
  for (int64_t j = 0; j < d; ++j) compensation -= 128 * query[j];
  return compensation;
}

// Writes a query's floats kQueryBlock units apart. (__restrict: without it the compiler adds an overlap check whose
// branch depends on the addresses, and the instruction count varies from run to run.)
void spread(const float* __restrict query, int64_t d, uint32_t* __restrict units) {
  for (int64_t j = 0; j < d; ++j) __builtin_memcpy(units + j * kQueryBlock, query + j, 4);
}

// Interleaves blocks of kQueryBlock queries unit by unit, the order in which the multiplication reads them. The last
// block is zero padded.
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
        const int32_t compensation = kInt8PerUnit == 4 ? compensation_of(query, d) : 0;
        __builtin_memcpy(unit, &compensation, 4);
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
