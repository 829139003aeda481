// The instruction sets this library was compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "candidate_cross_attention_kernel.h"
#include "corpus_cross_entropy_kernel.h"
#include "mips_topk_kernel.h"
#include "score_candidates_kernel.h"

namespace grank {

// The kernels built on the product of tile_product.h.
struct RankerKernels {
  const ScoreCandidatesKernel* score_candidates;
  const AttentionPass *attention_forward, *attention_grad_queries, *attention_grad_keys;
  const CorpusPass *corpus_forward, *corpus_backward;
};

struct Isa {
  const char* name;
  bool runs_here;  // this processor and operating system can execute it
  const MipsTopkKernel* mips_topk;
  RankerKernels floats, bfloats;  // for operands of float32 and float16, and of bfloat16

  const RankerKernels& ranker(DType dtype) const { return dtype == DType::kBFloat16 ? bfloats : floats; }
};

// The compiled instruction sets, weakest first.
const std::vector<Isa>& isas();

// The instruction set in use; initially the one named by the environment variable GRANK_CPU_ISA, else the best that
// runs here. Throws std::invalid_argument if that name is unknown or cannot run here.
const Isa& active_isa();

// Sets the instruction set of the process, for tests. Running calls keep theirs. Throws std::invalid_argument as above.
void set_active_isa(const std::string& name);

}  // namespace grank
