// The two passes of the gradient; candidate_cross_attention_kernel.h says what is computed.
#include <cstddef>

#include "attention_rows.h"
#include "attention_tile.h"

namespace grank {
namespace GRANK_ISA {
namespace {

// 64 rows in the lanes: what they are multiplied with on their own side, and what is known of each.
struct Lanes {
  Tiles::Panel first, second;          // queries and grad_out, or keys and values
  alignas(64) float add[kColumns];     // to a logit: bias, or minus lse
  alignas(64) float plain[kColumns];   // the same, never in units of log 2
  alignas(64) float delta[kColumns];   // of queries, else 0
  alignas(64) float excess[kColumns];  // of queries, else 0
  alignas(64) float sum[kColumns];     // of dx, over the other side
  int64_t count;
  int columns;
};

// Rows of the other side, up to kKeys of them, and the same of each.
struct Block {
  Tiles::Matrix first, second;
  Tiles::Across first_across, second_across;
  float add[Tiles::kKeys], plain[Tiles::kKeys], delta[Tiles::kKeys], excess[Tiles::kKeys];
  int64_t count;
};

struct Scratch {
  Scratch(const CandidateCrossAttentionProblem& p, void* memory) {
    Arena arena(memory);
    for (void*& matrix : matrices) matrix = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.d);
    for (void*& matrix : across) matrix = Tiles::take_across(arena, p.dtype, Tiles::kKeys, p.d);
    for (void*& matrix : floats) matrix = FloatTiles::take_matrix(arena, p.dtype, kColumns, p.d);
    for (FloatTiles::Panel& panel : float_panels) panel = FloatTiles::take_panel(arena, p.dtype, p.d);
    lanes = arena.take<Lanes>(1);
    panels[0] = Tiles::take_panel(arena, p.dtype, p.d);
    panels[1] = Tiles::take_panel(arena, p.dtype, p.d);
    for (float*& sums : out) sums = arena.take<float>(round_up(p.d, 32) * kColumns);
    logits = arena.take<float>(Tiles::kKeys * kColumns);
    grad_weights = arena.take<float>(Tiles::kKeys * kColumns);
    for (Tiles::Panel& panel : between) panel = Tiles::take_panel_of_floats(arena, p.dtype, Tiles::kKeys);
    block = arena.take<Block>(1);
    bytes = arena.taken();
  }

  void *matrices[2], *across[2], *floats[2];
  FloatTiles::Panel float_panels[2];
  Tiles::Panel panels[2], between[2];
  float *out[2], *logits, *grad_weights;
  Lanes* lanes;
  Block* block;
  int64_t bytes;
};

int64_t scratch_bytes(const CandidateCrossAttentionProblem& p) { return Scratch(p, nullptr).bytes; }

float number_at(const AttentionTensor& tensor, int64_t user, int64_t row, int64_t head, float otherwise) {
  float x = otherwise;
  if (tensor.data != nullptr) __builtin_memcpy(&x, tensor.at(user, row, head), sizeof x);
  return x;
}

// The exponents of the weights of lanes whose lse is far (attention_tile.h), from the product of row k: its logit minus
// lse, before log 2 is taken out of either, minus `excess`, the log2 of the sum of such weights: a far lse has no
// digits left for the log of its sum. `x` for the other lanes.
[[gnu::noinline, gnu::cold]] Floats far_exponent(const Block& block, const Lanes& lanes, bool queries_in_lanes,
                                                 int64_t k, int c, float softmax_scale, Floats product, Floats x) {
  const Floats own = load<Floats>(lanes.plain + c), other = broadcast<Floats>(block.plain[k]);
  const Floats minus_lse = queries_in_lanes ? own : other, bias = queries_in_lanes ? other : own;
  const Floats logit = multiply_add(product, broadcast<Floats>(softmax_scale), bias);
  const Floats excess = queries_in_lanes ? load<Floats>(lanes.excess + c) : broadcast<Floats>(block.excess[k]);
  return blend(is_far(minus_lse), (logit + minus_lse) * kLog2E - excess, x);
}

// Turns logits into dx and the gradients of the weights into weights. A logit is in units of log 2 for softmax.
// far: some lse is (attention_tile.h).
template <AttentionActivation kActivation>
void differentiate(const Block& block, Lanes& lanes, bool queries_in_lanes, bool far, float softmax_scale, float scale,
                   float factor, float* logits, float* grad_weights) {
  for (int c = 0; c < lanes.columns; c += kLanes) {
    const Floats add = load<Floats>(lanes.add + c), delta = load<Floats>(lanes.delta + c);
    Floats sum = load<Floats>(lanes.sum + c);
    for (int64_t k = 0; k < block.count; ++k) {
      float *logit = logits + k * kColumns + c, *grad_weight = grad_weights + k * kColumns + c;
      Floats x = multiply_add(load<Floats>(logit), broadcast<Floats>(scale), add + block.add[k]);
      Floats weight, grad;
      if constexpr (kActivation == AttentionActivation::kSoftmax) {
        if (far) x = far_exponent(block, lanes, queries_in_lanes, k, c, softmax_scale, load<Floats>(logit), x);
        weight = exp2(x);
        grad = weight * (load<Floats>(grad_weight) - (delta + block.delta[k]));
      } else {
        x = at_least_minus_far(x);
        const Floats gate = 1.0f / (1.0f + exp2(at_most(x * -kLog2E, 126.0f)));
        weight = x * gate * factor;
        grad = load<Floats>(grad_weight) * (gate * multiply_add(x, 1.0f - gate, broadcast<Floats>(1.0f))) * factor;
      }
      sum += grad;
      store(logit, grad);
      store(grad_weight, weight);
    }
    store(lanes.sum + c, sum);
  }
}

// One step of a pass: rows `first` to `first + count` of one side in the lanes, all of the user's on the other side.
class Step {
 public:
  Step(const CandidateCrossAttentionProblem& p, int64_t user, int64_t head, int64_t first, int64_t count, void* scratch)
      : p_(p), softmax_(p.activation == AttentionActivation::kSoftmax), user_(user), head_(head), s_(p, scratch) {
    s_.lanes->first = s_.panels[0];
    s_.lanes->second = s_.panels[1];
    s_.lanes->count = count;
    s_.lanes->columns = static_cast<int>(round_up(count, 32));
    query_ = p.queries.begin(user);
    key_ = p.keys.begin(user);
    first_ = first;
  }

  void grad_queries() {
    query_ += first_;
    Lanes& lanes = *s_.lanes;
    Block& block = *s_.block;
    fill_lanes(p_.q, p_.grad_out, query_);
    far_ = fill_queries(query_, lanes.count, lanes.add, lanes.plain, lanes.delta);
    queries_in_lanes_ = true;
    if (softmax_) {
      if (!p_.lse_only) find_delta();
      put_delta();
      find_excess();
    }
    for (int64_t k = 0; k < keys(); k += block.count) {
      fill_block(p_.k, p_.v, key_ + k, keys() - k);
      fill_keys(key_ + k, block.count, block.add, block.plain, block.delta);
      differentiate_block();
      block.first_across = Tiles::across(block.first, block.count, p_.d, s_.across[0]);
      add(block.first_across, Tiles::panel_of(s_.logits, block.count, lanes.columns, s_.between[0]), k == 0, s_.out[0]);
    }
    write(p_.grad_q, query_, s_.out[0], keys() > 0, p_.softmax_scale);
  }

  void grad_keys() {
    key_ += first_;
    Lanes& lanes = *s_.lanes;
    Block& block = *s_.block;
    fill_lanes(p_.k, p_.v, key_);
    fill_keys(key_, lanes.count, lanes.add, lanes.plain, lanes.delta);
    const int64_t queries = p_.queries.count(user_);
    for (int64_t q = 0; q < queries; q += block.count) {
      fill_block(p_.q, p_.grad_out, query_ + q, queries - q);
      far_ = fill_queries(query_ + q, block.count, block.add, block.plain, block.delta);
      for (int64_t i = 0; i < block.count && softmax_; ++i) {
        block.delta[i] = number_at(p_.delta, user_, query_ + q + i, head_, 0);
        block.excess[i] = number_at(p_.excess, user_, query_ + q + i, head_, 0);
      }
      differentiate_block();
      block.first_across = Tiles::across(block.first, block.count, p_.d, s_.across[0]);
      add(block.first_across, Tiles::panel_of(s_.logits, block.count, lanes.columns, s_.between[0]), q == 0, s_.out[0]);
      if (p_.lse_only) continue;
      block.second_across = Tiles::across(block.second, block.count, p_.d, s_.across[1]);
      add(block.second_across, Tiles::panel_of(s_.grad_weights, block.count, lanes.columns, s_.between[1]), q == 0,
          s_.out[1]);
    }
    write(p_.grad_k, key_, s_.out[0], queries > 0, p_.softmax_scale);
    if (!p_.lse_only) write(p_.grad_v, key_, s_.out[1], queries > 0, 1.0f);
    for (int64_t c = 0; c < lanes.count && p_.grad_bias.data != nullptr; ++c) {
      __builtin_memcpy(p_.grad_bias.at(user_, key_ + c, head_), &lanes.sum[c], sizeof(float));
    }
  }

 private:
  int64_t keys() const { return p_.keys.count(user_); }
  float unit() const { return softmax_ ? kLog2E : 1.0f; }

  void fill_lanes(const AttentionTensor& first, const AttentionTensor& second, int64_t row) {
    Lanes& lanes = *s_.lanes;
    const auto fill = [&](const AttentionTensor& tensor, Tiles::Panel panel) {
      const Rows rows = rows_of(p_, tensor, user_, row, head_, lanes.count);
      Tiles::fill_panel(Tiles::matrix(rows, s_.matrices[0]), lanes.count, p_.d, panel);
    };
    fill(first, lanes.first);
    if (!p_.lse_only) fill(second, lanes.second);
    for (int c = 0; c < kColumns; ++c) {
      lanes.add[c] = lanes.plain[c] = lanes.delta[c] = lanes.excess[c] = lanes.sum[c] = 0;
    }
  }

  void fill_block(const AttentionTensor& first, const AttentionTensor& second, int64_t row, int64_t left) {
    Block& block = *s_.block;
    block.count = left < Tiles::kKeys ? left : Tiles::kKeys;
    block.first = Tiles::matrix_or_alias(rows_of(p_, first, user_, row, head_, block.count), s_.matrices[0]);
    if (p_.lse_only) return;
    block.second = Tiles::matrix_or_alias(rows_of(p_, second, user_, row, head_, block.count), s_.matrices[1]);
  }

  // Returns whether some lse is far.
  bool fill_queries(int64_t row, int64_t count, float* add, float* plain, float* delta) const {
    bool far = false;
    for (int64_t i = 0; i < count; ++i) {
      plain[i] = -number_at(p_.lse, user_, row + i, head_, 0);
      add[i] = plain[i] * unit();
      delta[i] = 0;
      far |= is_far(plain[i]);
    }
    return far;
  }
  void fill_keys(int64_t row, int64_t count, float* add, float* plain, float* delta) const {
    for (int64_t i = 0; i < count; ++i) {
      plain[i] = number_at(p_.bias, user_, row + i, head_, 0);
      add[i] = plain[i] * unit();
      delta[i] = 0;
    }
  }

  // The products of grad_out and out, one dimension after the other.
  void find_delta() {
    Lanes& lanes = *s_.lanes;
    const AttentionTensor* tensors[] = {&p_.grad_out, &p_.out};
    for (int i = 0; i < 2; ++i) {
      const Rows rows = rows_of(p_, *tensors[i], user_, query_, head_, lanes.count);
      FloatTiles::fill_panel(FloatTiles::matrix(rows, s_.floats[i]), lanes.count, p_.d, s_.float_panels[i]);
    }
    for (int c = 0; c < lanes.columns; c += kLanes) {
      Floats sum{};
      for (int64_t j = 0; j < p_.d; ++j) {
        sum = multiply_add(load<Floats>(s_.float_panels[0].data + j * kColumns + c),
                           load<Floats>(s_.float_panels[1].data + j * kColumns + c), sum);
      }
      store(lanes.delta + c, sum);
    }
  }

  // Subtracts grad_lse; for this pass and for that of the keys.
  void put_delta() {
    Lanes& lanes = *s_.lanes;
    for (int64_t c = 0; c < lanes.count; ++c) {
      lanes.delta[c] -= number_at(p_.grad_lse, user_, query_ + c, head_, 0);
      __builtin_memcpy(p_.delta.at(user_, query_ + c, head_), &lanes.delta[c], sizeof(float));
    }
  }

  // The log2 of the sum of the weights of queries whose lse is far, 0 of others; for this pass and for that of the
  // keys.
  void find_excess() {
    Lanes& lanes = *s_.lanes;
    Block& block = *s_.block;
    alignas(64) float sums[kColumns] = {};
    for (int64_t k = 0; far_ && k < keys(); k += block.count) {
      fill_block(p_.k, p_.v, key_ + k, keys() - k);
      fill_keys(key_ + k, block.count, block.add, block.plain, block.delta);
      Tiles::multiply<false>(block.first, block.count, lanes.first, p_.d, lanes.columns, s_.logits);
      for (int c = 0; c < lanes.columns; c += kLanes) {
        Floats sum = load<Floats>(sums + c);
        for (int64_t i = 0; i < block.count; ++i) {
          const Floats product = load<Floats>(s_.logits + i * kColumns + c);
          sum += exp2(far_exponent(block, lanes, true, i, c, p_.softmax_scale, product, Floats{}));
        }
        store(sums + c, sum);
      }
    }
    for (int64_t c = 0; c < lanes.count; ++c) {
      lanes.excess[c] = is_far(lanes.plain[c]) && sums[c] > 0 ? __builtin_log2f(sums[c]) : 0.0f;
      __builtin_memcpy(p_.excess.at(user_, query_ + c, head_), &lanes.excess[c], sizeof(float));
    }
  }

  void differentiate_block() {
    const Block& block = *s_.block;
    Lanes& lanes = *s_.lanes;
    Tiles::multiply<false>(block.first, block.count, lanes.first, p_.d, lanes.columns, s_.logits);
    if (p_.lse_only) {
      __builtin_memset(s_.grad_weights, 0, static_cast<size_t>(block.count * kColumns) * sizeof(float));
    } else {
      Tiles::multiply<false>(block.second, block.count, lanes.second, p_.d, lanes.columns, s_.grad_weights);
    }
    const float scale = p_.softmax_scale * unit();
    if (softmax_) {
      differentiate<AttentionActivation::kSoftmax>(block, lanes, queries_in_lanes_, far_, p_.softmax_scale, scale, 1.0f,
                                                   s_.logits, s_.grad_weights);
    } else {
      differentiate<AttentionActivation::kSilu>(block, lanes, queries_in_lanes_, false, p_.softmax_scale, scale,
                                                1.0f / static_cast<float>(keys()), s_.logits, s_.grad_weights);
    }
  }

  void add(const Tiles::Across& rows, Tiles::Panel panel, bool first, float* out) {
    if (first) {
      Tiles::multiply<false>(rows, p_.d, panel, s_.block->count, s_.lanes->columns, out);
    } else {
      Tiles::multiply<true>(rows, p_.d, panel, s_.block->count, s_.lanes->columns, out);
    }
  }

  void write(const AttentionTensor& to, int64_t row, float* sums, bool any, float factor) const {
    float factors[kColumns];
    for (float& f : factors) f = factor;
    if (!any) __builtin_memset(sums, 0, static_cast<size_t>(p_.d * kColumns) * sizeof(float));
    write_rows(sums, p_.d, s_.lanes->count, factors, p_.dtype, to.at(user_, row, head_), to.row_stride);
  }

  const CandidateCrossAttentionProblem& p_;
  const bool softmax_;
  const int64_t user_, head_;
  const Scratch s_;
  int64_t query_, key_, first_;
  bool queries_in_lanes_ = false, far_ = false;
};

void grad_queries(const CandidateCrossAttentionProblem& p, int64_t user, int64_t head, int64_t first, int64_t count,
                  void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  Step(p, user, head, first, count, scratch).grad_queries();
}

void grad_keys(const CandidateCrossAttentionProblem& p, int64_t user, int64_t head, int64_t first, int64_t count,
               void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  Step(p, user, head, first, count, scratch).grad_keys();
}

}  // namespace

extern const AttentionPass attention_grad_queries, attention_grad_keys;
const AttentionPass attention_grad_queries = {kColumns, scratch_bytes, grad_queries};
const AttentionPass attention_grad_keys = {kColumns, scratch_bytes, grad_keys};

}  // namespace GRANK_ISA
}  // namespace grank
