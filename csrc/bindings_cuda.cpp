// The Python module grank_kernels._cuda: raw addresses and a stream handle in, nothing out. Importing it uses neither
// the driver nor a device. grank_kernels/backends/cuda.py is its only caller and validates every shape; ids and offsets
// are not read on the host, the kernels clamp them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/build_info.h"
#include "cuda/candidate_cross_attention.h"
#include "cuda/score_candidates.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void score_candidates(uintptr_t candidate_ids, int64_t users, int64_t candidates, uintptr_t items, uintptr_t row_scale,
                      int64_t num_items, int64_t item_stride, uintptr_t keys, uintptr_t values, int64_t num_keys,
                      uintptr_t cu_seqlens, uintptr_t bias_k, uintptr_t user_hidden, uintptr_t item_weight,
                      uintptr_t out_weight, float out_bias, float softmax_scale, int activation, float lse_weight,
                      float lse_floor, uintptr_t scores, bool bfloat, int width, int hidden, uintptr_t stream) {
  const py::gil_scoped_release release;
  const grank::cuda::ScoreCandidates problem{pointer<const int64_t>(candidate_ids),
                                             users,
                                             candidates,
                                             pointer<const void>(items),
                                             pointer<const float>(row_scale),
                                             num_items,
                                             item_stride,
                                             pointer<const void>(keys),
                                             pointer<const void>(values),
                                             num_keys,
                                             pointer<const int64_t>(cu_seqlens),
                                             pointer<const float>(bias_k),
                                             pointer<const void>(user_hidden),
                                             pointer<const void>(item_weight),
                                             pointer<const void>(out_weight),
                                             out_bias,
                                             softmax_scale,
                                             static_cast<grank::cuda::HeadActivation>(activation),
                                             lse_weight,
                                             lse_floor,
                                             pointer<float>(scores)};
  grank::cuda::score_candidates(problem, bfloat, width, hidden, pointer<void>(stream));
}

// Arguments of both directions; those of the backward pass alone follow.
grank::cuda::CandidateCrossAttention attention(int64_t users, int64_t heads, uintptr_t q, uintptr_t cu_seqlens_q,
                                               int64_t queries_per_user, int64_t num_queries, bool shared_queries,
                                               uintptr_t k, uintptr_t v, uintptr_t cu_seqlens_k, uintptr_t seqused_k,
                                               int64_t keys_per_user, int64_t num_keys, uintptr_t bias_k,
                                               float softmax_scale, int activation, uintptr_t out, uintptr_t lse) {
  return {users,
          heads,
          pointer<const void>(q),
          pointer<const int64_t>(cu_seqlens_q),
          queries_per_user,
          num_queries,
          shared_queries,
          pointer<const void>(k),
          pointer<const void>(v),
          pointer<const int64_t>(cu_seqlens_k),
          pointer<const int64_t>(seqused_k),
          keys_per_user,
          num_keys,
          pointer<const float>(bias_k),
          softmax_scale,
          static_cast<grank::cuda::AttentionActivation>(activation),
          pointer<void>(out),
          pointer<float>(lse)};
}

void candidate_cross_attention(const grank::cuda::CandidateCrossAttention& problem, bool bfloat, int width,
                               uintptr_t stream) {
  const py::gil_scoped_release release;
  grank::cuda::candidate_cross_attention(problem, bfloat, width, pointer<void>(stream));
}

void candidate_cross_attention_backward(const grank::cuda::CandidateCrossAttention& problem, uintptr_t grad_out,
                                        uintptr_t grad_lse, uintptr_t delta, uintptr_t grad_q, uintptr_t grad_k,
                                        uintptr_t grad_v, uintptr_t grad_bias, bool bfloat, int width,
                                        uintptr_t stream) {
  const py::gil_scoped_release release;
  const grank::cuda::CandidateCrossAttentionGradients gradients{
      pointer<const void>(grad_out), pointer<const float>(grad_lse), pointer<float>(delta),    pointer<void>(grad_q),
      pointer<void>(grad_k),         pointer<void>(grad_v),          pointer<float>(grad_bias)};
  grank::cuda::candidate_cross_attention_backward(problem, gradients, bfloat, width, pointer<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of grank_kernels; addresses and a stream handle in, nothing out.";
  m.def("score_candidates", &score_candidates);
  py::class_<grank::cuda::CandidateCrossAttention>(m, "CandidateCrossAttention").def(py::init(&attention));
  m.def("candidate_cross_attention", &candidate_cross_attention);
  m.def("candidate_cross_attention_backward", &candidate_cross_attention_backward);
  m.def("cuda_runtime_version", &grank::cuda::runtime_version,
        "Version of the CUDA runtime that is linked in, as CUDA writes it: 13000 for 13.0.");
  m.def("architectures", &grank::cuda::architectures,
        "What the kernels were compiled for: 'sm_80' is machine code, 'compute_90' is PTX.");
  m.def("device_count", &grank::cuda::device_count, py::call_guard<py::gil_scoped_release>(),
        "Number of CUDA devices; 0 without a driver. The one function here that asks the driver for them.");
}
