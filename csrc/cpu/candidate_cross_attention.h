// candidate_cross_attention and its gradient: distributes steps of (user, head, rows) to threads; formulas in
// candidate_cross_attention_kernel.h. The bits do not depend on threads.
#pragma once

#include "isa.h"

namespace grank {

// Writes out and lse of every user's rows. Throws std::bad_alloc before anything is written.
void candidate_cross_attention(const CandidateCrossAttentionProblem& problem, const Isa& isa);

// Writes the gradients of every user's rows; `delta` and `excess` are scratch memory. Throws std::bad_alloc before
// anything is written.
void candidate_cross_attention_backward(const CandidateCrossAttentionProblem& problem, const Isa& isa);

}  // namespace grank
