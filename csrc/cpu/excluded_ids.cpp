#include "excluded_ids.h"

#include <algorithm>

#include "reservoirs.h"
#include "threads.h"

namespace grank {

ExcludedIds::ExcludedIds(const MipsTopkProblem& p, int threads) {
  if (p.exclude_offsets == nullptr) return;
  int64_t slots = 0;
  for (int64_t b = 0; b < p.num_queries; ++b) {
    Table table{slots, 1};
    while ((int64_t{1} << table.bits) < 2 * (p.exclude_offsets[b + 1] - p.exclude_offsets[b]) + 1) ++table.bits;
    tables_.push_back(table);
    slots += int64_t{1} << table.bits;
  }
  slots_ = allocate<int64_t>(slots);
  parallel_for(threads, p.num_queries, [&](int64_t b, int) {
    const Table& t = tables_[b];
    int64_t* own = slots_.get() + t.first;
    std::fill(own, own + (int64_t{1} << t.bits), kFree);
    for (int64_t i = p.exclude_offsets[b]; i < p.exclude_offsets[b + 1]; ++i) {
      if (p.exclude_ids[i] == kFree) continue;
      uint64_t at = start_of(p.exclude_ids[i], t.bits), mask = (uint64_t{1} << t.bits) - 1;
      while (own[at & mask] != kFree && own[at & mask] != p.exclude_ids[i]) ++at;
      own[at & mask] = p.exclude_ids[i];
    }
  });
}

}  // namespace grank
