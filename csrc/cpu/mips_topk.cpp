#include "mips_topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "reservoirs.h"
#include "row_scan.h"
#include "threads.h"

namespace grank {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class Search : public RowScan<Search> {
 public:
  Search(const MipsTopkProblem& problem, const MipsTopkKernel& kernel, Sample sample, std::vector<char> answered = {})
      : RowScan(problem, nullptr, kernel, std::move(answered)),
        k_(std::min(problem.k, problem.num_rows)),
        sample_(sample),
        found_(problem.num_queries, std::max(k_, sample_.rank), threads_, problem.ids),
        scratch_(allocate<Key>(threads_ * found_.capacity())) {}

  // Searches the rows list[0 .. count), or rows [0, count) if list is null.
  void run(const uint32_t* list, int64_t count) {
    if (p_.floors != nullptr) {
      for (int64_t b = 0; b < p_.num_queries; ++b) found_.start_at(b, p_.floors[b]);
    } else if (sample_.rows > 0) {
      collect(sampled_rows(count, sample_.rows).data(), sample_.rows, sample_.rank);
      for (int64_t b = 0; b < p_.num_queries; ++b) found_.restart(b);
    }
    std::vector<char> missed(static_cast<size_t>(p_.num_queries), false);
    for (int64_t b = 0; b < p_.num_queries; ++b) missed[b] = found_.threshold(b) != kNoThreshold;
    collect(list, count, k_);
    for (int64_t b = 0; b < p_.num_queries; ++b) missed[b] = missed[b] && found_.count(b) < k_;
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int worker) {
      if (!missed[b] && !is_answered(b)) finish(b, worker);
    });
    for (int64_t b = 0; b < p_.num_queries; ++b) {  // the sampled threshold was above the k-th best
      if (missed[b]) Search(some_queries(p_, b, 1), kernel_, Sample{}).run(list, count);
    }
  }

 private:
  friend RowScan;

  void collect(const uint32_t* list, int64_t count, int64_t keep) {
    found_.begin(keep);
    scan(list, count);
    for (int64_t b = 0; b < p_.num_queries; ++b) found_.end(b);
  }

  // May read a threshold that another thread has raised meanwhile: a lower bound all the same.
  float bound_of(int64_t query, uint32_t first_row, float) const {
    const Key threshold = found_.threshold(query);
    // Rows after the threshold's own row lose a tie, unless external ids break it.
    const bool tie_is_lost = p_.ids == nullptr && first_row > row_of(threshold);
    const float bound = score_of_bits(static_cast<uint32_t>(threshold >> 32) + tie_is_lost);
    if (p_.dtype != DType::kInt8) return bound;
    // The kernel compares float(sum) * row_scale. With the division here, that and the score differ by at most 6
    // roundings of 2^-24 each, a relative error below 2^-21 unless a value overflows or underflows.
    const float scale = query_scale_[query], scaled = bound / scale;
    const bool safe = std::fabs(bound) > 1e-28f && std::fabs(scaled) > 1e-28f && std::fabs(scaled) < 1e38f;
    if (safe) return scaled - std::fabs(scaled) * 1e-6f;
    if (!(scale < kInf)) return std::numeric_limits<float>::quiet_NaN();  // so are all scores
    // |sum| >= 1 where the score is not 0: the compared product does not underflow, and has the score's sign.
    return bound > 0 ? std::numeric_limits<float>::denorm_min() : -kInf;
  }

  MipsTopkWanted wanted_of(int64_t query, uint32_t first_row) const {
    const Key threshold = found_.threshold(query);
    const bool tie_is_lost = p_.ids == nullptr && first_row > row_of(threshold);
    const bool tie_by_id = p_.ids != nullptr && !is_score(threshold);
    return {score_of_bits(static_cast<uint32_t>(threshold >> 32) + tie_is_lost), 0, nullptr,
            tie_by_id ? p_.ids[row_of(threshold)] : std::numeric_limits<int64_t>::max(), nullptr};
  }

  bool offer(int worker, int64_t query, uint32_t row, float score) {
    if (std::isnan(score))
      return false;  // int8 rows: the compared value leaves out the query's scale, which may be NaN
    const Key key = key_of(score, row);
    return found_.is_wanted(query, key) && is_eligible(query, row) && found_.add(worker, query, key);
  }

  void finish(int64_t query, int worker) {
    const int64_t n = std::min(found_.count(query), k_);
    const Key* best = found_.best(query, n, scratch_.get() + worker * found_.capacity());
    float* values = p_.values + p_.place(query) * p_.k;
    int64_t* positions = p_.positions + p_.place(query) * p_.k;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = score_of(best[i]);
      positions[i] = row_of(best[i]);
    }
    std::fill(values + n, values + p_.k, -std::numeric_limits<float>::infinity());
    std::fill(positions + n, positions + p_.k, -1);
  }

  const int64_t k_;
  const Sample sample_;
  Reservoirs found_;
  const std::unique_ptr<Key[]> scratch_;
};

}  // namespace

std::vector<char> mips_topk_of_few(const MipsTopkProblem& problem, const Isa& isa) {
  constexpr int64_t kMost = 1 << 20, kAtOnce = 4096;
  if (problem.allow == nullptr || problem.allow_stride == 0) return {};
  std::vector<char> answered(static_cast<size_t>(problem.num_queries), false);
  const int64_t few = std::min<int64_t>(problem.num_rows / 32, kMost);
  const auto lists = allocate<uint32_t>(problem.threads * (few + kAtOnce));
  parallel_for(problem.threads, problem.num_queries, [&](int64_t b, int worker) {
    MipsTopkProblem one = some_queries(problem, b, 1);
    uint32_t* list = lists.get() + worker * (few + kAtOnce);
    int64_t count = 0;
    for (int64_t row = 0; row < one.num_rows && count <= few; row += kAtOnce) {
      count += list_allowed(one.allow, row, std::min(row + kAtOnce, one.num_rows), list + count);
    }
    if (count > few) return;
    one.threads = 1;
    one.allow = nullptr;
    mips_topk_of_rows(one, isa, list, count);
    answered[b] = true;
  });
  return answered;
}

void mips_topk(const MipsTopkProblem& problem, const Isa& isa) {
  const std::vector<char> answered = mips_topk_of_few(problem, isa);
  if (std::count(answered.begin(), answered.end(), true) == problem.num_queries) return;
  const Sample sample = sample_of(problem.num_rows, problem.num_queries, std::min(problem.k, problem.num_rows));
  Search(problem, *isa.mips_topk, sample, answered).run(nullptr, problem.num_rows);
}

void mips_topk_of_rows(const MipsTopkProblem& problem, const Isa& isa, const uint32_t* list, int64_t count) {
  Search(problem, *isa.mips_topk, Sample{}).run(list, count);
}

}  // namespace grank
