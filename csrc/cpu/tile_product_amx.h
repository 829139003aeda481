// The product of tile_product.h in the tile registers of AMX: C (m, 64) = [C +] A (m, depth) B (depth, 64).
//
// tdpbf16ps multiplies bfloat16 numbers (8 bits) exactly and sums in float32. A number of another type is the exact sum
// of parts of 8 bits each, every part the rest rounded to nearest: three of a float32, two of a float16, one of a
// bfloat16 or int8. A product of sums takes all pairs of parts (i, j) with i + j < the larger number of parts: one
// product for bfloat16, three for float16, six for float32. What is left out is below 2^-24 of |a||b| for float32 and
// 2^-16 for float16, what their own rounding loses, or less. A number that is not finite has one part, itself, and makes NaN
// of what it meets wherever two parts are multiplied.
//
// A product of 16 x 16 x 32 takes 16 cycles; 2 x 2 of them share 4 loads of 8 cycles. Sums: 32 dimensions within the
// instruction, then one after the other. Subnormal numbers and sums count as zero there.
#pragma once

#include "amx.h"
#include "tile_product.h"

#if GRANK_AMX
namespace grank {
namespace GRANK_ISA {

struct AmxTiles {
  static constexpr int kKeys = 128;
  static constexpr int kDepth = 32;  // dimensions of one product

  // (rows padded, width padded) bfloat16, zeros behind what there is; part p stands p * part elements further.
  struct Matrix {
    uint16_t* data;
    int64_t stride, part;  // elements
    int parts;
  };
  struct Across {
    Matrix matrix;
  };
  // A unit of 32 bits holds two dimensions of a column.
  struct Panel {
    uint32_t* data;
    int64_t part;  // units
    int parts;
  };

  struct Session {
    Session() { registers.configure(kAmxRows); }
    TileRegisters registers;
  };

  static constexpr int parts_of(DType dtype) {
    return dtype == DType::kFloat32 ? 3 : dtype == DType::kFloat16 ? 2 : 1;
  }

  static void* take_matrix(Pieces& pieces, DType dtype, int64_t count, int64_t width) {
    return pieces.take<uint16_t>(parts_of(dtype) * round_up(count, kDepth) * round_up(width, kDepth));
  }
  static void* take_across(Pieces& pieces, DType dtype, int64_t count, int64_t width) {
    return take_matrix(pieces, dtype, count, width);
  }
  static Panel take_panel(Pieces& pieces, DType dtype, int64_t depth) {
    const int64_t part = round_up(depth, kDepth) / 2 * kColumns;
    return {pieces.take<uint32_t>(parts_of(dtype) * part), part, parts_of(dtype)};
  }

  static Matrix matrix(const Rows& rows, void* memory) {
    const int64_t stride = round_up(rows.width, kDepth), padded = round_up(rows.count, kDepth);
    const Matrix out{static_cast<uint16_t*>(memory), stride, padded * stride, parts_of(rows.dtype)};
    for (int64_t i = 0; i < rows.count; ++i) {
      const char* row = rows.row(i);
      for (int64_t j = 0; j < stride; j += kLanes) {
        const int64_t left = rows.width - j;
        const char* from = row + j * element_bytes(rows.dtype);
        Floats rest = left >= kLanes ? load_floats<true>(from, rows.dtype, kLanes)
                      : left > 0     ? load_floats<false>(from, rows.dtype, left)
                                     : Floats{};
        for (int part = 0; part < out.parts; ++part) {
          store(out.data + part * out.part + i * stride + j, next_part(rest));
        }
      }
    }
    for (int part = 0; part < out.parts; ++part) {
      __builtin_memset(out.data + part * out.part + rows.count * stride, 0, (padded - rows.count) * stride * 2);
    }
    return out;
  }
  static Matrix matrix_or_alias(const Rows& rows, void* memory) { return matrix(rows, memory); }

  static Across across(const Matrix& from, int64_t count, int64_t width, void* memory) {
    const int64_t stride = round_up(count, kDepth), rows = round_up(width, kDepth);
    const Matrix out{static_cast<uint16_t*>(memory), stride, stride * rows, from.parts};
    for (int part = 0; part < out.parts; ++part) {
      for (int64_t i = 0; i < count; i += kDepth) {
        for (int64_t j = 0; j < rows; j += 8) {
          Units columns[8];
          const uint16_t* square = from.data + part * from.part + i * from.stride + j;
          load_columns<2, false, true>(reinterpret_cast<const char*>(square), from.stride * 2, nullptr, 16, columns);
          for (int c = 0; c < 8; ++c) store(out.data + part * out.part + (j + c) * stride + i, columns[c]);
        }
      }
    }
    return {out};
  }

  static void fill_panel(const Matrix& matrix, int64_t count, int64_t, Panel panel) {
    for (int part = 0; part < panel.parts; ++part) {
      transpose_units(reinterpret_cast<const char*>(matrix.data + part * matrix.part), matrix.stride * 2, count,
                      matrix.stride / 2, panel.data + part * panel.part);
    }
  }

  static void put_pair(Panel panel, int64_t pair, int column, Floats even, Floats odd) {
    uint32_t* to = panel.data + pair * kColumns + column;
    for (int part = 0; part < panel.parts; ++part) {
      const Units low = rounded(even), high = rounded(odd);
      store(to + part * panel.part, low >> 16 | high);
      even -= (Floats)low;
      odd -= (Floats)high;
    }
  }
  // What is multiplied by zeros behind the last pair must be a number.
  static void end_panel(Panel panel, int64_t depth) {
    const int64_t end = round_up(depth, kDepth) / 2, begin = (depth + 1) / 2;
    for (int part = 0; part < panel.parts; ++part) {
      __builtin_memset(panel.data + part * panel.part + begin * kColumns, 0, (end - begin) * kColumns * 4);
    }
  }

  template <bool kAdd>
  static void multiply(const Matrix& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    asm volatile("" : : : "memory");  // GCC's intrinsics for loads do not say what memory they read
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
  static constexpr int64_t kRowBytes = kColumns * 4;  // of panels and of C

  // To bfloat16, nearest, ties away from zero; a NaN's payload may become another, or infinity of a few: callers see to it.
  static Units rounded(Floats x) { return ((Units)x + 0x8000u) & 0xffff0000u; }

  // Takes the nearest bfloat16 off `rest`.
  static Halves next_part(Floats& rest) {
    const Units bits = (Units)rest, magnitude = bits & 0x7fffffffu;
    const Units special = (Units)(magnitude >= 0x7f7f8000u);  // what would round to infinity, infinity and NaN
    const Units quiet = (Units)(magnitude > 0x7f800000u) & 0x00400000u;
    const Units part = (((bits + 0x8000u) & ~special) | ((bits | quiet) & special)) & 0xffff0000u;
    rest = only((Ints)(magnitude < 0x7f800000u), rest - (Floats)part);
    return __builtin_convertvector(part >> 16, Halves);
  }

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
    for (int i = 0; i < a.parts; ++i) {
      for (int j = 0; j < b.parts && i + j < most; ++j) {
        const uint16_t* left = a.data + i * a.part + row * a.stride;
        const uint32_t* right = b.data + j * b.part + column;
        for (int64_t k = 0; k < depth; k += kDepth) {
          _tile_loadd(4, left, a.stride * 2);
          _tile_loadd(6, right, kRowBytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, right + 16, kRowBytes);
          _tile_dpbf16ps(1, 4, 7);
          if (kTwo) {
            _tile_loadd(5, left + kAmxRows * a.stride, a.stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
          left += kDepth;
          right += kDepth / 2 * kColumns;
        }
      }
    }
    _tile_stored(0, c, kRowBytes);
    _tile_stored(1, c + 16, kRowBytes);
    if (kTwo) {
      _tile_stored(2, c + 16 * kColumns, kRowBytes);
      _tile_stored(3, c + 16 * kColumns + 16, kRowBytes);
    }
  }
};

}  // namespace GRANK_ISA
}  // namespace grank
#endif  // GRANK_AMX
