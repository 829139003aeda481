#include "corpus_cross_entropy.h"

#include <algorithm>

#include "aligned.h"
#include "threads.h"

namespace grank {
namespace {

constexpr int64_t kColumns = 64;  // rows of a tile

void run(const CorpusCrossEntropyProblem& p, const CorpusPass& pass, int64_t rows) {
  if (rows == 0) return;
  // A row's bits do not depend on the others of its step, so that a step may be as small as the threads need.
  const int64_t a_thread = (rows + p.threads - 1) / p.threads;
  const int64_t step_rows = std::min(pass.most_rows_a_step, (a_thread + kColumns - 1) / kColumns * kColumns);
  const int64_t steps = (rows + step_rows - 1) / step_rows;
  const int threads = static_cast<int>(std::min<int64_t>(p.threads, steps));
  const AlignedMemory scratch(pass.scratch_bytes(p), threads);
  parallel_for(threads, steps, [&](int64_t step, int worker) {
    const int64_t first = step * step_rows;
    pass.run_step(p, first, std::min(step_rows, rows - first), scratch.of(worker));
  });
}

}  // namespace

const int64_t* CorpusCrossEntropyProblem::excluded(int64_t row, int64_t least, const int64_t** end) const {
  if (exclude_offsets == nullptr) return *end = nullptr;
  const int64_t list = exclude_windows != nullptr ? exclude_windows[row] : row;
  *end = exclude_ids + exclude_offsets[list + 1];
  return std::lower_bound(exclude_ids + exclude_offsets[list], *end, least);
}

void corpus_cross_entropy(const CorpusCrossEntropyProblem& p, const Isa& isa) {
  run(p, *isa.ranker(p.dtype).corpus_forward, p.num_rows);
}

void corpus_cross_entropy_backward(const CorpusCrossEntropyProblem& p, const Isa& isa) {
  run(p, *isa.ranker(p.dtype).corpus_backward, p.num_items);
}

}  // namespace grank
