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
  const int64_t words = p.num_rows / 64 + 2;
  const auto count = [&](int64_t b) { return p.exclude_offsets[p.place(b) + 1] - p.exclude_offsets[p.place(b)]; };
  int64_t slots = 0, marks = 0;
  for (int64_t b = 0; b < p.num_queries; ++b) {
    const int64_t* ids = p.exclude_ids + p.exclude_offsets[p.place(b)];
    if (p.ids == nullptr && count(b) >= words) {  // the bits take less memory than the slots
      tables_.push_back({marks, 0, ids});
      marks += words;
      continue;
    }
    Table table{slots, 1, ids};
    while ((int64_t{1} << table.bits) < 2 * count(b)) ++table.bits;
    tables_.push_back(table);
    slots += int64_t{1} << table.bits;
  }
  slots_ = allocate<uint32_t>(slots);
  marks_ = allocate<uint64_t>(marks);
  parallel_for(threads, p.num_queries, [&](int64_t b, int) {
    const Table& t = tables_[b];
    if (t.bits == 0) {
      std::fill_n(marks_.get() + t.first, words, uint64_t{0});
      for (int64_t i = 0; i < count(b); ++i) {
        if (t.ids[i] >= 0) marks_[t.first + t.ids[i] / 64] |= uint64_t{1} << t.ids[i] % 64;
      }
      return;
    }
    std::fill_n(slots_.get() + t.first, int64_t{1} << t.bits, 0u);
    for (int64_t i = 0; i < count(b); ++i) {
      if (t.ids[i] >= 0) slots_[slot_of(t, t.ids[i])] = static_cast<uint32_t>(i + 1);
    }
  });
}

}  // namespace grank
