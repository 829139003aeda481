// int8 products with AMX tile registers: 16 queries x 64 rows per block. Included by mips_topk_kernel.cpp only; formula
// in mips_topk_kernel.h.
//
//   C[16 queries][16 rows] += A[16 queries][64 bytes] * B[16 units][16 rows][4 bytes]
//
// B is the panel, units kUnitBytes apart, read as four tiles side by side; rows stay s8. A is written by pack_tiles().
// Tile registers: 4 C, 1 A, 3 B in rotation, so that loads overlap products.
//
// 64 dimensions take 5 tile loads (8 cycles each by Intel's manual) and 4 products of 16 x 16 x 64 multiply-adds (16
// cycles each). Measured on two cores of a Xeon with AMX, 256 queries, 1,000,000 x 64: 1.8 Top/s, bound by conversion
// and comparison of the sums. Tested on processors without AMX by tests/csrc/amx_emulation.h.
#pragma once

#include <cstdint>

#include "amx.h"
#include "mips_topk_kernel.h"
#include "simd.h"

namespace grank {
namespace GRANK_ISA {

constexpr int kAmxQueries = 16;  // rows of a tile register
constexpr int kAmxUnits = 16;    // packed units of a row per product
static_assert(kTileRows == 4 * kAmxUnits, "four tiles of B side by side");
static_assert(kQueriesMultiple % kAmxQueries == 0, "splits fall between blocks");

// Products per row of width d.
inline int64_t amx_steps(int64_t d) { return (d + kAmxRowBytes - 1) / kAmxRowBytes; }

#if GRANK_AMX

// Packs queries in blocks of kAmxQueries (the last may be smaller): per 64 bytes of width, the rows of a tile A. Zero
// padded, so that the panel's padding does not count.
inline void pack_tiles(const int8_t* queries, int64_t count, int64_t d, char* out) {
  for (int64_t first = 0; first < count; first += kAmxQueries) {
    const int64_t end = count - first < kAmxQueries ? count : first + kAmxQueries;
    for (int64_t j = 0; j < d; j += kAmxRowBytes) {
      const int64_t bytes = d - j < kAmxRowBytes ? d - j : kAmxRowBytes;
      for (int64_t b = first; b < end; ++b, out += kAmxRowBytes) {
        __builtin_memcpy(out, queries + b * d + j, bytes);
        __builtin_memset(out + bytes, 0, kAmxRowBytes - bytes);
      }
    }
  }
}

// sums[q][i] for a block of `queries` queries and all rows of the panel. Call TileRegisters::configure(queries) before.
template <typename Prefetcher>
inline void multiply_tiles(const uint32_t* panel, const char* packed, int queries, int64_t steps,
                           Prefetcher& prefetcher, int32_t (*sums)[kTileRows]) {
  constexpr int64_t kUnitBytes = 4 * kTileRows;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; steps > 0; --steps) {
    prefetcher.template fetch<16, 2>();
    _tile_loadd(4, packed, kAmxRowBytes);
    _tile_loadd(5, panel, kUnitBytes);
    _tile_loadd(6, panel + 16, kUnitBytes);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(7, panel + 32, kUnitBytes);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(5, panel + 48, kUnitBytes);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 4, 5);
    packed += queries * kAmxRowBytes;
    panel += kAmxUnits * kTileRows;
  }
  _tile_stored(0, &sums[0][0], kUnitBytes);
  _tile_stored(1, &sums[0][16], kUnitBytes);
  _tile_stored(2, &sums[0][32], kUnitBytes);
  _tile_stored(3, &sums[0][48], kUnitBytes);
}

#endif  // GRANK_AMX

}  // namespace GRANK_ISA
}  // namespace grank
