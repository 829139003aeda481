// The steps of score_candidates; formula in score_candidates_kernel.h.
#include "score_candidates_kernel.h"

#include "attention_tile.h"
#include "tiles.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kGroup = 4;

struct Scratch {
  explicit Scratch(const ScoreCandidatesProblem& p, void* memory) {
    Arena arena(memory);
    candidates = Tiles::take_matrix(arena, p.rows_dtype, kColumns, p.d);
    keys = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.d);
    values = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.h);
    across = Tiles::take_across(arena, p.dtype, Tiles::kKeys, p.h);
    const int64_t h = round_up(p.h, 32);
    logits = arena.take<float>((h > Tiles::kKeys ? h : Tiles::kKeys) * kColumns);
    weights = Tiles::take_panel(arena, p.dtype, Tiles::kKeys);
    tiles = arena.take<QueryTile<Tiles>>(kGroup);
    for (int t = 0; t < kGroup; ++t) {
      panels[t] = Tiles::take_panel(arena, p.rows_dtype, p.d);
      out[t] = arena.take<float>(h * kColumns);
    }
    bytes = arena.taken();
  }

  void *candidates, *keys, *values, *across;
  float* logits;
  Tiles::Panel weights;
  QueryTile<Tiles>* tiles;
  Tiles::Panel panels[kGroup];
  float* out[kGroup];
  int64_t bytes;
};

int64_t scratch_bytes(const ScoreCandidatesProblem& p) { return Scratch(p, nullptr).bytes; }

// item_weight as an operand A of the products, and its memory.
struct Weight {
  explicit Weight(const ScoreCandidatesProblem& p, void* memory) {
    Arena arena(memory);
    operand = arena.take<Tiles::Across>(1);
    matrix = Tiles::take_matrix(arena, p.dtype, p.d, p.h);
    across = Tiles::take_across(arena, p.dtype, p.d, p.h);
    bytes = arena.taken();
  }

  Tiles::Across* operand;
  void *matrix, *across;
  int64_t bytes;
};

int64_t weight_bytes(const ScoreCandidatesProblem& p) { return Weight(p, nullptr).bytes; }

void prepare_weight(const ScoreCandidatesProblem& p, void* memory) {
  const Weight weight(p, memory);
  *weight.operand = {};
  if (p.h == 0) return;
  const Rows rows{static_cast<const char*>(p.item_weight), p.h * element_bytes(p.dtype), p.dtype, p.d, p.h};
  *weight.operand = Tiles::across(Tiles::matrix_or_alias(rows, weight.matrix), p.d, p.h, weight.across);
}

// ---- the head ----

template <HeadActivation kActivation>
inline Floats activate(Floats x) {
  const Floats positive = only(~(x < 0.0f), x);  // NaN for NaN
  if constexpr (kActivation == HeadActivation::kRelu) {
    return positive;
  } else if constexpr (kActivation == HeadActivation::kSilu) {
    return silu(x);
  } else {
    const Floats size = at_most(only(Ints{} + 0x7fffffff, x), 20.0f);  // erfc(20 / sqrt(2)) is 0; inf * 0 would be NaN
    return positive - 0.5f * size * erfc_of_positive(size * 0x1.6a09e6p-1f);  // sqrt(1/2)
  }
}

// The scores of kLanes columns: hidden = weighted * by + own * scale + user, hidden units ascending.
template <HeadActivation kActivation>
Floats head(const ScoreCandidatesProblem& p, const float* weighted, Floats by, const float* own, Floats scale,
            const float* user) {
  Floats score{};
  for (int64_t j = 0; j < p.h; ++j) {
    Floats hidden = multiply_add(load<Floats>(own + j * kColumns), scale, broadcast<Floats>(user[j]));
    if (weighted != nullptr) hidden = multiply_add(load<Floats>(weighted + j * kColumns), by, hidden);
    score = multiply_add(activate<kActivation>(hidden), broadcast<Floats>(p.out_weight[j]), score);
  }
  return score + p.out_bias;
}

Floats head(const ScoreCandidatesProblem& p, const float* weighted, Floats by, const float* own, Floats scale,
            const float* user) {
  switch (p.activation) {
    case HeadActivation::kRelu:
      return head<HeadActivation::kRelu>(p, weighted, by, own, scale, user);
    case HeadActivation::kSilu:
      return head<HeadActivation::kSilu>(p, weighted, by, own, scale, user);
    case HeadActivation::kGelu:
      return head<HeadActivation::kGelu>(p, weighted, by, own, scale, user);
  }
  return Floats{};
}

// ---- a step ----

class Step {
 public:
  Step(const ScoreCandidatesProblem& p, const void* weight, int64_t user, int64_t first, int64_t count, void* scratch)
      : p_(p),
        weight_(*static_cast<const Tiles::Across*>(weight)),
        user_(user),
        ids_(p.candidate_ids + user * p.num_candidates + first),
        scores_(p.scores + user * p.num_candidates + first),
        count_(count),
        s_(p, scratch) {}

  void run() {
    prefetch();
    for (int64_t c = 0; c < count_; c += kColumns) gather(c / kColumns);
    const int64_t begin = p_.cu_seqlens[user_], length = p_.cu_seqlens[user_ + 1] - begin;
    for (int64_t k = 0; k < length; k += Tiles::kKeys) {
      attend(begin + k, length - k < Tiles::kKeys ? length - k : Tiles::kKeys, k == 0);
    }
    for (int64_t c = 0; c < count_; c += kColumns) finish(c / kColumns, length > 0);
  }

 private:
  int64_t columns_of(int64_t tile) const {
    const int64_t left = count_ - tile * kColumns;
    return left < kColumns ? left : kColumns;
  }

  // Gathered rows: prefetching all of them overlaps the cache misses.
  void prefetch() const {
    const char* rows = static_cast<const char*>(p_.rows);
    for (int64_t c = 0; c < count_; ++c) {
      if (ids_[c] < 0) continue;
      const char* row = rows + ids_[c] * p_.row_stride;
      for (int64_t line = 0; line < p_.d * element_bytes(p_.rows_dtype); line += 64)
        __builtin_prefetch(row + line, 0, 2);
    }
  }

  float row_scale_of(int64_t candidate) const {
    const bool known = p_.row_scale != nullptr && candidate < count_ && ids_[candidate] >= 0;
    return known ? p_.row_scale[ids_[candidate]] : 1.0f;
  }

  // Columns without a candidate compute with row 0; their scores are dropped.
  void gather(int64_t t) {
    QueryTile<Tiles>& tile = s_.tiles[t];
    const int64_t columns = columns_of(t);
    tile.begin(s_.panels[t], s_.out[t], columns);
    uint32_t list[kColumns] = {};
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t id = ids_[t * kColumns + c];
      list[c] = id < 0 ? 0 : static_cast<uint32_t>(id);
    }
    for (int c = 0; c < kColumns; ++c) {
      const float row_scale = row_scale_of(t * kColumns + c);
      tile.logit_scale[c] = p_.softmax_scale * row_scale;
      tile.scale[c] = p_.softmax_scale * kLog2E * row_scale;
    }
    const Rows rows{static_cast<const char*>(p_.rows), p_.row_stride, p_.rows_dtype, columns, p_.d, list};
    Tiles::fill_panel(Tiles::matrix(rows, s_.candidates), columns, p_.d, tile.queries);
  }

  void attend(int64_t key, int64_t count, bool first) {
    const Rows keys{static_cast<const char*>(p_.keys) + key * p_.key_stride, p_.key_stride, p_.dtype, count, p_.d};
    KeyBlock<Tiles> block{Tiles::matrix_or_alias(keys, s_.keys), {}, count, p_.d, p_.h, first};
    if (p_.h > 0) {
      const Rows values{static_cast<const char*>(p_.values) + key * p_.value_stride, p_.value_stride, p_.dtype, count,
                        p_.h};
      block.values = Tiles::across(Tiles::matrix_or_alias(values, s_.values), count, p_.h, s_.across);
    }
    const Bias bias{p_.bias == nullptr ? nullptr : p_.bias + key, 1};
    for (int64_t t = 0; t * kColumns < count_; ++t) attend_by_softmax(block, bias, s_.logits, s_.weights, s_.tiles[t]);
  }

  // The logarithm of exp(lse_floor) plus the sum of exp(logit), of every column.
  void find_lse(const QueryTile<Tiles>& tile, float* lse) const {
    const Floats floor = broadcast<Floats>(p_.lse_floor * kLog2E);
    for (int c = 0; c < tile.columns; c += kLanes) {
      const Floats max = load<Floats>(tile.max + c), most = larger(max, floor);
      const Floats base = only(most > -__builtin_inff(), most);  // infinity minus infinity is NaN
      const Floats sum = multiply_add(load<Floats>(tile.sum + c), exp2(max - base), exp2(floor - base));
      for (int lane = 0; lane < kLanes; ++lane) lse[c + lane] = (most[lane] + __builtin_log2f(sum[lane])) * kLn2;
    }
    for (int c = 0; c < tile.columns; ++c) {
      if (tile.sum[c] == 0) {  // no keys, or all logits -infinity
        lse[c] = p_.lse_floor;
      } else if (is_far(tile.max[c])) {
        const float own = lse_of(tile, c, p_.bias != nullptr), most = own > p_.lse_floor ? own : p_.lse_floor;
        lse[c] = most + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(own - p_.lse_floor)));
      }
    }
  }

  void finish(int64_t t, bool attended) {
    const QueryTile<Tiles>& tile = s_.tiles[t];
    if (p_.h > 0) Tiles::multiply<false>(weight_, p_.h, tile.queries, p_.d, tile.columns, s_.logits);
    alignas(64) float row_scale[kColumns], scores[kColumns], lse[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) row_scale[c] = row_scale_of(t * kColumns + c);
    if (p_.lse_weight != 0) find_lse(tile, lse);
    for (int c = 0; c < tile.columns; c += kLanes) {
      const float* weighted = attended ? tile.out + c : nullptr;
      const Floats sum = load<Floats>(tile.sum + c);  // 0: all keys are masked
      store(scores + c, head(p_, weighted, only(~(sum == 0.0f), 1.0f / sum), s_.logits + c, load<Floats>(row_scale + c),
                             p_.user_hidden + user_ * p_.h));
    }
    for (int c = 0; c < tile.columns && p_.lse_weight != 0; c += kLanes) {
      store(scores + c,
            multiply_add(broadcast<Floats>(p_.lse_weight), load<Floats>(lse + c), load<Floats>(scores + c)));
    }
    for (int64_t c = 0; c < columns_of(t); ++c) {
      const int64_t at = t * kColumns + c;
      scores_[at] = ids_[at] < 0 ? -__builtin_inff() : scores[c];
    }
  }

  const ScoreCandidatesProblem& p_;
  const Tiles::Across weight_;
  const int64_t user_;
  const int64_t* ids_;
  float* scores_;
  const int64_t count_;
  const Scratch s_;
};

void run_step(const ScoreCandidatesProblem& p, const void* weight, int64_t user, int64_t first, int64_t count,
              void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  Step(p, weight, user, first, count, scratch).run();
}

}  // namespace

extern const ScoreCandidatesKernel score_candidates_kernel;
const ScoreCandidatesKernel score_candidates_kernel = {kGroup * kColumns, weight_bytes, prepare_weight, scratch_bytes,
                                                       run_step};

}  // namespace GRANK_ISA
}  // namespace grank
