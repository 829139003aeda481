// candidate_cross_attention and its gradient: candidate_cross_attention_kernel.h says what is computed. Here the work
// is handed out, by user, head and some rows; which thread does it makes no difference to any bit.
#pragma once

#include "isa.h"

namespace grank {

// Writes out and lse of all rows that a user has. Throws std::bad_alloc, with nothing written.
void candidate_cross_attention(const CandidateCrossAttentionProblem& problem, const Isa& isa);

// Writes the gradients of all rows that a user has; `delta` and `excess` are scratch memory. Throws std::bad_alloc,
// with nothing written.
void candidate_cross_attention_backward(const CandidateCrossAttentionProblem& problem, const Isa& isa);

}  // namespace grank
