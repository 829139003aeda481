// The ids that a query must not be given: a hash table for every query, since sorting a thousand ids of each would cost
// as much as a fifth of an int8 search of a million rows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mips_topk.h"

namespace grank {

class ExcludedIds {
 public:
  ExcludedIds(const MipsTopkProblem& problem, int threads);

  bool empty() const { return slots_ == nullptr; }
  bool contains(int64_t query, int64_t id) const {
    const Table& t = tables_[query];
    const int64_t* slots = slots_.get() + t.first;
    for (uint64_t at = start_of(id, t.bits);; ++at) {  // ends at a free slot: a table is at most half full
      const int64_t there = slots[at & ((uint64_t{1} << t.bits) - 1)];
      if (there == id) return true;
      if (there == kFree) return false;
    }
  }

 private:
  static constexpr int64_t kFree = -1;  // no id

  struct Table {
    int64_t first;
    int bits;  // 2^bits slots
  };

  static uint64_t start_of(int64_t id, int bits) {
    return (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> (64 - bits);
  }

  std::vector<Table> tables_;
  std::unique_ptr<int64_t[]> slots_;
};

}  // namespace grank
