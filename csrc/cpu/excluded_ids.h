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
  bool contains(int64_t query, int64_t id) const { return slots_[slot_of(tables_[query], id)] != 0; }

 private:
  struct Table {
    int64_t first;       // slot
    int bits;            // 2^bits slots, at most half of them taken
    const int64_t* ids;  // of the query
  };

  // Where an id stands, or the free slot where it would.
  int64_t slot_of(const Table& t, int64_t id) const {
    for (uint64_t at = start_of(id, t.bits);; ++at) {
      const int64_t slot = t.first + static_cast<int64_t>(at & ((uint64_t{1} << t.bits) - 1));
      if (slots_[slot] == 0 || t.ids[slots_[slot] - 1] == id) return slot;
    }
  }

  static uint64_t start_of(int64_t id, int bits) {
    return (static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> (64 - bits);
  }

  std::vector<Table> tables_;
  std::unique_ptr<uint32_t[]> slots_;  // 0: free; else 1 + the place among the query's ids
};

}  // namespace grank
