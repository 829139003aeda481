// The best candidates of each query so far, and the score threshold for further ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "mips_topk_kernel.h"

namespace grank {

// A candidate as one integer, larger is better: the ordered bits of the score above the complement of the row position,
// so that the smaller position wins a tie.
using Key = uint64_t;

inline Key key_of(float score, uint32_t row) { return static_cast<Key>(ordered_bits(score + 0.0f)) << 32 | ~row; }
inline float score_of(Key key) { return score_of_bits(static_cast<uint32_t>(key >> 32)); }
inline uint32_t row_of(Key key) { return ~static_cast<uint32_t>(key); }

// Below every candidate's key, that of -infinity in row 0 included; no row has this position.
constexpr Key kNoThreshold = static_cast<Key>(0x007fffff) << 32;

// A threshold without a row: every candidate with this score or a higher one is better.
inline Key threshold_at(float score) { return static_cast<Key>(ordered_bits(score + 0.0f)) << 32; }
inline bool is_score(Key threshold) { return static_cast<uint32_t>(threshold) == 0; }

// Order of candidates: score descending, then external id (without ids: position) ascending.
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

// One buffer of entries per query, filled by the threads of a scan. Derived (CRTP) has
//
//   bool is_wanted(int64_t query, Entry entry) const   whether an entry is kept
//   void compact(int64_t query)                        makes room in a full buffer
//
// Each thread stages up to kStaged entries per query before it copies them to the shared buffer: one lock per batch.
// Memory: `capacity` entries per query, more for buffers that have grown, and kStaged per (query, thread).
template <typename Entry, typename Derived>
class SharedBuffers {
 public:
  // Adds an entry of an eligible row. Returns true if the query's threshold may have risen.
  bool add(int worker, int64_t query, Entry entry) {
    uint8_t& count = staged_count_[worker * num_queries_ + query];
    Entry* staged = &staged_[(worker * num_queries_ + query) * kStaged];
    staged[count++] = entry;
    if (count < kStaged) return false;
    share(query, staged, count);
    count = 0;
    return true;
  }
  // Flushes the staged entries of all threads. Not concurrent with add().
  void end(int64_t query) {
    for (int worker = 0; worker < workers_; ++worker) {
      uint8_t& count = staged_count_[worker * num_queries_ + query];
      share(query, &staged_[(worker * num_queries_ + query) * kStaged], count);
      count = 0;
    }
  }

  // Number of entries. Not concurrent with add().
  int64_t count(int64_t query) const { return buffers_[query].count; }
  int64_t capacity() const { return capacity_; }

 protected:
  SharedBuffers(int64_t num_queries, int64_t capacity, int workers)
      : num_queries_(num_queries),
        workers_(workers),
        capacity_(capacity),
        entries_(allocate<Entry>(num_queries * capacity)),
        buffers_(static_cast<size_t>(num_queries)),
        staged_(allocate<Entry>(workers * num_queries * kStaged)),
        staged_count_(static_cast<size_t>(workers * num_queries), 0) {}

  struct Buffer {
    bool locked = false;  // a spin lock: the critical section takes a few hundred nanoseconds
    int64_t count = 0;
    int64_t limit = 0;                 // compact() runs at this many entries
    std::unique_ptr<Entry[]> grown{};  // replaces the initial entries
  };

  // False if memory is short: an exception would leave the buffer locked.
  bool grow(int64_t query, int64_t limit) {
    Buffer& b = buffers_[query];
    if (limit > capacity_) {
      std::unique_ptr<Entry[]> more(new (std::nothrow) Entry[static_cast<size_t>(limit)]);
      if (more == nullptr) return false;
      std::copy(entries(query), entries(query) + b.count, more.get());
      b.grown = std::move(more);
    }
    b.limit = limit;
    return true;
  }

  Entry* entries(int64_t query) const {
    const Buffer& b = buffers_[query];
    return b.grown != nullptr ? b.grown.get() : entries_.get() + query * capacity_;
  }
  Buffer& buffer(int64_t query) { return buffers_[query]; }
  int64_t num_queries() const { return num_queries_; }

 private:
  static constexpr int kStaged = 8;

  void share(int64_t query, const Entry* staged, int64_t count) {
    Buffer& b = buffers_[query];
    auto& derived = static_cast<Derived&>(*this);
    while (__atomic_test_and_set(&b.locked, __ATOMIC_ACQUIRE)) {
    }
    for (int64_t i = 0; i < count; ++i) {
      if (b.count == b.limit) derived.compact(query);
      if (derived.is_wanted(query, staged[i])) entries(query)[b.count++] = staged[i];
    }
    __atomic_clear(&b.locked, __ATOMIC_RELEASE);
  }

  const int64_t num_queries_;
  const int workers_;
  const int64_t capacity_;
  const std::unique_ptr<Entry[]> entries_;
  std::vector<Buffer> buffers_;
  const std::unique_ptr<Entry[]> staged_;
  std::vector<uint8_t> staged_count_;
};

// The best keys of each query; capacity k + max(k, 64).
class Reservoirs : public SharedBuffers<Key, Reservoirs> {
 public:
  Reservoirs(int64_t num_queries, int64_t most, int workers, const int64_t* ids);

  // Candidates below the threshold are dropped. It rises while other threads add.
  Key threshold(int64_t query) const { return __atomic_load_n(&thresholds_[query], __ATOMIC_RELAXED); }
  bool is_wanted(int64_t query, Key key) const {
    const Key bar = threshold(query);
    return is_score(bar) ? key > bar : !better_(bar, key);
  }

  // Sets the threshold before a scan.
  void start_at(int64_t query, float score) { thresholds_[query] = threshold_at(score); }

  // Begins a scan for the `keep` best rows of each query; `keep` <= the constructor's `most`.
  void begin(int64_t keep);

  // The best `n` <= count(query) candidates in order, after a scan. `scratch`: capacity() keys.
  const Key* best(int64_t query, int64_t n, Key* scratch);

  // Empties a query's reservoir. With at least `keep` entries, the `keep`-th best becomes the threshold of the next
  // scan.
  void restart(int64_t query);

  // Keeps the best `keep` entries and raises the threshold to the worst of them.
  void compact(int64_t query);

 private:
  const Better better_;
  int64_t keep_ = 0;
  std::vector<Key> thresholds_;
};

}  // namespace grank
