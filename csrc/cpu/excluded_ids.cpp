#include "excluded_ids.h"

#include <algorithm>
#include <random>

#include "reservoirs.h"
#include "threads.h"

namespace grank {

const uint64_t ExcludedIds::kSeed = [] {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}();

ExcludedIds::ExcludedIds(const MipsTopkProblem& p, int threads) {
  if (p.exclude_offsets == nullptr) return;
  int64_t slots = 0;
  for (int64_t b = 0; b < p.num_queries; ++b) {
    Table table{slots, 1, p.exclude_ids + p.exclude_offsets[b]};
    while ((int64_t{1} << table.bits) < 2 * (p.exclude_offsets[b + 1] - p.exclude_offsets[b])) ++table.bits;
    tables_.push_back(table);
    slots += int64_t{1} << table.bits;
  }
  slots_ = allocate<uint32_t>(slots);
  parallel_for(threads, p.num_queries, [&](int64_t b, int) {
    const Table& t = tables_[b];
    std::fill_n(slots_.get() + t.first, int64_t{1} << t.bits, 0u);
    for (int64_t i = 0; i < p.exclude_offsets[b + 1] - p.exclude_offsets[b]; ++i) {
      if (t.ids[i] >= 0) slots_[slot_of(t, t.ids[i])] = static_cast<uint32_t>(i + 1);
    }
  });
}

}  // namespace grank
