#include "reservoirs.h"

#include <algorithm>

namespace grank {
namespace {

int64_t room_for(int64_t keep) { return keep + std::max<int64_t>(keep, 64); }

constexpr int64_t kRadixCount = 256;  // below it a comparison sort is faster

// Radix sort by score, descending, least significant byte first; a byte equal in all keys is skipped. Ties in any
// order. Returns the sorted array: `keys` or `scratch`.
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
    : SharedBuffers(num_queries, room_for(most), workers),
      better_{ids},
      thresholds_(static_cast<size_t>(num_queries), kNoThreshold) {}

void Reservoirs::begin(int64_t keep) {
  keep_ = keep;
  for (int64_t query = 0; query < num_queries(); ++query) buffer(query).limit = room_for(keep);
}

void Reservoirs::compact(int64_t query) {
  Key* k = entries(query);
  std::nth_element(k, k + keep_ - 1, k + count(query), better_);
  buffer(query).count = keep_;
  __atomic_store_n(&thresholds_[query], k[keep_ - 1], __ATOMIC_RELAXED);
}

void Reservoirs::restart(int64_t query) {
  if (count(query) >= keep_) {
    compact(query);
  } else {
    thresholds_[query] = kNoThreshold;
  }
  buffer(query).count = 0;
}

const Key* Reservoirs::best(int64_t query, int64_t n, Key* scratch) {
  Key* k = entries(query);
  const int64_t count = this->count(query);
  if (count < kRadixCount) {
    std::partial_sort(k, k + n, k + count, better_);
    return k;
  }
  k = radix_sort(k, scratch, count);
  for (int64_t begin = 0; begin < n;) {  // ties of the score
    int64_t end = begin + 1;
    while (end < count && k[end] >> 32 == k[begin] >> 32) ++end;
    if (end - begin > 1) std::sort(k + begin, k + end, better_);
    begin = end;
  }
  return k;
}

}  // namespace grank
