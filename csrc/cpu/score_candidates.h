// score_candidates: distributes steps of (user, group of candidates) to threads; formula in score_candidates_kernel.h.
//
// The bits do not depend on threads. Memory: the kernel's scratch memory per thread, and one copy of item_weight in the
// kernel's layout.
#pragma once

#include "isa.h"

namespace grank {

// Throws std::bad_alloc, with nothing written to the scores.
void score_candidates(const ScoreCandidatesProblem& problem, const Isa& isa);

}  // namespace grank
