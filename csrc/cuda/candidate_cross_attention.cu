#include "candidate_cross_attention.cuh"

#include "dispatch.cuh"

namespace grank::cuda {

void candidate_cross_attention(const CandidateCrossAttention& problem, bool bfloat, int width, void* stream) {
  with_element(bfloat, [&](auto element) {
    with_width("width", width, [&](auto width_constant) {
      launch_candidate_cross_attention<decltype(element), decltype(width_constant)::value>(problem, stream);
    });
  });
}

}  // namespace grank::cuda
