// The excluded ids of each query: a bitmap of the rows where a query excludes at least 1/64 of them by position, else
// one hash table per query, because sorting 1000 ids per query would take a fifth of an int8 search of a million rows.
// Linear probing. The hash mixes every bit of the id with a random seed per process, so that neither arithmetic
// progressions of ids nor crafted lists form long probe sequences.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mips_topk.h"

namespace grank {

class ExcludedIds {
 public:
  ExcludedIds(const MipsTopkProblem& problem, int threads);

  bool empty() const { return tables_.empty(); }
  bool contains(int64_t query, int64_t id) const {
    const Table& t = tables_[query];
    if (t.bits == 0) return marks_[t.first + id / 64] >> id % 64 & 1;
    return slots_[slot_of(t, id)] != 0;
  }

  // Bit i: row + i is excluded; 0 for queries with a hash table.
  uint64_t of_rows(int64_t query, int64_t row) const {
    if (empty() || tables_[query].bits != 0) return 0;
    const uint64_t* word = marks_.get() + tables_[query].first + row / 64;
    return row % 64 == 0 ? word[0] : word[0] >> row % 64 | word[1] << (64 - row % 64);
  }

 private:
  struct Table {
    int64_t first;       // slot, or word of the bitmaps
    int bits;            // 2^bits slots, load factor at most 1/2; 0: a bitmap
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
  std::unique_ptr<uint64_t[]> marks_;  // num_rows bits per bitmap, and a word for unaligned reads
};

}  // namespace grank
