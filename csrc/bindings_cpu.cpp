// The Python module grank_kernels._cpu: addresses in, nothing out. grank_kernels/backends/cpu.py is its only caller and
// has checked every shape; what only the data can tell is checked here, before anything is read through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/candidate_cross_attention.h"
#include "cpu/isa.h"
#include "cpu/mips_topk.h"
#include "cpu/score_candidates.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Offsets must not lead outside the ids, nor ids outside [-1, limit); limit < 0: any id.
void check_exclude(const int64_t* offsets, const int64_t* ids, int64_t num_queries, int64_t num_ids, int64_t limit) {
  if (offsets[0] < 0 || offsets[num_queries] > num_ids) {
    throw std::invalid_argument("exclude: offsets run from " + std::to_string(offsets[0]) + " to " +
                                std::to_string(offsets[num_queries]) + "; they take 0 to " + std::to_string(num_ids));
  }
  for (int64_t b = 0; b < num_queries; ++b) {
    if (offsets[b] > offsets[b + 1]) {
      throw std::invalid_argument("exclude: offsets must not decrease, got " + std::to_string(offsets[b]) + " before " +
                                  std::to_string(offsets[b + 1]) + " at query " + std::to_string(b));
    }
  }
  for (int64_t i = offsets[0]; i < offsets[num_queries]; ++i) {
    if (ids[i] < -1 || (limit >= 0 && ids[i] >= limit)) {
      throw std::invalid_argument("exclude: id " + std::to_string(ids[i]) + " is out of range; it takes ids in [-1, " +
                                  (limit >= 0 ? std::to_string(limit) : std::string("2^63")) + "), -1 for none");
    }
  }
}

void mips_topk(uintptr_t queries, int64_t num_queries, uintptr_t rows, int dtype, int64_t num_rows, int64_t d,
               int64_t row_stride, uintptr_t row_scale, uintptr_t ids, uintptr_t exclude_offsets, uintptr_t exclude_ids,
               int64_t num_exclude_ids, uintptr_t allow, int64_t allow_stride, int64_t k, int threads, uintptr_t values,
               uintptr_t positions) {
  const py::gil_scoped_release release;
  const grank::MipsTopkProblem problem{pointer<const float>(queries),
                                       num_queries,
                                       pointer<const void>(rows),
                                       static_cast<grank::DType>(dtype),
                                       num_rows,
                                       d,
                                       row_stride,
                                       pointer<const float>(row_scale),
                                       pointer<const int64_t>(ids),
                                       pointer<const int64_t>(exclude_offsets),
                                       pointer<const int64_t>(exclude_ids),
                                       pointer<const bool>(allow),
                                       allow_stride,
                                       k,
                                       threads,
                                       pointer<float>(values),
                                       pointer<int64_t>(positions)};
  if (exclude_offsets != 0) {
    check_exclude(problem.exclude_offsets, problem.exclude_ids, num_queries, num_exclude_ids, ids ? -1 : num_rows);
  }
  grank::mips_topk(problem, grank::active_isa());
}

void score_candidates(uintptr_t candidate_ids, int64_t num_users, int64_t num_candidates, uintptr_t rows,
                      int rows_dtype, int64_t num_rows, int64_t d, int64_t row_stride, uintptr_t row_scale, int dtype,
                      uintptr_t keys, int64_t key_stride, uintptr_t values, int64_t value_stride, int64_t h,
                      uintptr_t cu_seqlens, uintptr_t user_hidden, uintptr_t item_weight, uintptr_t out_weight,
                      float out_bias, float softmax_scale, int activation, int threads, uintptr_t scores) {
  const py::gil_scoped_release release;
  grank::score_candidates({pointer<const int64_t>(candidate_ids),
                           num_users,
                           num_candidates,
                           pointer<const void>(rows),
                           static_cast<grank::DType>(rows_dtype),
                           num_rows,
                           d,
                           row_stride,
                           pointer<const float>(row_scale),
                           static_cast<grank::DType>(dtype),
                           pointer<const void>(keys),
                           key_stride,
                           pointer<const void>(values),
                           value_stride,
                           h,
                           pointer<const int64_t>(cu_seqlens),
                           pointer<const float>(user_hidden),
                           pointer<const void>(item_weight),
                           pointer<const float>(out_weight),
                           out_bias,
                           softmax_scale,
                           static_cast<grank::HeadActivation>(activation),
                           threads,
                           pointer<float>(scores)},
                          grank::active_isa());
}

// The address of offsets, the address of lengths, one length for all.
using Sequence = std::tuple<uintptr_t, uintptr_t, int64_t>;
// An address and strides in bytes: of users, rows, heads.
using Tensor = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

grank::AttentionSequence sequence(const Sequence& s) {
  return {pointer<const int64_t>(std::get<0>(s)), pointer<const int64_t>(std::get<1>(s)), std::get<2>(s)};
}

grank::AttentionTensor tensor(const Tensor& t) {
  return {pointer<char>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

grank::CandidateCrossAttentionProblem attention_problem(int64_t num_users, int64_t num_heads, int64_t d, int dtype,
                                                        int activation, float softmax_scale, int threads,
                                                        const Sequence& queries, const Sequence& keys, const Tensor& q,
                                                        const Tensor& k, const Tensor& v, const Tensor& bias,
                                                        const Tensor& out, const Tensor& lse) {
  grank::CandidateCrossAttentionProblem p{};
  p.num_users = num_users;
  p.num_heads = num_heads;
  p.d = d;
  p.dtype = static_cast<grank::DType>(dtype);
  p.activation = static_cast<grank::AttentionActivation>(activation);
  p.softmax_scale = softmax_scale;
  p.threads = threads;
  p.queries = sequence(queries);
  p.keys = sequence(keys);
  p.q = tensor(q);
  p.k = tensor(k);
  p.v = tensor(v);
  p.bias = tensor(bias);
  p.out = tensor(out);
  p.lse = tensor(lse);
  return p;
}

void candidate_cross_attention(int64_t num_users, int64_t num_heads, int64_t d, int dtype, int activation,
                               float softmax_scale, int threads, const Sequence& queries, const Sequence& keys,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out,
                               const Tensor& lse) {
  const py::gil_scoped_release release;
  grank::candidate_cross_attention(attention_problem(num_users, num_heads, d, dtype, activation, softmax_scale, threads,
                                                     queries, keys, q, k, v, bias, out, lse),
                                   grank::active_isa());
}

void candidate_cross_attention_backward(int64_t num_users, int64_t num_heads, int64_t d, int dtype, int activation,
                                        float softmax_scale, int threads, const Sequence& queries, const Sequence& keys,
                                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                        const Tensor& out, const Tensor& lse, const Tensor& grad_out,
                                        const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v,
                                        const Tensor& grad_bias, const Tensor& delta) {
  const py::gil_scoped_release release;
  grank::CandidateCrossAttentionProblem p = attention_problem(num_users, num_heads, d, dtype, activation, softmax_scale,
                                                              threads, queries, keys, q, k, v, bias, out, lse);
  p.grad_out = tensor(grad_out);
  p.grad_q = tensor(grad_q);
  p.grad_k = tensor(grad_k);
  p.grad_v = tensor(grad_v);
  p.grad_bias = tensor(grad_bias);
  p.delta = tensor(delta);
  grank::candidate_cross_attention_backward(p, grank::active_isa());
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of grank_kernels; addresses in, nothing out.";
  m.def("mips_topk", &mips_topk);
  m.def("score_candidates", &score_candidates);
  m.def("candidate_cross_attention", &candidate_cross_attention);
  m.def("candidate_cross_attention_backward", &candidate_cross_attention_backward);
  m.def("isa", [] { return std::string(grank::active_isa().name); });
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (const grank::Isa& isa : grank::isas()) all.emplace_back(isa.name, isa.runs_here);
    return all;
  });
}
