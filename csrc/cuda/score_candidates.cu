#include "score_candidates.cuh"

#include "dispatch.cuh"

namespace grank::cuda {

void score_candidates(const ScoreCandidates& problem, bool bfloat, int width, int hidden, void* stream,
                      const ScorePlan* plan) {
  with_element(bfloat, [&](auto element) {
    with_width("width", width, [&](auto width_constant) {
      with_width("hidden", hidden, [&](auto hidden_constant) {
        constexpr int kWidth = decltype(width_constant)::value, kHidden = decltype(hidden_constant)::value;
        launch_score_candidates<decltype(element), kWidth, kHidden>(problem, plan, stream);
      });
    });
  });
}

}  // namespace grank::cuda
