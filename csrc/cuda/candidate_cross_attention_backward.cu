#include "candidate_cross_attention_backward.cuh"

#include "dispatch.cuh"

namespace grank::cuda {

void candidate_cross_attention_backward(const CandidateCrossAttention& problem,
                                        const CandidateCrossAttentionGradients& gradients, bool bfloat, int width,
                                        void* stream) {
  with_element(bfloat, [&](auto element) {
    with_width("width", width, [&](auto width_constant) {
      launch_candidate_cross_attention_backward<decltype(element), decltype(width_constant)::value>(problem, gradients,
                                                                                                    stream);
    });
  });
}

}  // namespace grank::cuda
