// The product of tile_product.h with AMX tile registers, on bfloat16 parts (tile_product_parts.h).
//
// One TDPBF16PS (16 x 16 x 32) takes 16 cycles; a block of 2 x 2 of them shares 4 tile loads of 8 cycles each.
// Accumulation order: 32 dimensions inside the instruction, instructions by ascending dimension.
#pragma once

#include "amx.h"
#include "tile_product_parts.h"

#if GRANK_AMX
namespace grank {
namespace GRANK_ISA {

struct AmxTiles : PartTiles {
  struct Session {
    Session() { registers.configure(kAmxRows); }
    TileRegisters registers;
  };

  template <bool kAdd>
  static void multiply(const Matrix& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    asm volatile("" : : : "memory");  // GCC's _tile_loadd declares no memory operand
    for (int64_t row = 0; row < m; row += 2 * kAmxRows) {
      for (int column = 0; column < columns; column += 32) {
        float* to = c + row * kColumns + column;
        if (m - row > kAmxRows) {
          multiply_block<kAdd, true>(a, row, b, depth, column, to);
        } else {
          multiply_block<kAdd, false>(a, row, b, depth, column, to);
        }
      }
    }
  }
  template <bool kAdd>
  static void multiply(const Across& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    multiply<kAdd>(a.matrix, m, b, depth, columns, c);
  }

 private:
  static constexpr int64_t kRowBytes = kColumns * 4;  // row stride of panels and C

  template <bool kAdd, bool kTwo>
  static void multiply_block(const Matrix& a, int64_t row, Panel b, int64_t depth, int column, float* c) {
    if (kAdd) {
      _tile_loadd(0, c, kRowBytes);
      _tile_loadd(1, c + 16, kRowBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    if (kTwo && kAdd) {
      _tile_loadd(2, c + 16 * kColumns, kRowBytes);
      _tile_loadd(3, c + 16 * kColumns + 16, kRowBytes);
    } else if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const int most = a.parts > b.parts ? a.parts : b.parts;
    const uint16_t* left = a.data + row * a.stride;
    const uint32_t* right = b.data + column;
    for (int64_t k = 0; k < depth; k += kDepth) {
      for (int i = 0; i < a.parts; ++i) {
        _tile_loadd(4, left + i * a.part, a.stride * 2);
        if (kTwo) _tile_loadd(5, left + i * a.part + kAmxRows * a.stride, a.stride * 2);
        for (int j = 0; j < b.parts && i + j < most; ++j) {
          _tile_loadd(6, right + j * b.part, kRowBytes);
          _tile_dpbf16ps(0, 4, 6);
          if (kTwo) _tile_dpbf16ps(2, 5, 6);
          _tile_loadd(7, right + j * b.part + 16, kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
          if (kTwo) _tile_dpbf16ps(3, 5, 7);
        }
      }
      left += kDepth;
      right += kDepth / 2 * kColumns;
    }
    _tile_stored(0, c, kRowBytes);
    _tile_stored(1, c + 16, kRowBytes);
    if (kTwo) {
      _tile_stored(2, c + 16 * kColumns, kRowBytes);
      _tile_stored(3, c + 16 * kColumns + 16, kRowBytes);
    }
  }
};
static_assert(is_tile_product<AmxTiles>());

}  // namespace GRANK_ISA
}  // namespace grank
#endif
