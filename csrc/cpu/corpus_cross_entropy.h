// corpus_cross_entropy and its gradient over all rows and items, in one instruction set.
#pragma once

#include "corpus_cross_entropy_kernel.h"
#include "isa.h"

namespace grank {

void corpus_cross_entropy(const CorpusCrossEntropyProblem& problem, const Isa& isa);
void corpus_cross_entropy_backward(const CorpusCrossEntropyProblem& problem, const Isa& isa);

}  // namespace grank
