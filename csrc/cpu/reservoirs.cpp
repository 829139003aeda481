#include "reservoirs.h"

#include <algorithm>

namespace grank {
namespace {

int64_t room_for(int64_t keep) { return keep + std::max<int64_t>(keep, 64); }

constexpr int64_t kRadixCount = 256;  // below it a comparison sort is faster

// Sorts by score, best first, equal scores in any order: least significant byte first, bytes that are all equal left
// out. Returns where the result is: `keys` or `scratch`.
Key* radix_sort(Key* keys, Key* scratch, int64_t count) {
  uint32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int byte = 0; byte < 4; ++byte) ++starts[byte][keys[i] >> (32 + 8 * byte) & 255];
  }
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 32 + 8 * byte;
    uint32_t* start = starts[byte];
    if (start[keys[0] >> shift & 255] == count) continue;
    uint32_t next = 0;
    for (int value = 255; value >= 0; --value) {
      const uint32_t here = start[value];
      start[value] = next;
      next += here;
    }
    for (int64_t i = 0; i < count; ++i) scratch[start[keys[i] >> shift & 255]++] = keys[i];
    std::swap(keys, scratch);
  }
  return keys;
}

}  // namespace

Reservoirs::Reservoirs(int64_t num_queries, int64_t most, int workers, const int64_t* ids)
    : num_queries_(num_queries),
      workers_(workers),
      capacity_(room_for(most)),
      better_{ids},
      keys_(allocate<Key>(num_queries * capacity_)),
      reservoirs_(static_cast<size_t>(num_queries)),
      thresholds_(static_cast<size_t>(num_queries), kNoThreshold),
      staged_(allocate<Key>(workers * num_queries * kStaged)),
      staged_count_(static_cast<size_t>(workers * num_queries), 0) {}

void Reservoirs::begin(int64_t keep) {
  keep_ = keep;
  limit_ = room_for(keep);
}

void Reservoirs::share(int64_t query, const Key* staged, int64_t count) {
  Reservoir& r = reservoirs_[query];
  while (__atomic_test_and_set(&r.locked, __ATOMIC_ACQUIRE)) {
  }
  for (int64_t i = 0; i < count; ++i) {
    if (r.count == limit_) compact(query);
    if (is_wanted(query, staged[i])) keys(query)[r.count++] = staged[i];
  }
  __atomic_clear(&r.locked, __ATOMIC_RELEASE);
}

void Reservoirs::compact(int64_t query) {
  Key* k = keys(query);
  std::nth_element(k, k + keep_ - 1, k + reservoirs_[query].count, better_);
  reservoirs_[query].count = keep_;
  __atomic_store_n(&thresholds_[query], k[keep_ - 1], __ATOMIC_RELAXED);
}

void Reservoirs::end(int64_t query) {
  for (int worker = 0; worker < workers_; ++worker) {
    uint8_t& count = staged_count_[worker * num_queries_ + query];
    share(query, &staged_[(worker * num_queries_ + query) * kStaged], count);
    count = 0;
  }
}

void Reservoirs::restart(int64_t query) {
  if (reservoirs_[query].count >= keep_) {
    compact(query);
  } else {
    thresholds_[query] = kNoThreshold;
  }
  reservoirs_[query].count = 0;
}

const Key* Reservoirs::best(int64_t query, int64_t n, Key* scratch) {
  Key* k = keys(query);
  const int64_t count = reservoirs_[query].count;
  if (count < kRadixCount) {
    std::partial_sort(k, k + n, k + count, better_);
    return k;
  }
  k = radix_sort(k, scratch, count);
  for (int64_t begin = 0; begin < n;) {  // what the scores leave undecided
    int64_t end = begin + 1;
    while (end < count && k[end] >> 32 == k[begin] >> 32) ++end;
    if (end - begin > 1) std::sort(k + begin, k + end, better_);
    begin = end;
  }
  return k;
}

}  // namespace grank
