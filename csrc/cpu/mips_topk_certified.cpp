#include "mips_topk_certified.h"

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

// WEIGHT, SLACK, LEAST, MOST of grank_kernels/table/quantise.py.
constexpr double kWeight = 1.0 / 150, kSlack = 1 + 0x1p-13, kLeast = 0x1p-40, kMost = 0x1p50;

// The radius of a query; NaN if its norm is outside the range of the bound.
float radius_of(const float* q, const float* turned, int64_t d, const int8_t* q8, float scale) {
  double squares = 0, turned_squares = 0, off = 0;
  for (int64_t j = 0; j < d; ++j) {
    squares += static_cast<double>(q[j]) * q[j];
    turned_squares += static_cast<double>(turned[j]) * turned[j];
    const double missing = turned[j] - static_cast<double>(scale) * q8[j];
    off += missing * missing;
  }
  const double norm = std::sqrt(squares);
  if (!(norm >= kLeast && norm <= kMost)) return std::numeric_limits<float>::quiet_NaN();
  const double rounding = (static_cast<double>(d) + 16) * 0x1p-22;
  return static_cast<float>(std::max(std::sqrt(turned_squares), (std::sqrt(off) + rounding * norm) / kWeight) * kSlack);
}

struct Candidate {
  float lower, upper;  // bounds of the score
  uint32_t row;
};

// Per query, the rows whose upper bound reaches the threshold.
class Candidates : public SharedBuffers<Candidate, Candidates> {
 public:
  Candidates(int64_t num_queries, int64_t most, int workers)
      : SharedBuffers(num_queries, 4 * most + 1024, workers), thresholds_(static_cast<size_t>(num_queries), -kInf) {}

  // A lower bound of the k-th best score; infinity: the query is left to the full search.
  float threshold(int64_t query) const {
    float threshold;
    __atomic_load(&thresholds_[query], &threshold, __ATOMIC_RELAXED);
    return threshold;
  }
  bool is_wanted(int64_t query, const Candidate& c) const { return c.upper >= threshold(query); }

  void give_up(int64_t query) {
    raise(query, kInf);
    buffer(query).count = 0;
  }

  // Begins a scan for the `keep` best rows. A small initial limit raises the threshold early; it grows if the bounds
  // leave more candidates.
  void begin(int64_t keep) {
    keep_ = keep;
    for (int64_t b = 0; b < num_queries(); ++b) buffer(b).limit = std::min(2 * keep + 256, capacity());
  }

  // Raises the threshold to the k-th largest lower bound and drops candidates below it.
  void compact(int64_t query) {
    tighten(query);
    Buffer& b = buffer(query);
    if (b.count > b.limit / 2) b.limit = std::min(2 * b.limit, capacity());
    if (b.count > b.limit - b.limit / 8) give_up(query);
  }

  void tighten(int64_t query) {
    Buffer& b = buffer(query);
    Candidate* c = entries(query);
    if (b.count >= keep_) {
      const auto better = [](const Candidate& x, const Candidate& y) { return x.lower > y.lower; };
      std::nth_element(c, c + keep_ - 1, c + b.count, better);
      raise(query, std::max(threshold(query), c[keep_ - 1].lower));
    }
    b.count = std::partition(c, c + b.count, [&](const Candidate& x) { return is_wanted(query, x); }) - c;
  }

  // Empties the buffer; the threshold stays.
  void restart(int64_t query) {
    tighten(query);
    buffer(query).count = 0;
  }

  // Writes the candidates' positions, ascending, to `rows`; returns their number. Call tighten() before.
  int64_t rows(int64_t query, uint32_t* rows) const {
    const Candidate* c = entries(query);
    std::transform(c, c + count(query), rows, [](const Candidate& x) { return x.row; });
    std::sort(rows, rows + count(query));
    return count(query);
  }

 private:
  void raise(int64_t query, float threshold) { __atomic_store(&thresholds_[query], &threshold, __ATOMIC_RELAXED); }

  int64_t keep_ = 0;
  std::vector<float> thresholds_;
};

MipsTopkProblem coarse_problem(const MipsTopkProblem& problem, const CoarseRows& coarse) {
  MipsTopkProblem p = problem;
  p.queries = coarse.queries;
  p.rows = coarse.rows;
  p.dtype = DType::kInt8;
  p.row_stride = coarse.row_stride;
  p.row_scale = coarse.scale;
  return p;
}

// Largest number of excluded ids, at most 4096. Without the best rows, scores around the k-th best are denser, and more
// rows are candidates.
int64_t most_excluded(const MipsTopkProblem& p) {
  int64_t most = 0;
  for (int64_t b = 0; p.exclude_offsets != nullptr && b < p.num_queries; ++b) {
    most = std::max(most, p.exclude_offsets[b + 1] - p.exclude_offsets[b]);
  }
  return std::min<int64_t>(most, 4096);
}

class CertifiedSearch : public RowScan<CertifiedSearch> {
 public:
  CertifiedSearch(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, std::vector<char> answered,
                  int64_t* rescored)
      : RowScan(coarse_problem(problem, coarse), coarse.error, *isa.mips_topk, std::move(answered)),
        exact_(problem),
        isa_(isa),
        rescored_(rescored),
        sample_(sample_of(problem.num_rows, problem.num_queries, problem.k)),
        radius_(allocate<float>(problem.num_queries)),
        candidates_(problem.num_queries, std::max(problem.k + most_excluded(problem), sample_.rank), threads_),
        rows_(allocate<uint32_t>(threads_ * candidates_.capacity())) {
    const std::unique_ptr<int8_t[]> q8 = allocate<int8_t>(threads_ * p_.d);
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int worker) {
      const float* turned = coarse.queries + b * p_.d;
      int8_t* numbers = q8.get() + worker * p_.d;
      const float scale = quantise(turned, p_.d, numbers);
      radius_[b] = radius_of(problem.queries + b * p_.d, turned, p_.d, numbers, scale);
      if (std::isnan(radius_[b])) candidates_.give_up(b);
    });
  }

  void run() {
    if (sample_.rows > 0) {
      collect(sampled_rows(p_.num_rows, sample_.rows).data(), sample_.rows, sample_.rank);
      for (int64_t b = 0; b < p_.num_queries; ++b) candidates_.restart(b);
    }
    collect(nullptr, p_.num_rows, p_.k);
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int worker) {
      if (is_answered(b)) return;
      rescored_[b] = rescore(b, rows_.get() + worker * candidates_.capacity()) ? candidates_.count(b) : -1;
    });
    for (int64_t b = 0, end; b < p_.num_queries; b = end + 1) {  // runs of unanswered queries
      for (; b < p_.num_queries && rescored_[b] >= 0;) ++b;
      for (end = b; end < p_.num_queries && rescored_[end] < 0; ++end) rescored_[end] = p_.num_rows;
      if (end > b) mips_topk(some_queries(exact_, b, end - b), isa_);
    }
  }

 private:
  friend RowScan;

  void collect(const uint32_t* list, int64_t count, int64_t keep) {
    candidates_.begin(keep);
    scan(list, count);
    for (int64_t b = 0; b < p_.num_queries; ++b) candidates_.end(b);
  }

  // -infinity without a threshold. NaN, which no score reaches, for queries given up.
  float bound_of(int64_t query, uint32_t, float error) const {
    return (candidates_.threshold(query) - radius_[query] * error) / query_scale_[query];
  }

  bool offer(int worker, int64_t query, uint32_t row, float score) {
    const float off = radius_[query] * row_error_[row];
    const Candidate candidate{score - off, score + off, row};
    return candidates_.is_wanted(query, candidate) && is_eligible(query, row) &&
           candidates_.add(worker, query, candidate);
  }

  // False if the query needs the full search.
  bool rescore(int64_t query, uint32_t* rows) {
    candidates_.tighten(query);
    const float threshold = candidates_.threshold(query);
    if (threshold == kInf) return false;
    MipsTopkProblem one = some_queries(exact_, query, 1);
    one.threads = 1;
    one.allow = nullptr;  // candidates are eligible
    one.exclude_offsets = nullptr;
    mips_topk_of_rows(one, isa_, rows, candidates_.rows(query, rows));
    // Fewer than k scores >= a sampled threshold: it was above the k-th best score.
    return threshold == -kInf || (one.positions[p_.k - 1] >= 0 && one.values[p_.k - 1] >= threshold);
  }

  const MipsTopkProblem exact_;
  const Isa& isa_;
  int64_t* const rescored_;
  const Sample sample_;
  const std::unique_ptr<float[]> radius_;
  Candidates candidates_;
  const std::unique_ptr<uint32_t[]> rows_;
};

}  // namespace

void mips_topk_certified(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, int64_t* rescored) {
  std::fill(rescored, rescored + problem.num_queries, problem.num_rows);
  if (problem.k > problem.num_rows / 32) return mips_topk(problem, isa);  // rows are read faster in order than gathered
  const std::vector<char> answered = mips_topk_of_few(problem, isa);
  if (std::count(answered.begin(), answered.end(), true) == problem.num_queries) return;
  CertifiedSearch(problem, coarse, isa, answered, rescored).run();
}

}  // namespace grank
