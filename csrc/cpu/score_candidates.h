// Scores of every user's candidates: score_candidates_kernel.h says what is computed. Here the work is handed out.
//
// A step is one user and a few tiles of candidates; which thread does it makes no difference to any bit. Memory: what
// the kernel says for every thread, and item_weight as the kernel takes it; nothing of the size of the inputs.
#pragma once

#include "isa.h"

namespace grank {

// Throws std::bad_alloc, with nothing written to the scores.
void score_candidates(const ScoreCandidatesProblem& problem, const Isa& isa);

}  // namespace grank
