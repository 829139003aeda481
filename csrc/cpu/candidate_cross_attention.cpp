#include "candidate_cross_attention.h"

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "threads.h"

namespace grank {
namespace {

// Runs a pass over all rows of one side, in steps ordered by user, head, row.
class Run {
 public:
  Run(const CandidateCrossAttentionProblem& p, const AttentionPass& pass, const AttentionSequence& rows)
      : p_(p), pass_(pass), rows_(rows), steps_before_(static_cast<size_t>(p.num_users + 1)) {
    double work = 0;
    for (int64_t user = 0; user < p.num_users; ++user) {
      const int64_t steps = (rows.count(user) + pass.rows_a_step - 1) / pass.rows_a_step;
      steps_before_[user + 1] = steps_before_[user] + steps * p.num_heads;
      work += static_cast<double>(p.queries.count(user)) * static_cast<double>(p.keys.count(user));
    }
    work *= 2.0 * static_cast<double>(p.num_heads * p.d);
    // Waking a thread costs about 100,000 multiply-adds.
    threads_ = static_cast<int>(std::min<double>(p.threads, 1 + work / (1 << 21)));
    scratch_ = AlignedMemory(pass.scratch_bytes(p), threads_);
  }

  void run() {
    parallel_for(threads_, steps_before_.back(), [&](int64_t step, int worker) {
      const auto after = std::upper_bound(steps_before_.begin(), steps_before_.end(), step);
      const int64_t user = after - steps_before_.begin() - 1;
      const int64_t within = step - steps_before_[user];
      const int64_t of_head = (steps_before_[user + 1] - steps_before_[user]) / p_.num_heads;
      const int64_t first = within % of_head * pass_.rows_a_step;
      const int64_t count = std::min(pass_.rows_a_step, rows_.count(user) - first);
      pass_.run_step(p_, user, within / of_head, first, count, scratch_.of(worker));
    });
  }

 private:
  const CandidateCrossAttentionProblem& p_;
  const AttentionPass& pass_;
  const AttentionSequence& rows_;
  std::vector<int64_t> steps_before_;  // (num_users + 1,)
  int threads_;
  AlignedMemory scratch_{0};
};

}  // namespace

void candidate_cross_attention(const CandidateCrossAttentionProblem& p, const Isa& isa) {
  Run(p, *isa.ranker(p.dtype).attention_forward, p.queries).run();
}

void candidate_cross_attention_backward(const CandidateCrossAttentionProblem& p, const Isa& isa) {
  const RankerKernels& kernels = isa.ranker(p.dtype);
  Run queries(p, *kernels.attention_grad_queries, p.queries), keys(p, *kernels.attention_grad_keys, p.keys);
  queries.run();
  keys.run();
}

}  // namespace grank
