// The Python module grank_kernels._cpu: addresses in, nothing out. grank_kernels/backends/cpu.py is its only caller and
// has checked every shape; what only the data can tell is checked here, before anything is read through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

#include "cpu/candidate_cross_attention.h"
#include "cpu/corpus_cross_entropy.h"
#include "cpu/isa.h"
#include "cpu/mips_topk.h"
#include "cpu/mips_topk_certified.h"
#include "cpu/score_candidates.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// ---- running without the GIL ----

// Python runs its signal handlers on the main thread; a Python that is embedded on another thread sees no interrupts.
bool is_main_thread() {
#if defined(__APPLE__)
  return pthread_main_np() != 0;
#elif defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return false;
#endif
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Python ends a daemon thread that asks for the GIL while the interpreter is finalised by unwinding its stack, which
// C++ answers by aborting the process (exit code 134). Such a thread sleeps until the process is gone, as under 3.14.
void take_gil(PyThreadState* state) {
  while (is_finalizing() && !is_main_thread()) std::this_thread::sleep_for(std::chrono::hours(1));
  PyEval_RestoreThread(state);
}

struct Interrupted {};

// Runs a kernel without the GIL. On the main thread signals are handled every 50 ms (threads.h): a handler that raises,
// as that of Ctrl-C does, ends the kernel, and its exception is the caller's.
template <typename F>
void without_gil(F&& run) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr failure;
  bool interrupted = false;
  try {
    const auto check = [](void* saved) {
      auto*& state = *static_cast<PyThreadState**>(saved);
      PyEval_RestoreThread(state);
      const bool raised = PyErr_CheckSignals() != 0;
      state = PyEval_SaveThread();
      if (raised) throw Interrupted();
    };
    const grank::InterruptScope scope(is_main_thread() ? check : grank::InterruptCheck{}, &state);
    run();
  } catch (const Interrupted&) {
    interrupted = true;
  } catch (...) {
    failure = std::current_exception();
  }
  take_gil(state);
  if (interrupted) throw py::error_already_set();
  if (failure) std::rethrow_exception(failure);
}

// ---- checks ----

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

// What both searches are given: queries (address, number), rows (address, dtype, number, width, stride in bytes,
// address of scales), address of ids, exclude (addresses of offsets and ids, number of ids), allow (address, stride),
// k, threads, values, positions.
using Queries = std::tuple<uintptr_t, int64_t>;
using TableRows = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, uintptr_t>;
using Exclude = std::tuple<uintptr_t, uintptr_t, int64_t>;
using Allow = std::tuple<uintptr_t, int64_t>;
using TopK = std::tuple<int64_t, int, uintptr_t, uintptr_t>;

grank::MipsTopkProblem search_problem(const Queries& queries, const TableRows& rows, uintptr_t ids,
                                      const Exclude& exclude, const Allow& allow, const TopK& best) {
  grank::MipsTopkProblem p{};
  p.queries = pointer<const float>(std::get<0>(queries));
  p.num_queries = std::get<1>(queries);
  p.rows = pointer<const void>(std::get<0>(rows));
  p.dtype = static_cast<grank::DType>(std::get<1>(rows));
  p.num_rows = std::get<2>(rows);
  p.d = std::get<3>(rows);
  p.row_stride = std::get<4>(rows);
  p.row_scale = pointer<const float>(std::get<5>(rows));
  p.ids = pointer<const int64_t>(ids);
  p.exclude_offsets = pointer<const int64_t>(std::get<0>(exclude));
  p.exclude_ids = pointer<const int64_t>(std::get<1>(exclude));
  p.allow = pointer<const bool>(std::get<0>(allow));
  p.allow_stride = std::get<1>(allow);
  p.k = std::get<0>(best);
  p.threads = std::get<1>(best);
  p.values = pointer<float>(std::get<2>(best));
  p.positions = pointer<int64_t>(std::get<3>(best));
  if (p.exclude_offsets != nullptr) {
    check_exclude(p.exclude_offsets, p.exclude_ids, p.num_queries, std::get<2>(exclude), ids ? -1 : p.num_rows);
  }
  return p;
}

void mips_topk(const Queries& queries, const TableRows& rows, uintptr_t ids, const Exclude& exclude, const Allow& allow,
               const TopK& best) {
  without_gil([&] { grank::mips_topk(search_problem(queries, rows, ids, exclude, allow, best), grank::active_isa()); });
}

// coarse: addresses of the queries as the int8 copy meets them, and of its rows, stride in bytes, scales, errors.
void mips_topk_certified(const Queries& queries, const TableRows& rows, uintptr_t ids, const Exclude& exclude,
                         const Allow& allow, const TopK& best,
                         const std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t>& coarse,
                         uintptr_t rescored) {
  const grank::CoarseRows copy{pointer<const float>(std::get<0>(coarse)), pointer<const void>(std::get<1>(coarse)),
                               std::get<2>(coarse), pointer<const float>(std::get<3>(coarse)),
                               pointer<const float>(std::get<4>(coarse))};
  without_gil([&] {
    grank::mips_topk_certified(search_problem(queries, rows, ids, exclude, allow, best), copy, grank::active_isa(),
                               pointer<int64_t>(rescored));
  });
}

void score_candidates(uintptr_t candidate_ids, int64_t num_users, int64_t num_candidates, uintptr_t rows,
                      int rows_dtype, int64_t num_rows, int64_t d, int64_t row_stride, uintptr_t row_scale, int dtype,
                      uintptr_t keys, int64_t key_stride, uintptr_t values, int64_t value_stride, int64_t h,
                      uintptr_t cu_seqlens, uintptr_t bias, uintptr_t user_hidden, uintptr_t item_weight,
                      uintptr_t out_weight, float out_bias, float softmax_scale, int activation, float lse_weight,
                      float lse_floor, int threads, uintptr_t scores) {
  const grank::ScoreCandidatesProblem problem{pointer<const int64_t>(candidate_ids),
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
                                              pointer<const float>(bias),
                                              pointer<const float>(user_hidden),
                                              pointer<const void>(item_weight),
                                              pointer<const float>(out_weight),
                                              out_bias,
                                              softmax_scale,
                                              static_cast<grank::HeadActivation>(activation),
                                              lse_weight,
                                              lse_floor,
                                              threads,
                                              pointer<float>(scores)};
  without_gil([&] { grank::score_candidates(problem, grank::active_isa()); });
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
                                                        int activation, float softmax_scale, int threads, bool lse_only,
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
  p.lse_only = lse_only;
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
                               float softmax_scale, int threads, bool lse_only, const Sequence& queries,
                               const Sequence& keys, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& bias, const Tensor& out, const Tensor& lse) {
  const grank::CandidateCrossAttentionProblem p =
      attention_problem(num_users, num_heads, d, dtype, activation, softmax_scale, threads, lse_only, queries, keys, q,
                        k, v, bias, out, lse);
  without_gil([&] { grank::candidate_cross_attention(p, grank::active_isa()); });
}

void candidate_cross_attention_backward(int64_t num_users, int64_t num_heads, int64_t d, int dtype, int activation,
                                        float softmax_scale, int threads, bool lse_only, const Sequence& queries,
                                        const Sequence& keys, const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& bias, const Tensor& out, const Tensor& lse,
                                        const Tensor& grad_out, const Tensor& grad_q, const Tensor& grad_k,
                                        const Tensor& grad_v, const Tensor& grad_bias, const Tensor& grad_lse,
                                        const Tensor& delta, const Tensor& excess) {
  grank::CandidateCrossAttentionProblem p =
      attention_problem(num_users, num_heads, d, dtype, activation, softmax_scale, threads, lse_only, queries, keys, q,
                        k, v, bias, out, lse);
  p.grad_out = tensor(grad_out);
  p.grad_q = tensor(grad_q);
  p.grad_k = tensor(grad_k);
  p.grad_v = tensor(grad_v);
  p.grad_bias = tensor(grad_bias);
  p.grad_lse = tensor(grad_lse);
  p.delta = tensor(delta);
  p.excess = tensor(excess);
  without_gil([&] { grank::candidate_cross_attention_backward(p, grank::active_isa()); });
}

// sizes: rows, items, width; operands: (address, stride in bytes) of users and items, addresses of targets and bias;
// exclude: addresses of offsets, ids (ascending in every list) and windows.
using CorpusOperands = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t>;

grank::CorpusCrossEntropyProblem corpus_problem(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype,
                                                float scale, int threads, const CorpusOperands& operands,
                                                const std::tuple<uintptr_t, uintptr_t, uintptr_t>& exclude) {
  grank::CorpusCrossEntropyProblem p{};
  std::tie(p.num_rows, p.num_items, p.d) = sizes;
  p.dtype = static_cast<grank::DType>(dtype);
  p.scale = scale;
  p.threads = threads;
  p.users = pointer<const char>(std::get<0>(operands));
  p.user_stride = std::get<1>(operands);
  p.items = pointer<const char>(std::get<2>(operands));
  p.item_stride = std::get<3>(operands);
  p.targets = pointer<const int64_t>(std::get<4>(operands));
  p.bias = pointer<const float>(std::get<5>(operands));
  p.exclude_offsets = pointer<const int64_t>(std::get<0>(exclude));
  p.exclude_ids = pointer<const int64_t>(std::get<1>(exclude));
  p.exclude_windows = pointer<const int64_t>(std::get<2>(exclude));
  return p;
}

void corpus_cross_entropy(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype, float scale, int threads,
                          const CorpusOperands& operands, const std::tuple<uintptr_t, uintptr_t, uintptr_t>& exclude,
                          uintptr_t at_target, uintptr_t peak, uintptr_t mass, uintptr_t pooled) {
  grank::CorpusCrossEntropyProblem p = corpus_problem(sizes, dtype, scale, threads, operands, exclude);
  p.at_target = pointer<float>(at_target);
  p.peak = pointer<float>(peak);
  p.mass = pointer<float>(mass);
  p.pooled = pointer<float>(pooled);
  without_gil([&] { grank::corpus_cross_entropy(p, grank::active_isa()); });
}

void corpus_cross_entropy_backward(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype, float scale,
                                   int threads, const CorpusOperands& operands,
                                   const std::tuple<uintptr_t, uintptr_t, uintptr_t>& exclude, uintptr_t slope,
                                   uintptr_t target_slope, uintptr_t shift, uintptr_t log_sum, uintptr_t grad_items,
                                   uintptr_t grad_bias) {
  grank::CorpusCrossEntropyProblem p = corpus_problem(sizes, dtype, scale, threads, operands, exclude);
  p.slope = pointer<const float>(slope);
  p.target_slope = pointer<const float>(target_slope);
  p.shift = pointer<const float>(shift);
  p.log_sum = pointer<const float>(log_sum);
  p.grad_items = pointer<char>(grad_items);
  p.grad_bias = pointer<float>(grad_bias);
  without_gil([&] { grank::corpus_cross_entropy_backward(p, grank::active_isa()); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of grank_kernels; addresses in, nothing out.";
  m.def("mips_topk", &mips_topk);
  m.def("mips_topk_certified", &mips_topk_certified);
  m.def("score_candidates", &score_candidates);
  m.def("candidate_cross_attention", &candidate_cross_attention);
  m.def("candidate_cross_attention_backward", &candidate_cross_attention_backward);
  m.def("corpus_cross_entropy", &corpus_cross_entropy);
  m.def("corpus_cross_entropy_backward", &corpus_cross_entropy_backward);
  m.def("isa", [] { return std::string(grank::active_isa().name); });
  m.def("set_isa", &grank::set_active_isa);
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (const grank::Isa& isa : grank::isas()) all.emplace_back(isa.name, isa.runs_here);
    return all;
  });
}
