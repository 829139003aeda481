// The product that everything about attention is made of, for the kernels that are compiled once per instruction set:
//
//   C (m, 64)  =  [C +]  A (m, depth)  B (depth, 64)
//
// The 64 columns are candidates (or keys, in the backward pass for keys) and lie in the lanes, so that softmax needs no
// sum across a register and what a column holds depends on no other column. B is a panel: 64 numbers of one dimension
// after the other. A is a matrix in memory, row by row, as its rows or as its columns ("across").
//
// Float products: float32 fused multiply-adds over the depth ascending, in segments of kSegment, each summed from zero
// and then added to C; the same order, hence the same bits, for every instruction set with FMA. 6 x 4 vectors of 16 are
// summed in registers where there are 32 of them, else 6 x 2. Operands in bfloat16 parts (tile_product_parts.h) are
// multiplied by AMX (tile_product_amx.h), and bfloat16 itself by AVX-512's dot products (tile_product_pairs.h).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace grank {
namespace GRANK_ISA {

constexpr int kColumns = 64;

// Rows of numbers in memory, of any dtype: the row of number i stands at rows + (list ? list[i] : i) * stride.
struct Rows {
  const char* rows;
  int64_t stride;  // bytes
  DType dtype;
  int64_t count;
  int64_t width;
  const uint32_t* list = nullptr;

  const char* row(int64_t i) const { return rows + (list != nullptr ? list[i] : i) * stride; }
};

// Hands out pieces of a block of memory. Started at 0 it only counts the bytes.
class Pieces {
 public:
  explicit Pieces(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)), at_(begin_) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = at_;
    at_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

  int64_t taken() const { return static_cast<int64_t>(at_ - begin_); }

 private:
  uintptr_t begin_, at_;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <DType kType>
inline Floats as_floats(const void* numbers) {
  if constexpr (kType == DType::kFloat32) {
    return load<Floats>(numbers);
  } else if constexpr (kType == DType::kFloat16) {
    return float_of_float16(load<Halves>(numbers));
  } else if constexpr (kType == DType::kBFloat16) {
    return float_of_bfloat16(load<Halves>(numbers));
  } else {
    return __builtin_convertvector(load<Bytes>(numbers), Floats);
  }
}

// The first `count` numbers at p, up to kLanes, and zeros.
template <DType kType>
inline Floats load_floats(const char* p, int64_t count) {
  if (count >= kLanes) return as_floats<kType>(p);
  char numbers[kLanes * element_bytes(kType)] = {};
  if (count > 0) __builtin_memcpy(numbers, p, count * element_bytes(kType));
  return as_floats<kType>(numbers);
}

// Exchanges rows and columns of 32-bit units: 64 rows (fewer: the last one repeated) into units of 256 bytes.
inline void transpose_units(const char* rows, int64_t stride, int64_t count, int64_t units, uint32_t* panel) {
  for (int first = 0; first < kColumns; first += kLanes) {
    uint32_t list[kLanes];
    for (int i = 0; i < kLanes; ++i) list[i] = static_cast<uint32_t>(first + i < count ? first + i : count - 1);
    for (int64_t j = 0; j < units; j += 4) {
      Units columns[4];
      load_columns<4, true, true>(rows + 4 * j, stride, list, 16, columns);
#pragma GCC unroll 4  // or the columns would leave the registers
      for (int i = 0; i < 4; ++i) store(panel + (j + i) * kColumns + first, columns[i]);
    }
  }
}

// Columns as rows again: numbers[j][c] * scale[c], rounded to dtype, to element j of row c, for j < width, c < count.
// Reads numbers of `width` rounded up to kLanes.
inline void write_rows(const float* numbers, int64_t width, int64_t count, const float* scale, DType dtype, char* rows,
                       int64_t stride) {
  const int64_t bytes = element_bytes(dtype);
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t left = width - j < kLanes ? width - j : kLanes;
    for (int64_t c = 0; c < count; c += 4) {
      Units columns[4];
      load_columns<4, false, true>(reinterpret_cast<const char*>(numbers + j * kColumns + c), kColumns * 4, nullptr, 16,
                                   columns);
      for (int i = 0; i < 4 && c + i < count; ++i) {
        const Floats x = (Floats)columns[i] * scale[c + i];
        char* to = rows + (c + i) * stride + j * bytes;
        if (dtype == DType::kFloat32) {
          __builtin_memcpy(to, &x, left * 4);
        } else {
          const Halves halves = dtype == DType::kFloat16 ? float16_of_float(x) : bfloat16_of_float(x);
          __builtin_memcpy(to, &halves, left * 2);
        }
      }
    }
  }
}

struct FloatTiles {
  static constexpr int kKeys = 96;  // keys that a tile of candidates meets at once: kKeys x 64 logits stay in 24 KiB

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

  // For the whole life of a kernel's step.
  struct Session {};

  static int64_t padded(int64_t width) { return round_up(width, 4); }

  // Memory for `count` rows, for what across() makes of them, and for a panel.
  static void* take_matrix(Pieces& pieces, DType, int64_t count, int64_t width) {
    return pieces.take<float>(count * padded(width));
  }
  static void* take_across(Pieces&, DType, int64_t, int64_t) { return nullptr; }
  static Panel take_panel(Pieces& pieces, DType, int64_t depth) {
    return {pieces.take<float>(padded(depth) * kColumns)};
  }
  // For numbers (depth, 64) that there are anyway.
  static Panel take_panel_of_floats(Pieces&, DType, int64_t) { return {nullptr}; }

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

  // float32 rows one after the other are used where they are.
  static Matrix matrix_or_alias(const Rows& rows, void* memory) {
    if (rows.dtype != DType::kFloat32 || rows.list != nullptr) return matrix(rows, memory);
    return {reinterpret_cast<const float*>(rows.rows), rows.stride / 4};
  }

  static Across across(const Matrix& matrix, int64_t, int64_t, void*) { return {matrix}; }

  // The first 64 rows as columns.
  static void fill_panel(const Matrix& matrix, int64_t count, int64_t width, Panel panel) {
    transpose_units(reinterpret_cast<const char*>(matrix.data), matrix.stride * 4, count, padded(width),
                    reinterpret_cast<uint32_t*>(panel.data));
  }

  // Dimensions 2 * pair and 2 * pair + 1 of the columns from `column` on.
  template <int>
  static void put_pair(Panel panel, int64_t pair, int column, Floats even, Floats odd) {
    store(panel.data + 2 * pair * kColumns + column, even);
    store(panel.data + (2 * pair + 1) * kColumns + column, odd);
  }
  static void end_panel(Panel, int64_t) {}
  // numbers (depth, 64) as a panel; `panel` is where it may be made.
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
  static constexpr int kBlock = 6;  // rows of A at once
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

}  // namespace GRANK_ISA
}  // namespace grank
