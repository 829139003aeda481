// 64 queries, one a column, that attend to the keys of their user, some keys after the others: online softmax.
//
//   out[:, c] = sum_k 2^(x[k, c] - max[c]) v[k],  sum[c] = sum_k 2^(x[k, c] - max[c]),  x = log2(e) (scale[c] q_c k +
//   bias[k])
//
// `max` need not be the largest, only near: it is raised, and what is there scaled down, where a logit is above it by
// more than 8, so that no weight is above 2^8. Nothing else is rescaled. All float32; weights are rounded to the
// values' number of parts where the product has parts (tile_product_parts.h). An overflowed sum would take 2^120 keys.
//
// A maximum of 2^20 or more in size is "far": the rounding of a float32 there reaches the size of an exponent, so a far
// column keeps the logit itself, `peak`, and takes the differences of logits, which are exact where they matter.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile_product.h"

namespace grank {
namespace GRANK_ISA {

template <typename Tiles>
struct QueryTile {
  typename Tiles::Panel queries;
  float* out;                               // (width of values, padded, 64), not yet divided by `sum`
  alignas(64) float logit_scale[kColumns];  // takes a product to its logit
  alignas(64) float scale[kColumns];        // takes a product to its exponent of 2, log2(e) times the former
  alignas(64) float max[kColumns];
  alignas(64) float sum[kColumns];
  alignas(64) float peak[kColumns];  // of far columns: the largest logit, of which `max` is the rounded exponent
  int columns;                       // that are worth computing

  void begin(typename Tiles::Panel panel, float* sums, int64_t count) {
    queries = panel;
    out = sums;
    columns = static_cast<int>(round_up(count, 32));
    for (int c = 0; c < kColumns; ++c) max[c] = -__builtin_inff(), sum[c] = 0, peak[c] = __builtin_nanf("");
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

// Writes f(k) for the columns from `column` on; without parts it is computed and not written.
template <typename Tiles, int kParts, typename F>
inline void put_numbers(typename Tiles::Panel panel, int64_t count, int column, F f) {
  if constexpr (kParts == 0) {
    for (int64_t k = 0; k < count; ++k) f(k);
  } else {
    int64_t k = 0;
    for (; k + 2 <= count; k += 2) {
      const Floats even = f(k), odd = f(k + 1);
      Tiles::template put_pair<kParts>(panel, k / 2, column, even, odd);
    }
    if (k < count) Tiles::template put_pair<kParts>(panel, k / 2, column, f(k), Floats{});
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

constexpr float kSlack = 8;      // a maximum is raised by logits that are above it by more, in exponents of 2
constexpr float kFar = 0x1p20f;  // see above

inline Ints is_far(Floats max) { return only(Ints{} + 0x7fffffff, max) >= kFar; }
inline bool is_far(float max) { return __builtin_fabsf(max) >= kFar; }
inline Floats blend(Ints where, Floats a, Floats b) { return (Floats)(((Ints)a & where) | ((Ints)b & ~where)); }

// Multiplies the sums of a block's columns from `column` on by `down`.
template <typename Tiles>
void scale_down(const KeyBlock<Tiles>& block, QueryTile<Tiles>& tile, int column, Floats down) {
  for (int64_t i = 0; i < (block.first ? 0 : block.h); ++i) {
    float* out = tile.out + i * kColumns + column;
    store(out, load<Floats>(out) * down);
  }
}

// Turns logits[k][c], which `scale` takes to exponents of 2, into weights and adds them up; raises maxima, and scales
// what is there down, where that is due. Returns the vectors of columns with a far maximum, one bit each, lowest first:
// these are left to weigh_far().
template <int kParts, typename Tiles>
unsigned weigh(const float* logits, const float* scale, const KeyBlock<Tiles>& block, QueryTile<Tiles>& tile,
               typename Tiles::Panel weights) {
  unsigned far = 0;
  for (int c = 0; c < tile.columns; c += kLanes) {
    const Floats by = load<Floats>(scale + c);
    const Floats before = load<Floats>(tile.max + c);
    const Floats found = largest(logits + c, block.count, by, before);
    if (any(is_far(found))) {
      far |= 1u << (c / kLanes);
      continue;
    }
    const Ints raise = found > before + kSlack;
    const Floats max = (Floats)(((Ints)found & raise) | ((Ints)before & ~raise));
    Floats sum = load<Floats>(tile.sum + c);
    if (any(raise)) {
      const Floats down = exp2(only(raise & (before > -__builtin_inff()), before - max));
      sum *= down;
      scale_down(block, tile, c, down);
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
  return far;
}

// Biases of a block's keys, or null.
struct Bias {
  const float* data;
  int64_t stride;
  float operator[](int64_t k) const { return data[k * stride]; }
};

// The same for the vectors of columns that weigh() has left, from the products, without scale and bias. Columns that
// are not far get the bits that weigh() gives them, so that no column depends on its neighbours.
template <int kParts, typename Tiles>
[[gnu::noinline, gnu::cold]] void weigh_far(unsigned vectors, const float* products, Bias bias,
                                            const KeyBlock<Tiles>& block, QueryTile<Tiles>& tile,
                                            typename Tiles::Panel weights) {
  const Floats infinity = broadcast<Floats>(__builtin_inff());
  for (int c = 0; c < tile.columns; c += kLanes) {
    if ((vectors >> (c / kLanes) & 1) == 0) continue;
    const bool biased = bias.data != nullptr;
    const Floats scale = load<Floats>(tile.scale + c), logit_scale = load<Floats>(tile.logit_scale + c);
    const Floats one = broadcast<Floats>(1.0f);
    const Floats by = biased ? one : scale;                          // takes an exponent() to the exponent of 2
    const Floats unit = biased ? broadcast<Floats>(kLog2E) : scale;  // takes the difference of two logit() to one
    const auto exponent = [&](int64_t k) {
      const Floats x = load<Floats>(products + k * kColumns + c);
      return biased ? multiply_add(x, scale, broadcast<Floats>(bias[k] * kLog2E)) : x;
    };
    const auto logit = [&](int64_t k) {
      const Floats x = load<Floats>(products + k * kColumns + c);
      return biased ? multiply_add(x, logit_scale, broadcast<Floats>(bias[k])) : x;
    };
    const Ints sign = (Ints)unit & (Ints{} + INT32_MIN);  // of a negative scale: the largest exponent, smallest logit
    const Floats before = load<Floats>(tile.max + c), peak = load<Floats>(tile.peak + c);
    const Ints was_far = is_far(before);
    Floats found = before, top = blend(was_far, (Floats)((Ints)peak ^ sign), broadcast<Floats>(__builtin_nanf("")));
    for (int64_t k = 0; k < block.count; ++k) {
      found = larger(found, exponent(k) * by);
      top = larger(top, (Floats)((Ints)logit(k) ^ sign));
    }
    top = (Floats)((Ints)top ^ sign);
    const Ints far = is_far(found);
    const Ints raise = found > before + kSlack;
    const Floats max = blend(far & (top == top), top * unit, blend(raise & ~far, found, before));
    const Floats down_far =
        only(~was_far | (peak == peak), exp2(blend(was_far, only(peak != top, (peak - top) * unit), before - max)));
    const Floats down = blend(far, down_far, exp2(only(raise & (before > -infinity), before - max)));
    scale_down(block, tile, c, down);
    store(tile.max + c, max);
    store(tile.peak + c, blend(far, top, peak));
    Floats sum = load<Floats>(tile.sum + c) * down;
    const Floats zero = -only(max > -infinity, max);
    const Floats base = only((top * unit > -infinity) | (only(Ints{} + 0x7fffffff, top) < infinity), top);
    put_numbers<Tiles, kParts>(weights, block.count, c, [&](int64_t k) {
      const Floats near = multiply_add(exponent(k), by, zero);
      const Floats weight = exp2(blend(far, (logit(k) - base) * unit, near));
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
inline void add_bias(float* logits, int64_t count, const float* scale, Bias bias, float factor, int columns) {
  for (int64_t k = 0; k < count; ++k) {
    const Floats add = broadcast<Floats>(bias[k] * factor);
    for (int c = 0; c < columns; c += kLanes) {
      float* x = logits + k * kColumns + c;
      store(x, multiply_add(load<Floats>(x), load<Floats>(scale + c), add));
    }
  }
}

// Adds a block's keys and values to a tile by softmax. With values of width 0 the weights are summed and not stored.
template <typename Tiles>
void attend_by_softmax(const KeyBlock<Tiles>& block, Bias bias, float* logits, typename Tiles::Panel weights,
                       QueryTile<Tiles>& tile) {
  const auto multiply = [&] {
    Tiles::template multiply<false>(block.keys, block.count, tile.queries, block.d, tile.columns, logits);
  };
  alignas(64) float ones[kColumns];
  multiply();
  const float* scale = tile.scale;
  if (bias.data != nullptr) {
    add_bias(logits, block.count, tile.scale, bias, kLog2E, tile.columns);
    for (float& one : ones) one = 1;
    scale = ones;
  }
  const auto weigh_block = [&](auto parts) {
    const unsigned far = weigh<parts>(logits, scale, block, tile, weights);
    if (far == 0) return;
    if (bias.data != nullptr) multiply();
    weigh_far<parts>(far, logits, bias, block, tile, weights);
  };
  if (block.h == 0) return weigh_block(std::integral_constant<int, 0>());
  with_parts<Tiles>(weights, weigh_block);
  add_values(block, weights, tile);
}

constexpr float kLn2 = 0x1.62e43p-1f;

// The logarithm of the sum of the exponentials of a column's logits, of which one is above -infinity.
template <typename Tiles>
float lse_of(const QueryTile<Tiles>& tile, int64_t c, bool biased) {
  if (!is_far(tile.max[c])) return (tile.max[c] + __builtin_log2f(tile.sum[c])) * kLn2;
  const float logit = biased ? tile.peak[c] : tile.peak[c] * tile.logit_scale[c];
  return logit + __builtin_log2f(tile.sum[c]) * kLn2;
}

}  // namespace GRANK_ISA
}  // namespace grank
