// The excluded ids of each query: one hash table per query, because sorting 1000 ids per query would take a fifth of an
// int8 search of a million rows. Linear probing. The hash mixes every bit of the id with a random seed per process, so
// neither arithmetic progressions of ids nor crafted lists form long probe sequences.
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
    int bits;            // 2^bits slots, load factor at most 1/2
    const int64_t* ids;  // the query's excluded ids
  };

  // The slot of an id, or the free slot at the end of its probe sequence.
  int64_t slot_of(const Table& t, int64_t id) const {
    for (uint64_t at = start_of(id, t.bits);; ++at) {
      const int64_t slot = t.first + static_cast<int64_t>(at & ((uint64_t{1} << t.bits) - 1));
      if (slots_[slot] == 0 || t.ids[slots_[slot] - 1] == id) return slot;
    }
  }

  static uint64_t start_of(int64_t id, int bits) {
    uint64_t x = static_cast<uint64_t>(id) ^ kSeed;  // followed by the finaliser of SplitMix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (x ^ x >> 31) >> (64 - bits);
  }

  static const uint64_t kSeed;
  std::vector<Table> tables_;
  std::unique_ptr<uint32_t[]> slots_;  // 0: free; else 1 + index into the query's ids
};

}  // namespace grank
