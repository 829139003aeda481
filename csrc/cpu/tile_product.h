// The matrix product of the attention kernels:
//
//   C (m, 64)  =  [C +]  A (m, depth)  B (depth, 64)          C float32, row stride 64
//
// The 64 columns are candidates (in the pass for the gradient of keys: keys) and lie in the vector lanes, so that
// softmax needs no horizontal sum and a column's bits depend on no other column.
//
// Compile-time interface, implemented by FloatTiles (tile_product_floats.h), PairTiles (tile_product_pairs.h: AVX-512
// BF16) and AmxTiles (tile_product_amx.h); all members are static, is_tile_product() below checks their types:
//
//   kKeys                             keys per block: kKeys x 64 logits fit the L1 cache
//   kMostParts, parts(panel)          bfloat16 parts per number (tile_product_parts.h), at most kMostParts
//   Session                           thread state while products run, RAII: the tile configuration of AMX
//   Matrix, Across                    A, given by its rows or as the transpose of a Matrix
//   Panel                             B: 64 numbers of one dimension after the other
//
//   take_matrix(arena, dtype, count, width)     memory for matrix() of (count, width); 64 rows for fill_panel()
//   take_across(arena, dtype, count, width)     memory for across() of that matrix
//   take_panel(arena, dtype, depth)             a panel for fill_panel() or put_pair()
//   take_panel_of_floats(arena, dtype, depth)   a panel for panel_of()
//
//   matrix(rows, memory)              converts rows of any dtype
//   matrix_or_alias(rows, memory)     the same; rows that have the layout already are not copied
//   across(matrix, count, width, memory)        (count, width) -> (width, count)
//   fill_panel(matrix, count, width, panel)     the transpose of the first min(count, 64) rows; columns >= count repeat
//                                               the last row
//   put_pair<kParts>(panel, pair, column, even, odd)   writes dimensions 2 pair and 2 pair + 1 of kLanes columns
//   end_panel(panel, depth)           after the last put_pair(): zero padding behind the depth
//   panel_of(numbers, depth, columns, panel)    float32 numbers (depth, 64) as a panel; FloatTiles returns an alias
//   multiply<kAdd>(a, m, panel, depth, columns, c)     the product of a Matrix or Across: the first `columns` columns,
//   a
//                                               multiple of 32; may write rows of C up to the next multiple of 32
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"
#include "simd.h"

namespace grank {
namespace GRANK_ISA {

constexpr int kColumns = 64;

// Rows in memory, of any dtype: row i is at rows + (list ? list[i] : i) * stride.
struct Rows {
  const char* rows;
  int64_t stride;  // bytes
  DType dtype;
  int64_t count;
  int64_t width;
  const uint32_t* list = nullptr;

  const char* row(int64_t i) const { return rows + (list != nullptr ? list[i] : i) * stride; }
};

// Bump allocator over a block of memory, 64-byte aligned. On nullptr it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* memory = nullptr) : begin_(reinterpret_cast<uintptr_t>(memory)), at_(begin_) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t block = at_;
    at_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(block);
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

// The first min(count, kLanes) numbers at p, zero padded.
template <DType kType>
inline Floats load_floats(const char* p, int64_t count) {
  if (count >= kLanes) return as_floats<kType>(p);
  char numbers[kLanes * element_bytes(kType)] = {};
  if (count > 0) __builtin_memcpy(numbers, p, count * element_bytes(kType));
  return as_floats<kType>(numbers);
}

// Transposes rows of 32-bit units: panel[j * 64 + i] = rows[i][j]; with fewer than 64 rows the last one is repeated.
inline void transpose_units(const char* rows, int64_t stride, int64_t count, int64_t units, uint32_t* panel) {
  for (int first = 0; first < kColumns; first += kLanes) {
    uint32_t list[kLanes];
    for (int i = 0; i < kLanes; ++i) list[i] = static_cast<uint32_t>(first + i < count ? first + i : count - 1);
    for (int64_t j = 0; j < units; j += 4) {
      Units columns[4];
      load_columns<4, true, true>(rows + 4 * j, stride, list, 16, columns);
#pragma GCC unroll 4  // else the columns spill to memory
      for (int i = 0; i < 4; ++i) store(panel + (j + i) * kColumns + first, columns[i]);
    }
  }
}

// Transposes back: rows[c][j] = numbers[j][c] * scale[c] rounded to dtype, for j < width, c < count. Reads numbers[j]
// for j < round_up(width, kLanes).
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

template <typename...>
constexpr bool all_declared = true;

// Whether T declares the interface above with these types; a missing or different member does not compile.
template <typename T>
constexpr bool is_tile_product() {
  using Matrix = typename T::Matrix;
  using Across = typename T::Across;
  using Panel = typename T::Panel;
  static_assert(T::kKeys % 32 == 0 && T::kMostParts >= 1);
  static_assert(std::is_default_constructible_v<typename T::Session>);
  static_assert(std::is_trivially_copyable_v<Matrix> && std::is_trivially_copyable_v<Across> &&
                std::is_trivially_copyable_v<Panel>);  // copied into scratch memory
  return all_declared<
      decltype(static_cast<int (*)(Panel)>(&T::parts)),
      decltype(static_cast<void* (*)(Arena&, DType, int64_t, int64_t)>(&T::take_matrix)),
      decltype(static_cast<void* (*)(Arena&, DType, int64_t, int64_t)>(&T::take_across)),
      decltype(static_cast<Panel (*)(Arena&, DType, int64_t)>(&T::take_panel)),
      decltype(static_cast<Panel (*)(Arena&, DType, int64_t)>(&T::take_panel_of_floats)),
      decltype(static_cast<Matrix (*)(const Rows&, void*)>(&T::matrix)),
      decltype(static_cast<Matrix (*)(const Rows&, void*)>(&T::matrix_or_alias)),
      decltype(static_cast<Across (*)(const Matrix&, int64_t, int64_t, void*)>(&T::across)),
      decltype(static_cast<void (*)(const Matrix&, int64_t, int64_t, Panel)>(&T::fill_panel)),
      decltype(static_cast<void (*)(Panel, int64_t, int, Floats, Floats)>(&T::template put_pair<T::kMostParts>)),
      decltype(static_cast<void (*)(Panel, int64_t)>(&T::end_panel)),
      decltype(static_cast<Panel (*)(float*, int64_t, int, Panel)>(&T::panel_of)),
      decltype(static_cast<void (*)(const Matrix&, int64_t, Panel, int64_t, int, float*)>(&T::template multiply<true>)),
      decltype(static_cast<void (*)(const Across&, int64_t, Panel, int64_t, int, float*)>(
          &T::template multiply<true>))>;
}

}  // namespace GRANK_ISA
}  // namespace grank
