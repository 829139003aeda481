// The product of tile_product.h in float32: fused multiply-adds over the depth ascending, in segments of kSegment, each
// summed from zero and then added to C. The same order, hence the same bits, for every instruction set with FMA.
// Register block: 6 x 4 vectors of 16 floats with 32 registers, else 6 x 2.
#pragma once

#include "tile_product.h"

namespace grank {
namespace GRANK_ISA {

struct FloatTiles {
  static constexpr int kKeys = 96;  // 24 KiB of logits

  struct Matrix {
    const float* data;
    int64_t stride;
  };
  struct Across {
    Matrix matrix;
  };
  struct Panel {
    float* data;
  };

  static constexpr int kMostParts = 1;
  static int parts(Panel) { return 1; }

  struct Session {};

  static int64_t padded(int64_t width) { return round_up(width, 4); }

  static void* take_matrix(Arena& arena, DType, int64_t count, int64_t width) {
    return arena.take<float>(count * padded(width));
  }
  static void* take_across(Arena&, DType, int64_t, int64_t) { return nullptr; }
  static Panel take_panel(Arena& arena, DType, int64_t depth) { return {arena.take<float>(padded(depth) * kColumns)}; }
  // Float panels are used in place: nothing is allocated.
  static Panel take_panel_of_floats(Arena&, DType, int64_t) { return {nullptr}; }

  static Matrix matrix(const Rows& rows, void* memory) {
    const Matrix out{static_cast<float*>(memory), padded(rows.width)};
    switch (rows.dtype) {
      case DType::kFloat32:
        convert<DType::kFloat32>(rows, static_cast<float*>(memory));
        break;
      case DType::kFloat16:
        convert<DType::kFloat16>(rows, static_cast<float*>(memory));
        break;
      case DType::kBFloat16:
        convert<DType::kBFloat16>(rows, static_cast<float*>(memory));
        break;
      case DType::kInt8:
        convert<DType::kInt8>(rows, static_cast<float*>(memory));
        break;
    }
    return out;
  }

  // float32 rows in order are used in place.
  static Matrix matrix_or_alias(const Rows& rows, void* memory) {
    if (rows.dtype != DType::kFloat32 || rows.list != nullptr) return matrix(rows, memory);
    return {reinterpret_cast<const float*>(rows.rows), rows.stride / 4};
  }

  static Across across(const Matrix& matrix, int64_t, int64_t, void*) { return {matrix}; }

  static void fill_panel(const Matrix& matrix, int64_t count, int64_t width, Panel panel) {
    transpose_units(reinterpret_cast<const char*>(matrix.data), matrix.stride * 4, count, padded(width),
                    reinterpret_cast<uint32_t*>(panel.data));
  }

  template <int>
  static void put_pair(Panel panel, int64_t pair, int column, Floats even, Floats odd) {
    store(panel.data + 2 * pair * kColumns + column, even);
    store(panel.data + (2 * pair + 1) * kColumns + column, odd);
  }
  static void end_panel(Panel, int64_t) {}
  static Panel panel_of(float* numbers, int64_t, int, Panel) { return {numbers}; }

  template <bool kAdd>
  static void multiply(const Matrix& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    multiply_blocks<false, kAdd>(a, m, b, depth, columns, c);
  }
  template <bool kAdd>
  static void multiply(const Across& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    multiply_blocks<true, kAdd>(a.matrix, m, b, depth, columns, c);
  }

 private:
  static constexpr int kBlock = 6;  // rows of A per register block
  static constexpr int kVectors = kLanes == 16 ? 4 : 2;
  static constexpr int kSegment = 128;

  template <DType kType>
  static void convert(const Rows& rows, float* out) {
    const int64_t stride = padded(rows.width);
    for (int64_t i = 0; i < rows.count; ++i, out += stride) {
      const char* row = rows.row(i);
      for (int64_t j = 0; j < stride; j += kLanes) {
        const Floats x = load_floats<kType>(row + j * element_bytes(kType), rows.width - j);
        __builtin_memcpy(out + j, &x, stride - j < kLanes ? (stride - j) * 4 : sizeof x);
      }
    }
  }

  template <bool kAcross, bool kAdd, int kRows, int kVectors>
  static void multiply_block(const float* a, int64_t stride, const float* b, int64_t depth, float* c) {
    Floats sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Floats columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = load<Floats>(b + k * kColumns + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Floats left = broadcast<Floats>(kAcross ? a[k * stride + i] : a[i * stride + k]);
        for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add(left, columns[v], sums[i][v]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + i * kColumns + v * kLanes;
        store(to, kAdd ? load<Floats>(to) + sums[i][v] : sums[i][v]);
      }
    }
  }

  template <bool kAcross, bool kAdd, int kVectors>
  static void multiply_columns(const Matrix& a, int64_t m, const float* b, int64_t depth, float* c) {
    const int64_t step = kAcross ? 1 : a.stride;
    int64_t i = 0;
    for (; i + kBlock <= m; i += kBlock) {
      multiply_block<kAcross, kAdd, kBlock, kVectors>(a.data + i * step, a.stride, b, depth, c + i * kColumns);
    }
    const float* last = a.data + i * step;
    c += i * kColumns;
    static_assert(kBlock == 6, "one case for every smaller block");
    switch (m - i) {
      case 1:
        return multiply_block<kAcross, kAdd, 1, kVectors>(last, a.stride, b, depth, c);
      case 2:
        return multiply_block<kAcross, kAdd, 2, kVectors>(last, a.stride, b, depth, c);
      case 3:
        return multiply_block<kAcross, kAdd, 3, kVectors>(last, a.stride, b, depth, c);
      case 4:
        return multiply_block<kAcross, kAdd, 4, kVectors>(last, a.stride, b, depth, c);
      case 5:
        return multiply_block<kAcross, kAdd, 5, kVectors>(last, a.stride, b, depth, c);
    }
  }

  template <bool kAcross, bool kAdd>
  static void multiply_segment(const Matrix& a, int64_t m, const float* b, int64_t depth, int columns, float* c) {
    int v = 0;
    for (; v + kVectors <= columns / kLanes; v += kVectors) {
      multiply_columns<kAcross, kAdd, kVectors>(a, m, b + v * kLanes, depth, c + v * kLanes);
    }
    for (; v < columns / kLanes; ++v) multiply_columns<kAcross, kAdd, 1>(a, m, b + v * kLanes, depth, c + v * kLanes);
  }

  template <bool kAcross, bool kAdd>
  static void multiply_blocks(const Matrix& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    multiply_segment<kAcross, kAdd>(a, m, b.data, depth < kSegment ? depth : kSegment, columns, c);
    for (int64_t k = kSegment; k < depth; k += kSegment) {
      const Matrix rest{a.data + k * (kAcross ? a.stride : 1), a.stride};
      const int64_t left = depth - k < kSegment ? depth - k : kSegment;
      multiply_segment<kAcross, true>(rest, m, b.data + k * kColumns, left, columns, c);
    }
  }
};

static_assert(is_tile_product<FloatTiles>());

}  // namespace GRANK_ISA
}  // namespace grank
