// Where the candidates of a scan go: for every query the best ones seen so far, and a threshold for those to come.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mips_topk_kernel.h"

namespace grank {

// A candidate as one integer: the larger, the better. Upper half the score, lower half the complement of the row's
// position, so that of equal scores the smaller position is better.
using Key = uint64_t;

inline Key key_of(float score, uint32_t row) { return static_cast<Key>(ordered_bits(score + 0.0f)) << 32 | ~row; }
inline float score_of(Key key) { return score_of_bits(static_cast<uint32_t>(key >> 32)); }
inline uint32_t row_of(Key key) { return ~static_cast<uint32_t>(key); }

// Worse than every candidate, -infinity in the first row included; its own row does not exist.
constexpr Key kNoThreshold = static_cast<Key>(0x007fffff) << 32;

// "a is better than b": with external ids those decide between equal scores.
struct Better {
  const int64_t* ids;
  bool operator()(Key a, Key b) const {
    if (ids == nullptr || (a ^ b) >> 32 != 0) return a > b;
    return ids[row_of(a)] < ids[row_of(b)];
  }
};

template <typename T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(count)]);  // uninitialised, unlike make_unique
}

// Threads collect a few candidates of each query on their own before they share them, so that a lock is taken once for
// several and memory is 8 * (k + max(k, 64)) bytes a query for all threads together, plus 72 bytes a query and thread.
class Reservoirs {
 public:
  Reservoirs(int64_t num_queries, int64_t most, int workers, const int64_t* ids);

  // The threshold of a query: candidates that are worse are not wanted. It rises while other threads add.
  Key threshold(int64_t query) const { return __atomic_load_n(&thresholds_[query], __ATOMIC_RELAXED); }
  bool is_wanted(int64_t query, Key key) const {
    const Key bar = threshold(query);
    return bar == kNoThreshold || !better_(bar, key);
  }

  // Begins a scan of which the `keep` best are wanted of every query, `keep` being at most the constructor's `most`.
  void begin(int64_t keep);
  // Adds a candidate of an eligible row. Returns true if the query's threshold may have risen.
  bool add(int worker, int64_t query, Key key) {
    uint8_t& count = staged_count_[worker * num_queries_ + query];
    Key* staged = &staged_[(worker * num_queries_ + query) * kStaged];
    staged[count++] = key;
    if (count < kStaged) return false;
    share(query, staged, count);
    count = 0;
    return true;
  }
  // Shares what the threads still hold; called between scans, when no thread adds.
  void end(int64_t query);

  // After a scan: the number of candidates there are, and the best `n` of them (n at most that), best first.
  int64_t count(int64_t query) const { return reservoirs_[query].count; }
  const Key* best(int64_t query, int64_t n, Key* scratch);
  // Room that best() needs.
  int64_t capacity() const { return capacity_; }

  // Empties a query's reservoir. If it holds as many as were to be kept, the worst of the best `keep` becomes the
  // threshold of the next scan.
  void restart(int64_t query);

 private:
  static constexpr int kStaged = 8;

  struct Reservoir {
    bool locked = false;  // a spin lock: what it guards takes a few hundred nanoseconds
    int64_t count = 0;
  };

  Key* keys(int64_t query) { return keys_.get() + query * capacity_; }
  void share(int64_t query, const Key* staged, int64_t count);
  void compact(int64_t query);

  const int64_t num_queries_;
  const int workers_;
  const int64_t capacity_;
  const Better better_;
  int64_t keep_ = 0;
  int64_t limit_ = 0;  // of a reservoir in this scan
  const std::unique_ptr<Key[]> keys_;
  std::vector<Reservoir> reservoirs_;
  std::vector<Key> thresholds_;
  const std::unique_ptr<Key[]> staged_;
  std::vector<uint8_t> staged_count_;
};

}  // namespace grank
