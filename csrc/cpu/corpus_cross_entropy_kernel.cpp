// Both passes; corpus_cross_entropy_kernel.h says what is computed.
#include "corpus_cross_entropy_kernel.h"

#include "attention_tile.h"
#include "tiles.h"

namespace grank {
namespace GRANK_ISA {
namespace {

constexpr int kGroup = 4;  // tiles a step

// Excluded ids of a row that are still ahead.
struct Cursor {
  const int64_t *next, *end;
};

struct Scratch {
  Scratch(const CorpusCrossEntropyProblem& p, void* memory) {
    Arena arena(memory);
    lanes = Tiles::take_matrix(arena, p.dtype, kColumns, p.d);
    others = Tiles::take_matrix(arena, p.dtype, Tiles::kKeys, p.d);
    across = Tiles::take_across(arena, p.dtype, Tiles::kKeys, p.d);
    logits = arena.take<float>(Tiles::kKeys * kColumns);
    weights = Tiles::take_panel(arena, p.dtype, Tiles::kKeys);
    tiles = arena.take<QueryTile<Tiles>>(kGroup);
    lost = arena.take<float>(kGroup * kColumns);
    cursors = arena.take<Cursor>(kGroup * kColumns > Tiles::kKeys ? kGroup * kColumns : Tiles::kKeys);
    for (int t = 0; t < kGroup; ++t) {
      panels[t] = Tiles::take_panel(arena, p.dtype, p.d);
      out[t] = arena.take<float>(round_up(p.d, 32) * kColumns);
    }
    bytes = arena.taken();
  }

  void *lanes, *others, *across;
  float* logits;
  Tiles::Panel weights;
  QueryTile<Tiles>* tiles;
  float* lost;  // what roundings have added to a tile's `sum`
  Cursor* cursors;
  Tiles::Panel panels[kGroup];
  float* out[kGroup];
  int64_t bytes;
};

int64_t scratch_bytes(const CorpusCrossEntropyProblem& p) { return Scratch(p, nullptr).bytes; }

Rows users_of(const CorpusCrossEntropyProblem& p, int64_t first, int64_t count) {
  return {p.users + first * p.user_stride, p.user_stride, p.dtype, count, p.d};
}

Rows items_of(const CorpusCrossEntropyProblem& p, int64_t first, int64_t count) {
  return {p.items + first * p.item_stride, p.item_stride, p.dtype, count, p.d};
}

// The number of a step's rows that are in tile t.
int64_t columns_of(int64_t count, int64_t t) {
  return count - t * kColumns < kColumns ? count - t * kColumns : kColumns;
}

void begin_tile(const Rows& rows, const Scratch& s, int64_t t) {
  Tiles::fill_panel(Tiles::matrix(rows, s.lanes), rows.count, rows.width, s.panels[t]);
  s.tiles[t].begin(s.panels[t], s.out[t], rows.count);
}

// ---- forward ----

// logits = scale logits + bias, of items from `first` on; takes out the targets' and those of excluded items.
void complete_logits(const CorpusCrossEntropyProblem& p, int64_t first, int64_t items, int64_t row, int64_t rows,
                     int columns, Cursor* cursors, float* logits) {
  const Floats scale = broadcast<Floats>(p.scale);
  for (int64_t k = 0; k < items; ++k) {
    const Floats bias = broadcast<Floats>(p.bias != nullptr ? p.bias[first + k] : 0.0f);
    for (int c = 0; c < columns; c += kLanes) {
      float* x = logits + k * kColumns + c;
      store(x, multiply_add(load<Floats>(x), scale, bias));
    }
  }
  for (int64_t c = 0; c < rows; ++c) {
    const int64_t target = p.targets[row + c] - first;
    if (target >= 0 && target < items) {
      p.at_target[row + c] = logits[target * kColumns + c];
      logits[target * kColumns + c] = -__builtin_inff();
    }
    Cursor& cursor = cursors[c];
    for (; cursor.next < cursor.end && *cursor.next < first + items; ++cursor.next) {
      logits[(*cursor.next - first) * kColumns + c] = -__builtin_inff();
    }
  }
}

// Turns logits into weights exp(x - max) and adds them up; a maximum is raised by logits that are above it by more than
// kSlack. Differences of logits are exact where they matter, as torch's, whatever the size of the logits. The sum of
// blocks is Kahan's: in order of 70,000 items float32 loses 1e-4, 20 times what torch's pairwise sum loses.
template <int kParts>
void weigh_items(const float* logits, const KeyBlock<Tiles>& block, QueryTile<Tiles>& tile, float* lost,
                 Tiles::Panel weights) {
  for (int c = 0; c < tile.columns; c += kLanes) {
    const Floats before = load<Floats>(tile.max + c);
    const Floats found = largest(logits + c, block.count, broadcast<Floats>(1.0f), before);
    const Ints raise = found > before + kSlack;
    const Floats max = blend(raise, found, before);
    Floats sum = load<Floats>(tile.sum + c), excess = load<Floats>(lost + c);
    if (any(raise)) {
      const Floats down = exp2(only(raise & (before > -__builtin_inff()), (before - max) * kLog2E));
      sum *= down;
      excess *= down;
      scale_down(block, tile, c, down);
      store(tile.max + c, max);
    }
    Floats added{};
    const Floats base = only(max > -__builtin_inff(), max);  // where all logits are -inf, weights are 0
    put_numbers<Tiles, kParts>(weights, block.count, c, [&](int64_t k) {
      const Floats weight = exp2((load<Floats>(logits + k * kColumns + c) - base) * kLog2E);
      added += weight;
      return weight;
    });
    const Floats exact = added - excess, total = sum + exact;
    store(tile.sum + c, total);
    store(lost + c, (total - sum) - exact);
  }
}

void forward(const CorpusCrossEntropyProblem& p, int64_t first, int64_t count, void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  const Scratch s(p, scratch);
  for (int64_t t = 0; t * kColumns < count; ++t) {
    begin_tile(users_of(p, first + t * kColumns, columns_of(count, t)), s, t);
  }
  __builtin_memset(s.lost, 0, kGroup * kColumns * sizeof(float));
  for (int64_t c = 0; c < count; ++c) s.cursors[c].next = p.excluded(first + c, 0, &s.cursors[c].end);
  const bool pool = p.pooled != nullptr;
  for (int64_t k = 0; k < p.num_items; k += Tiles::kKeys) {
    const int64_t items = p.num_items - k < Tiles::kKeys ? p.num_items - k : Tiles::kKeys;
    KeyBlock<Tiles> block{};
    block.keys = Tiles::matrix_or_alias(items_of(p, k, items), s.others);
    if (pool) block.values = Tiles::across(block.keys, items, p.d, s.across);
    block.count = items;
    block.d = p.d;
    block.h = pool ? p.d : 0;
    block.first = k == 0;
    for (int64_t t = 0; t * kColumns < count; ++t) {
      QueryTile<Tiles>& tile = s.tiles[t];
      Tiles::multiply<false>(block.keys, items, tile.queries, p.d, tile.columns, s.logits);
      complete_logits(p, k, items, first + t * kColumns, columns_of(count, t), tile.columns, s.cursors + t * kColumns,
                      s.logits);
      with_parts<Tiles>(
          s.weights, [&](auto parts) { weigh_items<parts>(s.logits, block, tile, s.lost + t * kColumns, s.weights); });
      if (pool) add_values(block, s.weights, tile);
    }
  }
  float ones[kColumns];
  for (float& one : ones) one = 1;
  for (int64_t t = 0; t * kColumns < count; ++t) {
    const int64_t row = first + t * kColumns, rows = columns_of(count, t);
    __builtin_memcpy(p.peak + row, s.tiles[t].max, static_cast<size_t>(rows) * sizeof(float));
    __builtin_memcpy(p.mass + row, s.tiles[t].sum, static_cast<size_t>(rows) * sizeof(float));
    if (!pool) continue;
    write_rows(s.tiles[t].out, p.d, rows, ones, DType::kFloat32, reinterpret_cast<char*>(p.pooled + row * p.d),
               p.d * 4);
  }
}

// ---- backward ----

// Turns logits of rows from `row` on and 64 items from `first` on into the derivatives of the loss, and adds those of
// an item up.
void differentiate(const CorpusCrossEntropyProblem& p, int64_t row, int64_t rows, int64_t first, int64_t items,
                   Cursor* cursors, QueryTile<Tiles>& tile, float* logits) {
  const Floats scale = broadcast<Floats>(p.scale);
  alignas(64) float bias[kColumns] = {};
  for (int64_t c = 0; c < items && p.bias != nullptr; ++c) bias[c] = p.bias[first + c];
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t r = row + k;
    const Floats shift = broadcast<Floats>(p.shift[r]), log_sum = broadcast<Floats>(p.log_sum[r]);
    const Floats slope = broadcast<Floats>(p.slope[r]);
    float* of_row = logits + k * kColumns;
    for (int c = 0; c < tile.columns; c += kLanes) {
      const Floats x = multiply_add(load<Floats>(of_row + c), scale, load<Floats>(bias + c));
      store(of_row + c, exp2((x - shift - log_sum) * kLog2E) * slope);
    }
    Cursor& cursor = cursors[k];
    for (; cursor.next < cursor.end && *cursor.next < first + items; ++cursor.next) of_row[*cursor.next - first] = 0;
    const int64_t target = p.targets[r] - first;
    if (target >= 0 && target < items) of_row[target] = p.target_slope[r];
    for (int c = 0; c < tile.columns; c += kLanes) {
      store(tile.sum + c, load<Floats>(tile.sum + c) + load<Floats>(of_row + c));
    }
  }
}

void backward(const CorpusCrossEntropyProblem& p, int64_t first, int64_t count, void* scratch) {
  [[maybe_unused]] const Tiles::Session session;
  const Scratch s(p, scratch);
  for (int64_t t = 0; t * kColumns < count; ++t) {
    begin_tile(items_of(p, first + t * kColumns, columns_of(count, t)), s, t);
  }
  for (int64_t r = 0; r < p.num_rows; r += Tiles::kKeys) {
    const int64_t rows = p.num_rows - r < Tiles::kKeys ? p.num_rows - r : Tiles::kKeys;
    const Tiles::Matrix users = Tiles::matrix_or_alias(users_of(p, r, rows), s.others);
    const Tiles::Across across = Tiles::across(users, rows, p.d, s.across);
    for (int64_t k = 0; k < rows; ++k) s.cursors[k].next = p.excluded(r + k, first, &s.cursors[k].end);
    for (int64_t t = 0; t * kColumns < count; ++t) {
      QueryTile<Tiles>& tile = s.tiles[t];
      Tiles::multiply<false>(users, rows, tile.queries, p.d, tile.columns, s.logits);
      differentiate(p, r, rows, first + t * kColumns, columns_of(count, t), s.cursors, tile, s.logits);
      const Tiles::Panel steep = Tiles::panel_of(s.logits, rows, tile.columns, s.weights);
      if (r == 0) {
        Tiles::multiply<false>(across, p.d, steep, rows, tile.columns, tile.out);
      } else {
        Tiles::multiply<true>(across, p.d, steep, rows, tile.columns, tile.out);
      }
    }
  }
  float scales[kColumns];
  for (float& scale : scales) scale = p.scale;
  const int64_t stride = p.d * element_bytes(p.dtype);
  for (int64_t t = 0; t * kColumns < count; ++t) {
    const int64_t item = first + t * kColumns, items = columns_of(count, t);
    write_rows(s.tiles[t].out, p.d, items, scales, p.dtype, p.grad_items + item * stride, stride);
    __builtin_memcpy(p.grad_bias + item, s.tiles[t].sum, static_cast<size_t>(items) * sizeof(float));
  }
}

}  // namespace

extern const CorpusPass corpus_forward, corpus_backward;
const CorpusPass corpus_forward = {kGroup * kColumns, scratch_bytes, forward};
const CorpusPass corpus_backward = {kGroup * kColumns, scratch_bytes, backward};

}  // namespace GRANK_ISA
}  // namespace grank
