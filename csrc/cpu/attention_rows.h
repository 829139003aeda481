// Rows of a tensor of candidate_cross_attention as operands of tile_product.h.
#pragma once

#include "candidate_cross_attention_kernel.h"
#include "tiles.h"

namespace grank {
namespace GRANK_ISA {

inline Rows rows_of(const CandidateCrossAttentionProblem& p, const AttentionTensor& tensor, int64_t user, int64_t row,
                    int64_t head, int64_t count) {
  return {tensor.at(user, row, head), tensor.row_stride, p.dtype, count, p.d};
}

}  // namespace GRANK_ISA
}  // namespace grank
