// The forward pass; candidate_cross_attention_kernel.h says what is computed.
#include "candidate_cross_attention_kernel.h"

#include "attention_rows.h"
#include "attention_tile.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kGroup = 4;  // tiles of queries a step

struct Scratch {
  Scratch(const CandidateCrossAttentionProblem& p, void* memory) {
    Arena arena(memory);
    queries = Tiles::take_matrix(arena, p.dtype, kColumns, p.d);
    keys = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.d);
    values = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.d);
    across = Tiles::take_across(arena, p.dtype, Tiles::kKeys, p.d);
    logits = arena.take<float>(Tiles::kKeys * kColumns);
    weights = Tiles::take_panel(arena, p.dtype, Tiles::kKeys);
    tiles = arena.take<QueryTile<Tiles>>(kGroup);
    for (int t = 0; t < kGroup; ++t) {
      panels[t] = Tiles::take_panel(arena, p.dtype, p.d);
      out[t] = arena.take<float>(round_up(p.d, 32) * kColumns);
    }
    bytes = arena.taken();
  }

  void *queries, *keys, *values, *across;
  float* logits;
  Tiles::Panel weights;
  QueryTile<Tiles>* tiles;
  Tiles::Panel panels[kGroup];
  float* out[kGroup];
  int64_t bytes;
};

int64_t scratch_bytes(const CandidateCrossAttentionProblem& p) { return Scratch(p, nullptr).bytes; }

// w = silu(scale x) / L
template <int kParts>
void weigh_by_silu(const float* logits, int64_t count, float factor, const QueryTile<Tiles>& tile, const float* scale,
                   Tiles::Panel weights) {
  for (int c = 0; c < tile.columns; c += kLanes) {
    const Floats by = load<Floats>(scale + c);
    put_numbers<Tiles, kParts>(weights, count, c,
                               [&](int64_t k) { return silu(load<Floats>(logits + k * kColumns + c) * by) * factor; });
  }
}

void attend(const CandidateCrossAttentionProblem& p, const KeyBlock<Tiles>& block, Bias bias, float silu_factor,
            const Scratch& s, QueryTile<Tiles>& tile) {
  if (p.activation == AttentionActivation::kSoftmax) {
    return attend_by_softmax(block, bias, s.logits, s.weights, tile);
  }
  alignas(64) float ones[kColumns];
  Tiles::multiply<false>(block.keys, block.count, tile.queries, p.d, tile.columns, s.logits);
  const float* scale = tile.scale;
  if (bias.data != nullptr) {
    add_bias(s.logits, block.count, tile.scale, bias, 1.0f, tile.columns);
    for (float& one : ones) one = 1;
    scale = ones;
  }
  with_parts<Tiles>(
      s.weights, [&](auto parts) { weigh_by_silu<parts>(s.logits, block.count, silu_factor, tile, scale, s.weights); });
  add_values(block, s.weights, tile);
}

// Writes what a tile has come to: out and, of softmax, lse.
void finish(const CandidateCrossAttentionProblem& p, int64_t user, int64_t head, int64_t row, int64_t count,
            bool any_keys, const QueryTile<Tiles>& tile) {
  const bool softmax = p.activation == AttentionActivation::kSoftmax;
  float factor[kColumns];
  for (int64_t c = 0; c < count; ++c) {
    const bool none = !any_keys || (softmax && tile.sum[c] == 0);  // no keys, or all logits -inf
    factor[c] = !softmax || none ? 1.0f : 1.0f / tile.sum[c];
    if (none && !p.lse_only) {
      for (int64_t j = 0; j < p.d; ++j) tile.out[j * kColumns + c] = 0;
    }
    if (softmax) {
      const float lse = none ? __builtin_inff() : lse_of(tile, c, p.bias.data != nullptr);
      __builtin_memcpy(p.lse.at(user, row + c, head), &lse, sizeof lse);
    }
  }
  if (p.lse_only) return;
  write_rows(tile.out, p.d, count, factor, p.dtype, p.out.at(user, row, head), p.out.row_stride);
}

void run_step(const CandidateCrossAttentionProblem& p, int64_t user, int64_t head, int64_t first, int64_t count,
              void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  const Scratch s(p, scratch);
  const int64_t row = p.queries.begin(user) + first;
  const auto columns_of = [count](int64_t t) {
    return count - t * kColumns < kColumns ? count - t * kColumns : kColumns;
  };
  for (int64_t t = 0; t * kColumns < count; ++t) {
    const Rows queries = rows_of(p, p.q, user, row + t * kColumns, head, columns_of(t));
    Tiles::fill_panel(Tiles::matrix(queries, s.queries), queries.count, p.d, s.panels[t]);
    s.tiles[t].begin(s.panels[t], s.out[t], queries.count);
    const float unit = p.activation == AttentionActivation::kSoftmax ? kLog2E : 1.0f;
    for (float& scale : s.tiles[t].logit_scale) scale = p.softmax_scale;
    for (float& scale : s.tiles[t].scale) scale = p.softmax_scale * unit;
  }
  const int64_t begin = p.keys.begin(user), length = p.keys.count(user);
  for (int64_t k = 0; k < length; k += Tiles::kKeys) {
    const int64_t keys = length - k < Tiles::kKeys ? length - k : Tiles::kKeys;
    KeyBlock<Tiles> block{.keys = Tiles::matrix_or_alias(rows_of(p, p.k, user, begin + k, head, keys), s.keys),
                          .values = {},
                          .count = keys,
                          .d = p.d,
                          .h = p.lse_only ? 0 : p.d,
                          .first = k == 0};
    if (!p.lse_only) {
      const Tiles::Matrix values = Tiles::matrix_or_alias(rows_of(p, p.v, user, begin + k, head, keys), s.values);
      block.values = Tiles::across(values, keys, p.d, s.across);
    }
    const auto* bias =
        p.bias.data != nullptr ? reinterpret_cast<const float*>(p.bias.at(user, begin + k, head)) : nullptr;
    for (int64_t t = 0; t * kColumns < count; ++t) {
      attend(p, block, {bias, p.bias.row_stride / 4}, 1.0f / static_cast<float>(length), s, s.tiles[t]);
    }
  }
  for (int64_t t = 0; t * kColumns < count; ++t) {
    finish(p, user, head, row + t * kColumns, columns_of(t), length > 0, s.tiles[t]);
  }
}

}  // namespace

extern const AttentionPass attention_forward;
const AttentionPass attention_forward = {kGroup * kColumns, scratch_bytes, run_step};

}  // namespace GRANK_ISA
}  // namespace grank
