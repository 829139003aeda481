// The product of tile_product.h with VDPBF16PS (AVX-512 BF16), on operands of one part (tile_product_parts.h): bfloat16
// and int8.
//
// Register block: 4 rows x 4 vectors of 16 floats. Each pair of dimensions takes 4 loads of the panel, 4 broadcasts and
// 16 instructions of two multiply-adds per lane. Accumulation order: dimensions ascending.
#pragma once

#include "tile_product_parts.h"

#if defined(__AVX512BF16__)
namespace grank {
namespace GRANK_ISA {

struct PairTiles : PartTiles {
  struct Session {};

  static constexpr int kMostParts = 1;

  // Computes rows up to a multiple of kBlock, to which A and C are padded.
  template <bool kAdd>
  static void multiply(const Matrix& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    for (int64_t row = 0; row < m; row += kBlock) {
      const uint16_t* left = a.data + row * a.stride;
      if (columns == kColumns) {
        multiply_block<kAdd, 4>(left, a.stride, b.data, depth, c + row * kColumns);
      } else {
        multiply_block<kAdd, 2>(left, a.stride, b.data, depth, c + row * kColumns);
      }
    }
  }
  template <bool kAdd>
  static void multiply(const Across& a, int64_t m, Panel b, int64_t depth, int columns, float* c) {
    multiply<kAdd>(a.matrix, m, b, depth, columns, c);
  }

 private:
  static constexpr int kBlock = 4;  // rows of A per register block

  template <bool kAdd, int kVectors>
  static void multiply_block(const uint16_t* a, int64_t stride, const uint32_t* b, int64_t depth, float* c) {
    Floats sums[kBlock][kVectors];
    for (int i = 0; i < kBlock; ++i) {
      for (int v = 0; v < kVectors; ++v) sums[i][v] = kAdd ? load<Floats>(c + i * kColumns + v * kLanes) : Floats{};
    }
    for (int64_t k = 0; k < depth; k += 2) {
      Units columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = load<Units>(b + k / 2 * kColumns + v * kLanes);
      for (int i = 0; i < kBlock; ++i) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + i * stride + k, sizeof pair);
        const Units left = broadcast<Units>(pair);
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)left, (__m512bh)columns[v]);
        }
      }
    }
    for (int i = 0; i < kBlock; ++i) {
      for (int v = 0; v < kVectors; ++v) store(c + i * kColumns + v * kLanes, sums[i][v]);
    }
  }
};
static_assert(is_tile_product<PairTiles>());

}  // namespace GRANK_ISA
}  // namespace grank
#endif
