#include "score_candidates.h"

#include <algorithm>
#include <limits>

#include "aligned.h"
#include "threads.h"

namespace grank {
namespace {

// Waking a thread costs about 100,000 multiply-adds.
int useful_threads(const ScoreCandidatesProblem& p) {
  const double keys =
      static_cast<double>(p.cu_seqlens[p.num_users] - p.cu_seqlens[0]) / static_cast<double>(p.num_users);
  const double candidates = static_cast<double>(p.num_users) * static_cast<double>(p.num_candidates);
  const double work = candidates * (keys * static_cast<double>(p.d + p.h) + static_cast<double>(p.d * p.h));
  return static_cast<int>(std::min<double>(p.threads, 1 + work / (1 << 21)));
}

// The bfloat16 kernels take tables of bfloat16 and int8 only.
const RankerKernels& kernels_of(const ScoreCandidatesProblem& p, const Isa& isa) {
  return isa.ranker(p.rows_dtype == DType::kInt8 || p.rows_dtype == p.dtype ? p.dtype : DType::kFloat32);
}

}  // namespace

void score_candidates(const ScoreCandidatesProblem& p, const Isa& isa) {
  const int64_t scores = p.num_users * p.num_candidates;
  if (p.num_rows == 0 || scores == 0) {
    std::fill(p.scores, p.scores + scores, -std::numeric_limits<float>::infinity());
    return;
  }
  const ScoreCandidatesKernel& kernel = *kernels_of(p, isa).score_candidates;
  const int threads = useful_threads(p);
  AlignedMemory weight(kernel.weight_bytes(p)), scratch(kernel.scratch_bytes(p), threads);
  kernel.prepare_weight(p, weight.of(0));
  const int64_t groups = (p.num_candidates + kernel.candidates_a_step - 1) / kernel.candidates_a_step;
  parallel_for(threads, p.num_users * groups, [&](int64_t step, int worker) {
    const int64_t first = step % groups * kernel.candidates_a_step;
    const int64_t count = std::min(kernel.candidates_a_step, p.num_candidates - first);
    kernel.run_step(p, weight.of(0), step / groups, first, count, scratch.of(worker));
  });
}

}  // namespace grank
