// 64 queries, one a column, that attend to the keys of their user, some keys after the others: online softmax.
//
//   out[:, c] = sum_k 2^(x[k, c] - max[c]) v[k],  sum[c] = sum_k 2^(x[k, c] - max[c]),  x = log2(e) (scale[c] q_c k +
//   bias[k])
//
// `max` need not be the largest, only near: it is raised, and what is there scaled down, where a logit is above it by
// more than 8, so that no weight is above 2^8. Nothing else is rescaled. All float32; weights are rounded to the
// values' number of parts where the product has parts (tile_product_parts.h). An overflowed sum would take 2^120 keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile_product.h"

namespace grank {
namespace GRANK_ISA {

template <typename Tiles>
struct QueryTile {
  typename Tiles::Panel queries;
  float* out;                         // (width of values, padded, 64), not yet divided by `sum`
  alignas(64) float scale[kColumns];  // takes a product to its exponent of 2
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

// Some keys of a user and their values.
template <typename Tiles>
struct KeyBlock {
  typename Tiles::Matrix keys;
  typename Tiles::Across values;
  int64_t count;
  int64_t d;   // width of keys
  int64_t h;   // width of values
  bool first;  // of the user's
};

// Calls f with the number of parts, which is at least 1 and at most Tiles::kMostParts, as a constant.
template <typename Tiles, typename F>
void with_parts(typename Tiles::Panel panel, F f) {
  constexpr int kMost = Tiles::kMostParts;
  switch (Tiles::parts(panel)) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant < int, kMost<2 ? kMost : 2>());
    case 3:
      return f(std::integral_constant < int, kMost<3 ? kMost : 3>());
  }
}

// Writes f(k) for the columns from `column` on.
template <typename Tiles, int kParts, typename F>
inline void put_numbers(typename Tiles::Panel panel, int64_t count, int column, F f) {
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    const Floats even = f(k), odd = f(k + 1);
    Tiles::template put_pair<kParts>(panel, k / 2, column, even, odd);
  }
  if (k < count) Tiles::template put_pair<kParts>(panel, k / 2, column, f(k), Floats{});
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

// Turns logits[k][c], which `scale` takes to exponents of 2, into weights and adds them up; raises maxima, and scales
// what is there down, where that is due.
template <int kParts, typename Tiles>
void weigh(const float* logits, const float* scale, const KeyBlock<Tiles>& block, QueryTile<Tiles>& tile,
           typename Tiles::Panel weights) {
  constexpr float kSlack = 8;
  for (int c = 0; c < tile.columns; c += kLanes) {
    const Floats by = load<Floats>(scale + c);
    const Floats before = load<Floats>(tile.max + c);
    const Floats found = largest(logits + c, block.count, by, before);
    const Ints raise = found > before + kSlack;
    const Floats max = (Floats)(((Ints)found & raise) | ((Ints)before & ~raise));
    Floats sum = load<Floats>(tile.sum + c);
    if (any(raise)) {
      const Floats down = exp2(only(raise & (before > -__builtin_inff()), before - max));
      sum *= down;
      for (int64_t i = 0; i < (block.first ? 0 : block.h); ++i) {
        float* out = tile.out + i * kColumns + c;
        store(out, load<Floats>(out) * down);
      }
      store(tile.max + c, max);
    }
    const Floats zero = -only(max > -__builtin_inff(), max);  // where all logits are -inf, weights are 0
    put_numbers<Tiles, kParts>(weights, block.count, c, [&](int64_t k) {
      const Floats weight = exp2(multiply_add(load<Floats>(logits + k * kColumns + c), by, zero));
      sum += weight;
      return weight;
    });
    store(tile.sum + c, sum);
  }
}

// Adds a block's weighted values to a tile, its weights being in the panel.
template <typename Tiles>
void add_values(const KeyBlock<Tiles>& block, typename Tiles::Panel weights, QueryTile<Tiles>& tile) {
  Tiles::end_panel(weights, block.count);
  if (block.first) {
    Tiles::template multiply<false>(block.values, block.h, weights, block.count, tile.columns, tile.out);
  } else {
    Tiles::template multiply<true>(block.values, block.h, weights, block.count, tile.columns, tile.out);
  }
}

// logits[k][c] = scale[c] logits[k][c] + factor bias[k]
inline void add_bias(float* logits, int64_t count, const float* scale, const float* bias, int64_t bias_stride,
                     float factor, int columns) {
  for (int64_t k = 0; k < count; ++k) {
    const Floats add = broadcast<Floats>(bias[k * bias_stride] * factor);
    for (int c = 0; c < columns; c += kLanes) {
      float* x = logits + k * kColumns + c;
      store(x, multiply_add(load<Floats>(x), load<Floats>(scale + c), add));
    }
  }
}

}  // namespace GRANK_ISA
}  // namespace grank
