// One pass over all or some rows of a table for all queries: distributes steps of tiles to threads, applies filters and
// calls the kernel of the instruction set. Derived (CRTP) consumes the scores:
//
//   float bound_of(int64_t query, uint32_t first_row, float error) const
//                        least score that is offered, for rows >= first_row with quantisation errors <= `error`.
//                        int8 rows: divided by the query's scale, and lowered by the rounding error of that division
//   MipsTopkWanted wanted_of(int64_t query, uint32_t first_row) const
//                        the same threshold, exact; RowScan sets `row_error` and `ids`
//   bool offer(int worker, int64_t query, uint32_t row, float score)
//                        receives a score >= the bound; the row may be filtered out. True if the bound may have risen
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "excluded_ids.h"
#include "mips_topk.h"
#include "reservoirs.h"
#include "threads.h"

namespace grank {

// Size of a row sample, and a rank in it whose score is below the k-th best score with probability > 1 - 1e-5. The
// number of top-k rows in the sample is about Poisson(e), e = k * rows / num_rows; e + 4.3 sqrt(e) + 3 is above its
// 1 - 1e-5 quantile.
struct Sample {
  int64_t rows = 0;  // 0: no sampling
  int64_t rank = 0;
};
Sample sample_of(int64_t num_rows, int64_t num_queries, int64_t k);

// A jittered stratified sample: `count` equal strata, a pseudo-random row of each, so that no periodic order of the
// table aligns with it.
std::vector<uint32_t> sampled_rows(int64_t num_rows, int64_t count);

// Symmetric int8 quantisation: writes q8 (d,) with q ~ scale * q8 and returns scale = max|q| / 127.
float quantise(const float* q, int64_t d, int8_t* q8);

// Writes the positions in [begin, end) with a true mask to `list` (end - begin,); returns their number.
int64_t list_allowed(const bool* allow, int64_t begin, int64_t end, uint32_t* list);

// The problem of the queries [first, first + count).
MipsTopkProblem some_queries(const MipsTopkProblem& problem, int64_t first, int64_t count);

template <typename Derived>
class RowScan {
 protected:
  // row_error: (num_rows,), not negative, or null. answered: (num_queries,), true for queries to skip; or empty.
  RowScan(const MipsTopkProblem& problem, const float* row_error, const MipsTopkKernel& kernel,
          std::vector<char> answered)
      : p_(problem),
        kernel_(kernel),
        row_error_(row_error),
        answered_(std::move(answered)),
        threads_(useful_threads(problem)),
        panel_bytes_((kernel.panel_bytes(problem.dtype, problem.d) + 63) / 64 * 64),
        panels_(allocate<char>(threads_ * panel_bytes_ + 64)),
        packed_(allocate<char>(kernel.queries_bytes(problem.dtype, problem.num_queries, problem.d))),
        excluded_(problem, threads_) {
    pack_queries();
  }

  // Scores the rows list[0 .. count), or rows [0, count) if list is null.
  void scan(const uint32_t* list, int64_t count) {
    const int64_t blocks = (p_.num_queries + kStepQueries - 1) / kStepQueries;
    const int64_t rows = shared_filter() ? rows_to_filter(count) : kStepRows;
    const int64_t steps = (count + rows - 1) / rows * blocks;
    parallel_for(threads_, steps, [&](int64_t step, int worker) {
      const int64_t begin = step / blocks * rows;
      scan_step(list, begin, std::min(begin + rows, count), step % blocks * kStepQueries, worker);
    });
  }

  bool is_answered(int64_t query) const { return !answered_.empty() && answered_[query]; }

  bool is_eligible(int64_t query, uint32_t row) const {
    if (p_.allow != nullptr && !is_allowed(query, row)) return false;
    return excluded_.empty() || !excluded_.contains(query, p_.ids != nullptr ? p_.ids[row] : row);
  }

  const MipsTopkProblem p_;
  const MipsTopkKernel& kernel_;
  const float* const row_error_;
  const std::vector<char> answered_;
  const int threads_;
  std::unique_ptr<int8_t[]> q8_;          // (num_queries, d), int8 only
  std::unique_ptr<float[]> query_scale_;  // int8 only

 private:
  // Rows and queries per step: small enough to balance the threads, large enough to amortise the cost of a step; the
  // packed queries of a step fit the L2 cache.
  static constexpr int64_t kStepRows = 32 * kTileRows;
  static constexpr int64_t kStepQueries = 11 * kQueriesMultiple;
  static constexpr int kManyPassed = 4;

  // The context that emit() gets: the tile being scanned.
  struct Tile {
    Derived* search;
    int worker;
    float* bounds;
    int64_t first_query;
    uint32_t first_row;
    const uint32_t* list;  // row positions; null: consecutive from first_row
    float error;
    bool gathered;  // whether `ids` and `row_error` are those of the listed rows
    int64_t ids[kTileRows];
    float row_error[kTileRows];
  };

  // Waking a thread costs about 100,000 multiply-adds.
  static int useful_threads(const MipsTopkProblem& p) {
    const double work = static_cast<double>(p.num_rows) * static_cast<double>(p.d) * (4.0 + p.num_queries);
    return static_cast<int>(std::min<double>(p.threads, 1 + work / (1 << 21)));
  }

  void pack_queries() {
    const void* queries = p_.queries;
    if (p_.dtype == DType::kInt8) {
      q8_ = allocate<int8_t>(p_.num_queries * p_.d);
      query_scale_ = allocate<float>(p_.num_queries);
      parallel_for(threads_, p_.num_queries, [&](int64_t b, int) {
        query_scale_[b] = quantise(p_.queries + b * p_.d, p_.d, q8_.get() + b * p_.d);
      });
      queries = q8_.get();
    }
    kernel_.pack_queries(p_.dtype, queries, p_.num_queries, p_.d, packed_.get());
  }

  bool shared_filter() const { return p_.allow != nullptr && p_.allow_stride == 0; }

  // Rows per step under a shared mask: enough to fill tiles when few rows are eligible, and at least four steps per
  // thread.
  int64_t rows_to_filter(int64_t count) const {
    const int64_t share = count / (4 * threads_) / kStepRows * kStepRows;
    return std::min(std::max(share, kStepRows), 32 * kStepRows);
  }

  // Read as bytes: a bool tensor may be a view of bytes other than 0 and 1.
  const uint8_t* allowed(int64_t query) const {
    return reinterpret_cast<const uint8_t*>(p_.allow) + p_.place(query) * p_.allow_stride;
  }
  bool is_allowed(int64_t query, uint32_t row) const { return allowed(query)[row] != 0; }

  // Whether a contiguous scan is faster than gathering: at least half of the rows are allowed, as with few tombstones.
  bool mostly_allowed(int64_t begin, int64_t end) const {
    const uint8_t* allow = allowed(0);
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += allow[i] != 0;
    return 2 * count >= end - begin;
  }

  // Bit i: byte i of 64 is not 0.
  static uint64_t bits_of(const uint8_t* bytes) {
    constexpr uint64_t kLow = 0x0101010101010101u;
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t word;
      __builtin_memcpy(&word, bytes + 8 * i, 8);
      word = (((word & 0x7f * kLow) + 0x7f * kLow) | word) >> 7 & kLow;
      bits |= word * 0x0102040810204080u >> 56 << 8 * i;
    }
    return bits;
  }

  // Copies the allowed rows of list[begin .. end) to `kept`; returns their number.
  int64_t keep_allowed(const uint32_t* list, int64_t begin, int64_t end, uint32_t* kept) const {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) {
      kept[n] = list[i];
      n += is_allowed(0, list[i]);
    }
    return n;
  }

  // Removes ineligible rows and scores that are not wanted from `passed`, 64 rows per operation.
  uint64_t few_of(Tile& tile, int64_t query, int first, const float* scores, uint64_t passed) const {
    if (tile.list == nullptr) {
      const int64_t row = tile.first_row + static_cast<int64_t>(first);
      if (p_.allow != nullptr && p_.allow_stride != 0) passed &= bits_of(allowed(query) + tile.first_row) >> first;
      passed &= ~excluded_.of_rows(query, row);
    }
    if (__builtin_popcountll(passed) <= kManyPassed) return passed;
    MipsTopkWanted wanted = static_cast<const Derived*>(this)->wanted_of(query, tile.first_row);
    if (tile.list == nullptr) {
      wanted.ids = p_.ids != nullptr ? p_.ids + tile.first_row + first : nullptr;
      wanted.row_error = row_error_ != nullptr ? row_error_ + tile.first_row + first : nullptr;
    } else {
      for (int i = 0; !tile.gathered && i < kTileRows; ++i) {
        tile.ids[i] = p_.ids != nullptr ? p_.ids[tile.list[i]] : 0;
        tile.row_error[i] = row_error_ != nullptr ? row_error_[tile.list[i]] : 0;
      }
      tile.gathered = true;
      wanted.ids = p_.ids != nullptr ? tile.ids + first : nullptr;
      wanted.row_error = row_error_ != nullptr ? tile.row_error + first : nullptr;
    }
    return passed & kernel_.wanted(scores, wanted);
  }

  static float emit(void* context, int64_t query_in_step, int first, const float* scores, uint64_t passed) {
    Tile& tile = *static_cast<Tile*>(context);
    const int64_t query = tile.first_query + query_in_step;
    // Many scores pass if they tie or if the best rows are ineligible; offering them one by one would dominate.
    const bool many = __builtin_popcountll(passed) > kManyPassed;
    if (many) passed = tile.search->few_of(tile, query, first, scores, passed);
    bool risen = many;
    for (; passed != 0; passed &= passed - 1) {
      const int i = __builtin_ctzll(passed);
      const uint32_t row =
          tile.list != nullptr ? tile.list[first + i] : tile.first_row + static_cast<uint32_t>(first + i);
      risen |= tile.search->offer(tile.worker, query, row, scores[i]);
    }
    return risen ? tile.search->bound_of(query, tile.first_row, tile.error) : tile.bounds[query_in_step];
  }

  void scan_step(const uint32_t* list, int64_t begin, int64_t end, int64_t first_query, int worker) {
    if (!shared_filter()) return scan_rows(list, begin, end, first_query, worker);
    if (list == nullptr && mostly_allowed(begin, end)) {  // offer() drops the other rows
      for (int64_t row = begin; row < end; row += kStepRows) {
        scan_rows(nullptr, row, std::min(row + kStepRows, end), first_query, worker);
      }
      return;
    }
    // Gathers the eligible rows; the others are not read.
    uint32_t eligible[2 * kStepRows];
    int64_t n = 0;
    for (int64_t row = begin; row < end; row += kStepRows) {
      const int64_t stop = std::min(row + kStepRows, end);
      n += list == nullptr ? list_allowed(p_.allow, row, stop, eligible + n)
                           : keep_allowed(list, row, stop, eligible + n);
      if (n < kStepRows) continue;
      scan_rows(eligible, 0, kStepRows, first_query, worker);
      n -= kStepRows;
      std::copy(eligible + kStepRows, eligible + kStepRows + n, eligible);
    }
    if (n > 0) scan_rows(eligible, 0, n, first_query, worker);
  }

  float largest_error(const uint32_t* list, int64_t begin, int64_t end) const {
    if (row_error_ == nullptr) return 0;
    int32_t largest = 0;  // non-negative floats order like their bits, and the compiler vectorises an integer maximum
    for (int64_t i = begin; i < end; ++i) {
      int32_t bits;
      __builtin_memcpy(&bits, row_error_ + (list != nullptr ? list[i] : i), 4);
      largest = std::max(largest, bits);
    }
    float error;
    __builtin_memcpy(&error, &largest, 4);
    return error;
  }

  void scan_rows(const uint32_t* list, int64_t begin, int64_t end, int64_t first_query, int worker) {
    float bounds[kStepQueries];
    auto* derived = static_cast<Derived*>(this);
    const int64_t num_queries = std::min(kStepQueries, p_.num_queries - first_query);
    const float* query_scale = query_scale_ != nullptr ? query_scale_.get() + first_query : nullptr;
    const MipsTopkQueries queries{packed_.get() + kernel_.queries_bytes(p_.dtype, first_query, p_.d), query_scale,
                                  num_queries, bounds};
    const auto address = reinterpret_cast<uintptr_t>(panels_.get()) + worker * panel_bytes_;
    void* panel = reinterpret_cast<void*>((address + 63) / 64 * 64);
    const uint32_t first_row = list != nullptr ? list[begin] : static_cast<uint32_t>(begin);
    const float error = largest_error(list, begin, end);
    for (int64_t q = 0; q < num_queries; ++q) {
      const bool wanted = !is_answered(first_query + q);  // no score is >= NaN
      bounds[q] =
          wanted ? derived->bound_of(first_query + q, first_row, error) : std::numeric_limits<float>::quiet_NaN();
    }
    const char* rows = static_cast<const char*>(p_.rows);
    const int64_t row_bytes = std::min<int64_t>(p_.d * element_bytes(p_.dtype), 512);
    const auto fetch = [&](uint32_t row) {  // prefetches a gathered row
      for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(rows + row * p_.row_stride + line);
    };
    for (int64_t i = begin; list != nullptr && i < std::min<int64_t>(begin + kTileRows, end); ++i) fetch(list[i]);
    for (int64_t row = begin; row < end; row += kTileRows) {
      uint32_t listed[kTileRows];
      float listed_scale[kTileRows];
      const float* row_scale = p_.row_scale != nullptr ? p_.row_scale + row : nullptr;
      MipsTopkTile tile{rows + row * p_.row_stride, p_.row_stride, nullptr, row_scale, ~uint64_t{0}};
      if (list != nullptr || end - row < kTileRows) {  // a partial tile repeats its last row
        const int64_t n = std::min<int64_t>(kTileRows, end - row);
        for (int64_t i = 0; i < kTileRows; ++i) {
          const int64_t at = row + std::min(i, n - 1);
          listed[i] = list != nullptr ? list[at] : static_cast<uint32_t>(at);
          if (p_.row_scale != nullptr) listed_scale[i] = p_.row_scale[listed[i]];
          if (list != nullptr && row + kTileRows + i < end) fetch(list[row + kTileRows + i]);  // the next tile
        }
        tile = {rows, p_.row_stride, listed, listed_scale, ~uint64_t{0} >> (kTileRows - n)};
      } else if (shared_filter()) {
        tile.valid = bits_of(allowed(0) + row);
        if (tile.valid == 0) continue;
      }
      Tile context;
      context.search = derived;
      context.worker = worker;
      context.bounds = bounds;
      context.first_query = first_query;
      context.first_row = tile.list != nullptr ? listed[0] : static_cast<uint32_t>(row);
      context.list = tile.list;
      context.error = error;
      context.gathered = false;
      kernel_.scan_tile(p_.dtype, p_.d, tile, queries, panel, emit, &context);
    }
  }

  const int64_t panel_bytes_;
  const std::unique_ptr<char[]> panels_;
  const std::unique_ptr<char[]> packed_;
  const ExcludedIds excluded_;
};

}  // namespace grank
