#include "mips_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "reservoirs.h"
#include "threads.h"

namespace grank {
namespace {

// A sample of the rows and the rank in it whose score is, with probability > 1 - 1e-5, below the k-th best of all. The
// sample holds about Poisson(e) of the k best, e = k * rows / num_rows, and e + 4.3 sqrt(e) + 3 is above that quantile.
struct Sample {
  int64_t rows = 0;  // 0: not worth it
  int64_t rank = 0;
};

Sample sample_of(int64_t num_rows, int64_t num_queries, int64_t k) {
  // A row of the sample costs a cache miss, shared by all queries; an emitted candidate costs about as much.
  const int64_t rows = num_queries < 8 ? 1024 : 16384;
  if (rows > num_rows / 16) return {};
  const double expected = static_cast<double>(k) * rows / num_rows;
  const auto rank = static_cast<int64_t>(std::ceil(expected + 4.3 * std::sqrt(expected) + 3));
  if (rank > rows / 4) return {};
  return {rows, rank};
}

// One row of every stride, at a place in it that no order of the table can be aligned with.
std::vector<uint32_t> sampled_rows(int64_t num_rows, int64_t count) {
  std::vector<uint32_t> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = num_rows * i / count, end = num_rows * (i + 1) / count;  // num_rows < 2^32, count < 2^27
    const uint64_t mixed = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    rows[static_cast<size_t>(i)] = static_cast<uint32_t>(begin + static_cast<int64_t>((mixed >> 32) % (end - begin)));
  }
  return rows;
}

// int8 numbers and their scale: q is about scale * q8.
float quantise(const float* q, int64_t d, int8_t* q8) {
  float largest = 0;
  for (int64_t j = 0; j < d; ++j) {
    const float a = std::fabs(q[j]);
    if (!(a <= largest)) largest = a;
    if (std::isnan(largest)) break;
  }
  const float scale = largest / 127.0f;
  for (int64_t j = 0; j < d; ++j) {
    const float x = std::nearbyint(q[j] / scale);
    // A scale of zero, infinity or NaN leaves no number to round; the product with the scale then says it all.
    q8[j] = std::isnan(x) ? 0 : static_cast<int8_t>(std::clamp(x, -127.0f, 127.0f));
  }
  return scale;
}

class Search {
 public:
  Search(const MipsTopkProblem& problem, const MipsTopkKernel& kernel, bool may_sample)
      : p_(problem),
        kernel_(kernel),
        threads_(useful_threads(problem)),
        k_(std::min(problem.k, problem.num_rows)),
        sample_(may_sample ? sample_of(problem.num_rows, problem.num_queries, k_) : Sample{}),
        panel_bytes_((kernel.panel_bytes(problem.dtype, problem.d) + 63) / 64 * 64),
        found_(problem.num_queries, std::max(k_, sample_.rank), threads_, problem.ids),
        scratch_(allocate<Key>(threads_ * found_.capacity())),
        panels_(allocate<char>(threads_ * panel_bytes_ + 64)),
        packed_(allocate<char>(kernel.queries_bytes(problem.dtype, problem.num_queries, problem.d))) {
    pack_queries();
    sort_exclusions();
  }

  void run() {
    if (sample_.rows > 0) {
      const std::vector<uint32_t> rows = sampled_rows(p_.num_rows, sample_.rows);
      scan(rows.data(), sample_.rows, sample_.rank);
      for (int64_t b = 0; b < p_.num_queries; ++b) found_.restart(b);
    }
    std::vector<char> missed(static_cast<size_t>(p_.num_queries), false);
    for (int64_t b = 0; b < p_.num_queries; ++b) missed[b] = found_.threshold(b) != kNoThreshold;
    scan(nullptr, p_.num_rows, k_);
    for (int64_t b = 0; b < p_.num_queries; ++b) missed[b] = missed[b] && found_.count(b) < k_;
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int worker) {
      if (!missed[b]) finish(b, worker);
    });
    for (int64_t b = 0; b < p_.num_queries; ++b) {
      if (missed[b]) Search(only_query(b), kernel_, false).run();  // the sampled threshold was above the k-th best
    }
  }

 private:
  // A step of a scan: some tiles of rows times some queries. Small enough to balance the threads, large enough to hide
  // what a step costs; the packed queries of a step stay in the second-level cache.
  static constexpr int64_t kStepRows = 32 * kTileRows;
  static constexpr int64_t kStepQueries = 11 * kQueriesMultiple;

  // What emit() must know of the tile being scanned.
  struct Tile {
    Search* search;
    int worker;
    float* bounds;
    int64_t first_query;
    uint32_t first_row;
    const uint32_t* list;  // the rows' positions, or null: they follow first_row
  };

  // Waking a thread costs about as much as a hundred thousand multiply-adds.
  static int useful_threads(const MipsTopkProblem& p) {
    const double work = static_cast<double>(p.num_rows) * static_cast<double>(p.d) * (4.0 + p.num_queries);
    return static_cast<int>(std::min<double>(p.threads, 1 + work / (1 << 21)));
  }

  MipsTopkProblem only_query(int64_t b) const {
    MipsTopkProblem one = p_;
    one.num_queries = 1;
    one.queries += b * p_.d;
    one.values += b * p_.k;
    one.positions += b * p_.k;
    if (one.exclude_offsets != nullptr) one.exclude_offsets += b;
    if (one.allow != nullptr) one.allow += b * p_.allow_stride;
    return one;
  }

  void pack_queries() {
    const void* queries = p_.queries;
    std::unique_ptr<int8_t[]> q8;
    if (p_.dtype == DType::kInt8) {
      q8 = allocate<int8_t>(p_.num_queries * p_.d);
      query_scale_ = allocate<float>(p_.num_queries);
      parallel_for(threads_, p_.num_queries, [&](int64_t b, int) {
        query_scale_[b] = quantise(p_.queries + b * p_.d, p_.d, q8.get() + b * p_.d);
      });
      queries = q8.get();
    }
    kernel_.pack_queries(p_.dtype, queries, p_.num_queries, p_.d, packed_.get());
  }

  void sort_exclusions() {
    if (p_.exclude_offsets == nullptr) return;
    const int64_t begin = p_.exclude_offsets[0], end = p_.exclude_offsets[p_.num_queries];
    excluded_ = allocate<int64_t>(end - begin);
    std::copy(p_.exclude_ids + begin, p_.exclude_ids + end, excluded_.get());
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int) {
      std::sort(excluded_.get() + p_.exclude_offsets[b] - begin, excluded_.get() + p_.exclude_offsets[b + 1] - begin);
    });
  }

  // Read as bytes: a bool tensor may be a view of others than 0 and 1.
  bool is_allowed(int64_t query, uint32_t row) const {
    return reinterpret_cast<const uint8_t*>(p_.allow)[query * p_.allow_stride + row] != 0;
  }

  bool is_eligible(int64_t query, uint32_t row) const {
    if (p_.allow != nullptr && !is_allowed(query, row)) return false;
    if (excluded_ == nullptr) return true;
    const int64_t id = p_.ids != nullptr ? p_.ids[row] : row;
    const int64_t* sorted = excluded_.get() - p_.exclude_offsets[0];
    return !std::binary_search(sorted + p_.exclude_offsets[query], sorted + p_.exclude_offsets[query + 1], id);
  }

  void finish(int64_t query, int worker) {
    const int64_t n = std::min(found_.count(query), k_);
    const Key* best = found_.best(query, n, scratch_.get() + worker * found_.capacity());
    float* values = p_.values + query * p_.k;
    int64_t* positions = p_.positions + query * p_.k;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = score_of(best[i]);
      positions[i] = row_of(best[i]);
    }
    std::fill(values + n, values + p_.k, -std::numeric_limits<float>::infinity());
    std::fill(positions + n, positions + p_.k, -1);
  }

  // What a score must reach in the rows from `first_row` on; thresholds that other threads raise may come late.
  float bound_of(int64_t query, uint32_t first_row) const {
    const Key threshold = found_.threshold(query);
    // Behind the threshold's own row a tie is lost, unless external ids decide it.
    const bool tie_is_lost = p_.ids == nullptr && first_row > row_of(threshold);
    const float bound = score_of_bits(static_cast<uint32_t>(threshold >> 32) + tie_is_lost);
    if (p_.dtype != DType::kInt8) return bound;
    // The kernel compares float(sum) * row_scale: two roundings where the score has three, 2^-24 each, and one here.
    // Far from overflow and underflow those are relative errors, below 2^-21 in all.
    const float scaled = bound / query_scale_[query];
    const bool safe = std::fabs(bound) > 1e-28f && std::fabs(scaled) > 1e-28f && std::fabs(scaled) < 1e38f;
    return safe ? scaled - std::fabs(scaled) * 1e-6f : -std::numeric_limits<float>::infinity();
  }

  static float emit(void* context, int64_t query_in_step, int first, const float* scores, uint64_t passed) {
    const Tile& tile = *static_cast<const Tile*>(context);
    Search& search = *tile.search;
    const int64_t query = tile.first_query + query_in_step;
    bool risen = false;
    for (; passed != 0; passed &= passed - 1) {
      const int i = __builtin_ctzll(passed);
      if (std::isnan(scores[i])) continue;  // of int8 rows: what was compared does not know of the query's scale
      const uint32_t row =
          tile.list != nullptr ? tile.list[first + i] : tile.first_row + static_cast<uint32_t>(first + i);
      const Key key = key_of(scores[i], row);
      if (search.found_.is_wanted(query, key) && search.is_eligible(query, row)) {
        risen |= search.found_.add(tile.worker, query, key);
      }
    }
    return risen ? search.bound_of(query, tile.first_row) : tile.bounds[query_in_step];
  }

  // Offers every eligible row of list[0 .. count), or of the first `count` rows where list is null, to the reservoirs.
  void scan(const uint32_t* list, int64_t count, int64_t keep) {
    found_.begin(keep);
    const int64_t blocks = (p_.num_queries + kStepQueries - 1) / kStepQueries;
    const int64_t steps = (count + kStepRows - 1) / kStepRows * blocks;
    parallel_for(threads_, steps, [&](int64_t step, int worker) {
      const int64_t begin = step / blocks * kStepRows;
      scan_step(list, begin, std::min(begin + kStepRows, count), step % blocks * kStepQueries, worker);
    });
    for (int64_t b = 0; b < p_.num_queries; ++b) found_.end(b);
  }

  void scan_step(const uint32_t* list, int64_t begin, int64_t end, int64_t first_query, int worker) {
    uint32_t eligible[kStepRows];
    if (p_.allow != nullptr && p_.allow_stride == 0) {  // rows no query may have are not even read
      int64_t n = 0;
      for (int64_t i = begin; i < end; ++i) {
        eligible[n] = list != nullptr ? list[i] : static_cast<uint32_t>(i);
        n += is_allowed(0, eligible[n]);
      }
      if (n == 0) return;
      list = eligible, begin = 0, end = n;
    }
    float bounds[kStepQueries];
    const int64_t num_queries = std::min(kStepQueries, p_.num_queries - first_query);
    const float* query_scale = query_scale_ != nullptr ? query_scale_.get() + first_query : nullptr;
    const MipsTopkQueries queries{packed_.get() + kernel_.queries_bytes(p_.dtype, first_query, p_.d), query_scale,
                                  num_queries, bounds};
    const auto address = reinterpret_cast<uintptr_t>(panels_.get()) + worker * panel_bytes_;
    void* panel = reinterpret_cast<void*>((address + 63) / 64 * 64);
    const uint32_t first_row = list != nullptr ? list[begin] : static_cast<uint32_t>(begin);
    for (int64_t q = 0; q < num_queries; ++q) bounds[q] = bound_of(first_query + q, first_row);
    const char* rows = static_cast<const char*>(p_.rows);
    const int64_t row_bytes = p_.d * element_bytes(p_.dtype);
    for (int64_t row = begin; row < end; row += kTileRows) {
      uint32_t listed[kTileRows];
      float listed_scale[kTileRows];
      const float* row_scale = p_.row_scale != nullptr ? p_.row_scale + row : nullptr;
      MipsTopkTile tile{rows + row * p_.row_stride, p_.row_stride, nullptr, row_scale, ~uint64_t{0}};
      if (list != nullptr || end - row < kTileRows) {  // a short tile repeats its last row
        const int64_t n = std::min<int64_t>(kTileRows, end - row);
        for (int64_t i = 0; i < kTileRows; ++i) {
          const int64_t at = row + std::min(i, n - 1);
          listed[i] = list != nullptr ? list[at] : static_cast<uint32_t>(at);
          if (p_.row_scale != nullptr) listed_scale[i] = p_.row_scale[listed[i]];
          if (list != nullptr && row + kTileRows + i < end) {  // rows that lie apart, of the next tile
            const char* next = rows + list[row + kTileRows + i] * p_.row_stride;
            for (int64_t line = 0; line < std::min<int64_t>(row_bytes, 512); line += 64)
              __builtin_prefetch(next + line);
          }
        }
        tile = {rows, p_.row_stride, listed, listed_scale, ~uint64_t{0} >> (kTileRows - n)};
      }
      Tile context{this,     worker, bounds, first_query, tile.list != nullptr ? listed[0] : static_cast<uint32_t>(row),
                   tile.list};
      kernel_.scan_tile(p_.dtype, p_.d, tile, queries, panel, emit, &context);
    }
  }

  const MipsTopkProblem p_;
  const MipsTopkKernel& kernel_;
  const int threads_;
  const int64_t k_;
  const Sample sample_;
  const int64_t panel_bytes_;  // of a thread
  Reservoirs found_;
  const std::unique_ptr<Key[]> scratch_;
  const std::unique_ptr<char[]> panels_;
  const std::unique_ptr<char[]> packed_;
  std::unique_ptr<float[]> query_scale_;
  std::unique_ptr<int64_t[]> excluded_;
};

}  // namespace

void mips_topk(const MipsTopkProblem& problem, const Isa& isa) {
  if (problem.num_queries > 0) Search(problem, *isa.mips_topk, true).run();
}

}  // namespace grank
