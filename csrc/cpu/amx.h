// The tile registers of AMX, where this flavour is compiled for them. Included by kernel sources only.
#pragma once

#include <cstdint>

#if defined(GRANK_EMULATE_AMX)
#include "amx_emulation.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) || defined(__AMXINT8__) || defined(GRANK_EMULATE_AMX)  // the second is older clangs'
#define GRANK_AMX 1
#else
#define GRANK_AMX 0
#endif

namespace grank {
namespace GRANK_ISA {

constexpr bool kAmx = GRANK_AMX;
constexpr int kAmxRows = 16;      // of a tile register
constexpr int kAmxRowBytes = 64;  // of one of its rows

#if GRANK_AMX
// The calling thread's tile registers, in use while this lives. Nothing is left behind, or every switch of the thread
// would go on saving 8 KiB.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

  // Gives registers 5 to 7 all their rows and the others `rows`: rows that are not there take no time.
  void configure(int rows) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    static_assert(sizeof shape == 64, "what ldtilecfg reads");
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kAmxRowBytes;
      shape.rows[tile] = tile < 5 ? rows : kAmxRows;
    }
    // GCC's intrinsics for loads do not say what memory they read; all of it has to be written by now.
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
};
#endif

}  // namespace GRANK_ISA
}  // namespace grank
