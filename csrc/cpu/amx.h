// The AMX tile registers, if this compilation targets AMX. Included by kernel sources only.
#pragma once

#include <cstdint>

#if defined(GRANK_EMULATE_AMX)
#include "amx_emulation.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) || defined(__AMXINT8__) || defined(GRANK_EMULATE_AMX)  // __AMXINT8__: older clangs
#define GRANK_AMX 1
#else
#define GRANK_AMX 0
#endif

namespace grank {
namespace GRANK_ISA {

constexpr bool kAmx = GRANK_AMX;
constexpr int kAmxRows = 16;      // rows of a tile register
constexpr int kAmxRowBytes = 64;  // bytes of a tile row

#if GRANK_AMX
// RAII for the calling thread's tile configuration. Released at the end: with a configuration in place every context
// switch saves 8 KiB more.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

  // Configures registers 0 to 4 with `rows` rows and 5 to 7 with 16; fewer rows take less time.
  void configure(int rows) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    static_assert(sizeof shape == 64, "the operand of ldtilecfg");
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kAmxRowBytes;
      shape.rows[tile] = tile < 5 ? rows : kAmxRows;
    }
    // GCC's intrinsic declares no memory operand, so the stores to `shape` must be forced before it.
    asm volatile("" : : "r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
};
#endif

}  // namespace GRANK_ISA
}  // namespace grank
