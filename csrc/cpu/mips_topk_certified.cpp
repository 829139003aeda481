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
  // keep: the largest that begin() gets.
  Candidates(int64_t num_queries, int64_t keep, int workers)
      : SharedBuffers(num_queries, room_for(keep), workers), thresholds_(static_cast<size_t>(num_queries), -kInf) {}

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
  // leave more candidates. A query with more than `most` is given up.
  void begin(int64_t keep, int64_t most) {
    keep_ = keep;
    most_ = std::max(most, room_for(keep));
    for (int64_t b = 0; b < num_queries(); ++b) buffer(b).limit = room_for(keep);
  }

  // Raises the threshold to the k-th largest lower bound and drops candidates below it.
  void compact(int64_t query) {
    tighten(query);
    Buffer& b = buffer(query);
    if (b.count > b.limit / 2 && b.limit < most_ && !grow(query, std::min(2 * b.limit, most_))) give_up(query);
    if (b.count > b.limit - b.limit / 8) give_up(query);
  }

  void tighten(int64_t query) {
    Buffer& b = buffer(query);
    Candidate* c = entries(query);
    if (keep_ > 0 && b.count >= keep_) {  // 0: every query was given up before the first scan
      const auto better = [](const Candidate& x, const Candidate& y) { return x.lower > y.lower; };
      std::nth_element(c, c + keep_ - 1, c + b.count, better);
      raise(query, std::max(threshold(query), c[keep_ - 1].lower));
    }
    b.count = std::partition(c, c + b.count, [&](const Candidate& x) { return is_wanted(query, x); }) - c;
  }

  // The number of candidates for the `keep` best of the rows scanned.
  int64_t left_for(int64_t query, int64_t keep) {
    tighten(query);
    Candidate* c = entries(query);
    if (count(query) < keep) return count(query);
    const auto better = [](const Candidate& x, const Candidate& y) { return x.lower > y.lower; };
    std::nth_element(c, c + keep - 1, c + count(query), better);
    const float threshold = c[keep - 1].lower;
    return std::count_if(c, c + count(query), [&](const Candidate& x) { return x.upper >= threshold; });
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
  static int64_t room_for(int64_t keep) { return 2 * keep + 256; }

  void raise(int64_t query, float threshold) { __atomic_store(&thresholds_[query], &threshold, __ATOMIC_RELAXED); }

  int64_t keep_ = 0, most_ = 0;
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

// Largest batch for which a scan of float rows is bound by memory.
constexpr int64_t kFewQueries = 8;

// Largest number of candidates per query for which rescoring is faster than a full search. Unit: the products of one
// query with one row. A full search takes 1 per row, and 8 more, shared by all queries, to read and transpose it; a
// scan of the copy half of that. A candidate takes 26 to be gathered, and 2800 / d, 70 ns, to be kept and sorted
// (AVX-512, d = 64 and 768).
int64_t worth_rescoring(const MipsTopkProblem& p) {
  const auto queries = static_cast<double>(p.num_queries), d = static_cast<double>(std::max<int64_t>(p.d, 1));
  return static_cast<int64_t>(static_cast<double>(p.num_rows) * 0.5 * (queries + 8) / queries / (26 + 2800 / d));
}

// Short tables have a sample for small k too: the number of candidates must be estimated before the scan.
Sample certified_sample(const MipsTopkProblem& p) {
  const Sample sample = sample_of(p.num_rows, p.num_queries, p.k);
  return sample.rows > 0 ? sample : sample_of(p.num_rows, p.num_queries, std::max<int64_t>(p.k, 64));
}

class CertifiedSearch : public RowScan<CertifiedSearch> {
 public:
  CertifiedSearch(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, std::vector<char> answered,
                  int64_t* rescored)
      : RowScan(coarse_problem(problem, coarse), coarse.error, *isa.mips_topk, std::move(answered)),
        exact_(problem),
        isa_(isa),
        rescored_(rescored),
        sample_(certified_sample(problem)),
        radius_(allocate<float>(problem.num_queries)),
        candidates_(problem.num_queries, std::max(problem.k, sample_.rank), threads_),
        floors_(static_cast<size_t>(problem.num_queries), -kInf) {
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int) {
      const int64_t at = b * p_.d;
      radius_[b] = radius_of(problem.queries + at, coarse.queries + at, p_.d, q8_.get() + at, query_scale_[b]);
      if (std::isnan(radius_[b])) candidates_.give_up(b);
    });
  }

  void run() {
    if (sample_.rows > 0) {
      const auto most = static_cast<int64_t>(2 * sample_share() * static_cast<double>(worth_rescoring(p_)));
      collect(sampled_rows(p_.num_rows, sample_.rows).data(), sample_.rows, sample_.rank, most);
      parallel_for(threads_, p_.num_queries, [&](int64_t b, int) { judge(b); });
    }
    int64_t left = 0, wanted = 0;
    for (int64_t b = 0; b < p_.num_queries; ++b) {
      if (is_answered(b)) continue;
      ++wanted;
      left += candidates_.threshold(b) == kInf;
    }
    if (left > 0 && (wanted <= kFewQueries || 8 * left > 7 * wanted)) {
      for (int64_t b = 0; b < p_.num_queries; ++b) candidates_.give_up(b);
    } else {
      collect(nullptr, p_.num_rows, p_.k, most_candidates(p_));
    }
    std::vector<char> rescored(static_cast<size_t>(p_.num_queries), true);
    parallel_for(threads_, p_.num_queries, [&](int64_t b, int) { rescored[b] = is_answered(b) || rescore(b); });
    search_all_rows(rescored);
  }

 private:
  friend RowScan;

  void collect(const uint32_t* list, int64_t count, int64_t keep, int64_t most) {
    candidates_.begin(keep, most);
    scan(list, count);
    for (int64_t b = 0; b < p_.num_queries; ++b) candidates_.end(b);
  }

  // -infinity without a threshold. NaN, which no score reaches, for queries given up.
  float bound_of(int64_t query, uint32_t, float error) const {
    return (candidates_.threshold(query) - radius_[query] * error) / query_scale_[query];
  }

  MipsTopkWanted wanted_of(int64_t query, uint32_t) const {
    return {candidates_.threshold(query), radius_[query], nullptr, 0, nullptr};
  }

  bool offer(int worker, int64_t query, uint32_t row, float score) {
    const float off = radius_[query] * row_error_[row];
    const Candidate candidate{score - off, score + off, row};
    return candidates_.is_wanted(query, candidate) && is_eligible(query, row) &&
           candidates_.add(worker, query, candidate);
  }

  double sample_share() const { return static_cast<double>(sample_.rows) / static_cast<double>(p_.num_rows); }

  // Decides after the sample whether the bounds leave few enough candidates of a query.
  void judge(int64_t query) {
    const double share = sample_share();
    const auto keep = std::max<int64_t>(1, std::llround(share * static_cast<double>(p_.k)));
    const auto left = static_cast<double>(candidates_.left_for(query, keep));
    if (candidates_.threshold(query) == kInf || left > share * static_cast<double>(worth_rescoring(p_))) {
      if (candidates_.threshold(query) != kInf) floors_[query] = candidates_.threshold(query);
      candidates_.give_up(query);
    } else {
      candidates_.restart(query);
    }
  }

  static int64_t most_candidates(const MipsTopkProblem& p) {
    return std::min(p.num_rows, std::max(4 * p.k + 1024, std::min(2 * worth_rescoring(p), (1 << 24) / p.num_queries)));
  }

  // False if the query needs the full search.
  bool rescore(int64_t query) {
    candidates_.tighten(query);
    const float threshold = candidates_.threshold(query);
    if (threshold == kInf) return false;
    MipsTopkProblem one = some_queries(exact_, query, 1);
    one.threads = 1;
    one.allow = nullptr;  // candidates are eligible
    one.exclude_offsets = nullptr;
    const auto rows = allocate<uint32_t>(candidates_.count(query));
    rescored_[query] = candidates_.rows(query, rows.get());
    mips_topk_of_rows(one, isa_, rows.get(), rescored_[query]);
    // Fewer than k scores >= a sampled threshold: it was above the k-th best score.
    return threshold == -kInf || (one.positions[p_.k - 1] >= 0 && one.values[p_.k - 1] >= threshold);
  }

  // Searches all rows for the queries that are not done, as one batch.
  void search_all_rows(const std::vector<char>& done) {
    std::vector<int64_t> places;
    for (int64_t b = 0; b < p_.num_queries; ++b) {
      if (!done[b]) places.push_back(b);
    }
    const auto count = static_cast<int64_t>(places.size());
    if (count == 0) return;
    const auto queries = allocate<float>(count * p_.d);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(exact_.queries + places[i] * p_.d, p_.d, queries.get() + i * p_.d);
      rescored_[places[i]] = p_.num_rows;
    }
    MipsTopkProblem all = exact_;
    all.num_queries = count;
    all.queries = queries.get();
    all.places = places.data();
    std::vector<float> floors;
    for (const int64_t b : places) floors.push_back(floors_[b]);
    if (*std::min_element(floors.begin(), floors.end()) > -kInf) all.floors = floors.data();
    mips_topk(all, isa_);
  }

  const MipsTopkProblem exact_;
  const Isa& isa_;
  int64_t* const rescored_;
  const Sample sample_;
  const std::unique_ptr<float[]> radius_;
  Candidates candidates_;
  std::vector<float> floors_;  // thresholds of the queries given up after the sample
};

}  // namespace

void mips_topk_certified(const MipsTopkProblem& problem, const CoarseRows& coarse, const Isa& isa, int64_t* rescored) {
  std::fill(rescored, rescored + problem.num_queries, problem.num_rows);
  if (problem.num_queries == 0) return;
  if (problem.k > worth_rescoring(problem))
    return mips_topk(problem, isa);  // rows are read faster in order than gathered
  const std::vector<char> answered = mips_topk_of_few(problem, isa);
  if (std::count(answered.begin(), answered.end(), true) == problem.num_queries) return;
  CertifiedSearch(problem, coarse, isa, answered, rescored).run();
}

}  // namespace grank
