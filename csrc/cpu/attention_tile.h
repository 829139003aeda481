// 64 queries, one a column, that attend to the keys of their user, some keys after the others: online softmax.
//
//   out[:, c] = sum_k 2^(x[k, c] - max[c]) v[k],  sum[c] = sum_k 2^(x[k, c] - max[c]),  x = log2(e) (scale[c] q_c k + bias[k])
//
// `max` need not be the largest, only near: it is raised, and what is there scaled down, where a logit is above it by
// more than 8, so that no weight is above 2^8. Nothing else is rescaled. All float32; weights are rounded to the values'
// number of parts where the product has parts (tile_product_amx.h). An overflowed sum would take 2^120 keys.
#pragma once

#include <cstdint>

#include "tile_product.h"

namespace grank {
namespace GRANK_ISA {

template <typename Tiles>
struct QueryTile {
  typename Tiles::Panel queries;
  float* out;  // (rows padded, 64), not yet divided by `sum`
  alignas(64) float scale[kColumns];
  alignas(64) float max[kColumns];
  alignas(64) float sum[kColumns];
  int columns;  // that are worth computing

  void begin(typename Tiles::Panel panel, float* sums, int64_t count) {
    queries = panel;
    out = sums;
    columns = static_cast<int>(round_up(count, 32));
    for (int c = 0; c < kColumns; ++c) max[c] = -__builtin_inff(), sum[c] = 0;
  }
};

// logits[k][c] = scale[c] logits[k][c] + bias[k]
inline void add_bias(float* logits, int64_t count, const float* scale, const float* bias, int64_t bias_stride, int columns) {
  for (int64_t k = 0; k < count; ++k) {
    const Floats add = broadcast<Floats>(bias[k * bias_stride]);
    for (int c = 0; c < columns; c += kLanes) {
      float* x = logits + k * kColumns + c;
      store(x, multiply_add(load<Floats>(x), load<Floats>(scale + c), add));
    }
  }
}

// The largest of scale * logits[k] for k < count, or `start`.
inline Floats largest(const float* logits, int64_t count, Floats scale, Floats start) {
  Floats a = start, b = start;
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    a = larger(a, load<Floats>(logits + k * kColumns) * scale);
    b = larger(b, load<Floats>(logits + (k + 1) * kColumns) * scale);
  }
  if (k < count) a = larger(a, load<Floats>(logits + k * kColumns) * scale);
  return larger(a, b);
}

// Turns logits[k][c], which `scale` takes to the exponents of 2, into weights, adds them up, and raises maxima and
// scales what is there down where that is due.
template <typename Tiles>
void weigh(const float* logits, int64_t count, const float* scale, QueryTile<Tiles>& tile, int64_t out_rows,
           typename Tiles::Panel weights) {
  constexpr float kSlack = 8;
  for (int c = 0; c < tile.columns; c += kLanes) {
    const Floats by = load<Floats>(scale + c);
    const Floats before = load<Floats>(tile.max + c);
    const Floats found = largest(logits + c, count, by, before);
    const Ints raise = found > before + kSlack;
    const Floats max = (Floats)(((Ints)found & raise) | ((Ints)before & ~raise));
    Floats sum = load<Floats>(tile.sum + c);
    if (any(raise)) {
      const Floats down = exp2(only(raise & (before > -__builtin_inff()), before - max));
      sum *= down;
      for (int64_t i = 0; i < out_rows; ++i) {
        float* out = tile.out + i * kColumns + c;
        store(out, load<Floats>(out) * down);
      }
      store(tile.max + c, max);
    }
    const Floats zero = only(max > -__builtin_inff(), max);  // where all logits are -inf, weights are 0
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      const Floats even = exp2(multiply_add(load<Floats>(logits + k * kColumns + c), by, -zero));
      const Floats odd = exp2(multiply_add(load<Floats>(logits + (k + 1) * kColumns + c), by, -zero));
      sum += even + odd;
      Tiles::put_pair(weights, k / 2, c, even, odd);
    }
    if (k < count) {
      const Floats even = exp2(multiply_add(load<Floats>(logits + k * kColumns + c), by, -zero));
      sum += even;
      Tiles::put_pair(weights, k / 2, c, even, Floats{});
    }
    store(tile.sum + c, sum);
  }
  Tiles::end_panel(weights, count);
}

}  // namespace GRANK_ISA
}  // namespace grank
