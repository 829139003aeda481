// Operands of the product of tile_product.h split into bfloat16 parts, for instructions that multiply pairs of bfloat16
// and accumulate in float32. Shared base of PairTiles and AmxTiles.
//
// The significand of a bfloat16 has 8 bits. A number is split exactly into the sum of bfloat16 parts, each the
// remainder rounded to nearest: 3 parts for float32, 2 for float16, 1 for bfloat16 and int8. Multiplied are the pairs
// of parts (i, j) with i + j < the larger number of parts: 6 products for float32, 3 for float16, 1 for bfloat16. The
// omitted pairs are at most 2^-23 |a||b| for float32 and 2^-16 |a||b| for float16, of either sign: below the rounding
// error of plain torch. An infinity or NaN is one part, the others are 0: with several parts its products are NaN. The
// instructions flush subnormal operands and sums to zero.
#pragma once

#include "tile_product.h"

#if defined(__AVX512BW__)
namespace grank {
namespace GRANK_ISA {

struct PartTiles {
  static constexpr int kKeys = 128;
  static constexpr int kDepth = 32;  // dimensions of one instruction

  // (rows, width) padded to multiples of kDepth, bfloat16, zero padded; part p begins at data + p * part.
  struct Matrix {
    const uint16_t* data;
    int64_t stride, part;  // elements
    int parts;
  };
  struct Across {
    Matrix matrix;
  };
  // A 32-bit unit holds two dimensions of a column.
  struct Panel {
    uint32_t* data;
    int64_t part;  // units
    int parts;
  };

  static constexpr int kMostParts = 3;
  static int parts(Panel panel) { return panel.parts; }

  static constexpr int parts_of(DType dtype) { return dtype == DType::kFloat32 ? 3 : dtype == DType::kFloat16 ? 2 : 1; }

  static void* take_matrix(Arena& arena, DType dtype, int64_t count, int64_t width) {
    return arena.take<uint16_t>(parts_of(dtype) * round_up(count, kDepth) * round_up(width, kDepth));
  }
  static void* take_across(Arena& arena, DType dtype, int64_t count, int64_t width) {
    return take_matrix(arena, dtype, count, width);
  }
  static Panel take_panel(Arena& arena, DType dtype, int64_t depth) {
    const int64_t part = round_up(depth, kDepth) / 2 * kColumns;
    return {arena.take<uint32_t>(parts_of(dtype) * part), part, parts_of(dtype)};
  }
  static Panel take_panel_of_floats(Arena& arena, DType dtype, int64_t depth) {
    return take_panel(arena, dtype, depth);
  }

  static Matrix matrix(const Rows& rows, void* memory) {
    const int64_t stride = round_up(rows.width, kDepth), padded = round_up(rows.count, kDepth);
    auto* to = static_cast<uint16_t*>(memory);
    const Matrix out{to, stride, padded * stride, parts_of(rows.dtype)};
    switch (rows.dtype) {
      case DType::kFloat32:
        take_apart<DType::kFloat32>(rows, out, to);
        break;
      case DType::kFloat16:
        take_apart<DType::kFloat16>(rows, out, to);
        break;
      case DType::kBFloat16:
        for (int64_t i = 0; i < rows.count; ++i) {
          __builtin_memcpy(to + i * stride, rows.row(i), rows.width * 2);
          __builtin_memset(to + i * stride + rows.width, 0, (stride - rows.width) * 2);
        }
        break;
      case DType::kInt8:
        take_apart<DType::kInt8>(rows, out, to);
        break;
    }
    for (int part = 0; part < out.parts; ++part) {
      __builtin_memset(to + part * out.part + rows.count * stride, 0, (padded - rows.count) * stride * 2);
    }
    return out;
  }
  // bfloat16 rows in order that need no padding are used in place.
  static Matrix matrix_or_alias(const Rows& rows, void* memory) {
    const bool whole = rows.count % kDepth == 0 && rows.width % kDepth == 0;
    if (rows.dtype != DType::kBFloat16 || rows.list != nullptr || !whole) return matrix(rows, memory);
    return {reinterpret_cast<const uint16_t*>(rows.rows), rows.stride / 2, 0, 1};
  }

  static Across across(const Matrix& from, int64_t count, int64_t width, void* memory) {
    const int64_t stride = round_up(count, kDepth), rows = round_up(width, kDepth);
    auto* to = static_cast<uint16_t*>(memory);
    const Matrix out{to, stride, stride * rows, from.parts};
    for (int part = 0; part < out.parts; ++part) {
      for (int64_t i = 0; i < count; i += kDepth) {
        for (int64_t j = 0; j < rows; j += 8) {
          Units columns[8];
          const uint16_t* square = from.data + part * from.part + i * from.stride + j;
          load_columns<2, false, true>(reinterpret_cast<const char*>(square), from.stride * 2, nullptr, 16, columns);
#pragma GCC unroll 8  // else the columns spill to memory
          for (int c = 0; c < 8; ++c) store(to + part * out.part + (j + c) * stride + i, columns[c]);
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

  template <int kParts>
  static void put_pair(Panel panel, int64_t pair, int column, Floats even, Floats odd) {
    uint32_t* to = panel.data + pair * kColumns + column;
    for (int part = 0; part < kParts; ++part) store(to + part * panel.part, take_pair(even, odd));
  }
  // The padding meets zeros of A: uninitialised memory could hold NaN.
  static void end_panel(Panel panel, int64_t depth) {
    const int64_t end = round_up(depth, kDepth) / 2, begin = (depth + 1) / 2;
    for (int part = 0; part < panel.parts; ++part) {
      __builtin_memset(panel.data + part * panel.part + begin * kColumns, 0, (end - begin) * kColumns * 4);
    }
  }

  static Panel panel_of(float* numbers, int64_t depth, int columns, Panel panel) {
    switch (panel.parts) {
      case 1:
        return fill_with_floats<1>(numbers, depth, columns, panel);
      case 2:
        return fill_with_floats<2>(numbers, depth, columns, panel);
      default:
        return fill_with_floats<3>(numbers, depth, columns, panel);
    }
  }

 private:
  // Splits the nearest bfloat16 (ties away from zero) off even and odd, which must not be special (a NaN may become
  // infinity or zero). Result: its bits, even in the lower half of each unit, odd in the upper.
  static Units take_pair(Floats& even, Floats& odd) {
    const Units low = ((Units)even + 0x8000u) & 0xffff0000u, high = ((Units)odd + 0x8000u) & 0xffff0000u;
    even -= (Floats)low;
    odd -= (Floats)high;
    return low >> 16 | high;
  }

  // Deinterleaves: the lower halves of all units, then the upper halves.
  static Units in_order(Units pairs) {
    alignas(64) static constexpr uint16_t kOrder[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    return (Units)_mm512_permutexvar_epi16(load<__m512i>(kOrder), (__m512i)pairs);
  }

  // NaN, infinity, and finite numbers that round to a bfloat16 infinity.
  static Ints is_special(Floats x) { return ((Units)x & 0x7fffffffu) >= 0x7f7f8000u; }

  // Splits a bfloat16 off any numbers. Of infinity and NaN nothing remains; the largest finite numbers are truncated
  // instead of rounded to infinity.
  static Halves take_special(Floats& x) {
    const Units bits = (Units)x, magnitude = bits & 0x7fffffffu, special = (Units)is_special(x);
    const Units quiet = (Units)(magnitude > 0x7f800000u) & 0x00400000u;
    const Units part = (((bits + 0x8000u) & ~special) | ((bits | quiet) & special)) & 0xffff0000u;
    x = only((Ints)(magnitude < 0x7f800000u), x - (Floats)part);
    return __builtin_convertvector(part >> 16, Halves);
  }

  template <int kParts>
  static Panel fill_with_floats(const float* numbers, int64_t depth, int columns, Panel panel) {
    for (int64_t k = 0; k < depth; k += 2) {
      for (int c = 0; c < columns; c += kLanes) {
        const float* from = numbers + k * kColumns + c;
        put_pair<kParts>(panel, k / 2, c, load<Floats>(from), k + 1 < depth ? load<Floats>(from + kColumns) : Floats{});
      }
    }
    end_panel(panel, depth);
    return panel;
  }

  template <DType kType>
  static void take_apart(const Rows& rows, const Matrix& out, uint16_t* memory) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const char* row = rows.row(i);
      for (int64_t j = 0; j < out.stride; j += 2 * kLanes) {
        Floats a = load_floats<kType>(row + j * element_bytes(kType), rows.width - j);
        Floats b = load_floats<kType>(row + (j + kLanes) * element_bytes(kType), rows.width - j - kLanes);
        uint16_t* to = memory + i * out.stride + j;
        const bool ordinary = !any(is_special(a) | is_special(b));
        for (int part = 0; part < parts_of(kType); ++part, to += out.part) {
          if (ordinary) {
            store(to, in_order(take_pair(a, b)));
          } else {
            store(to, take_special(a));
            store(to + kLanes, take_special(b));
          }
        }
      }
    }
  }
};

}  // namespace GRANK_ISA
}  // namespace grank
#endif
