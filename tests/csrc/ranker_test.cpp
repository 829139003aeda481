// score_candidates, candidate_cross_attention and its gradient against plain loops in double, on every instruction set
// of this processor, built under AddressSanitizer and UBSan: every buffer has its exact size, and what lies between
// rows is poisoned. Also: the same bits for any number of threads, and for every instruction set with FMA, but for amx
// and for bfloat16 under avx512bf16.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/candidate_cross_attention.h"
#include "cpu/isa.h"
#include "cpu/score_candidates.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace {

using grank::DType;

int failures = 0, cases = 0;
std::mt19937 random_bits(20251015);

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
double number() { return static_cast<double>(static_cast<int32_t>(random_bits())) * 0x1p-30; }  // [-2, 2)

// ---- tensors of (rows, width), `gap` bytes that nobody may touch between rows ----

class Tensor {
 public:
  Tensor(DType dtype, int64_t rows, int64_t width, int64_t gap)
      : dtype_(dtype), rows_(rows), width_(width), stride_(width * grank::element_bytes(dtype) + gap), gap_(gap) {
    memory_.reset(new char[static_cast<size_t>(rows > 0 ? rows * stride_ - gap : 0)]);
    for (int64_t i = 0; i + 1 < rows; ++i) ASAN_POISON_MEMORY_REGION(data() + (i + 1) * stride_ - gap, gap);
  }
  Tensor(Tensor&&) = default;
  ~Tensor() {
    for (int64_t i = 0; i + 1 < rows_ && memory_ != nullptr; ++i) {
      ASAN_UNPOISON_MEMORY_REGION(data() + (i + 1) * stride_ - gap_, gap_);
    }
  }

  static Tensor drawn(DType dtype, int64_t rows, int64_t width, int64_t gap) {
    Tensor t(dtype, rows, width, gap);
    for (int64_t i = 0; i < rows * width; ++i) t.put(i / width, i % width, number());
    return t;
  }

  char* data() const { return memory_.get(); }
  int64_t stride() const { return stride_; }
  int64_t rows() const { return rows_; }

  void put(int64_t i, int64_t j, double x) {
    const auto value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    switch (dtype_) {
      case DType::kFloat32:
        std::memcpy(at(i, j), &bits, 4);
        break;
      case DType::kBFloat16: {
        const auto half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(at(i, j), &half, 2);
        break;
      }
      case DType::kFloat16: {  // cut to 11 bits; ordinary numbers and NaN only
        const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
        const uint32_t magnitude = std::isnan(value) ? 0x7e00u
                                   : exponent <= 0   ? 0u
                                                     : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023u);
        const auto half = static_cast<uint16_t>(magnitude | (bits >> 16 & 0x8000u));
        std::memcpy(at(i, j), &half, 2);
        break;
      }
      case DType::kInt8:
        *at(i, j) = static_cast<char>(static_cast<int8_t>(x * 63));
        break;
    }
  }

  double get(int64_t i, int64_t j) const {
    uint32_t bits = 0;
    uint16_t half;
    float value;
    switch (dtype_) {
      case DType::kFloat32:
        std::memcpy(&bits, at(i, j), 4);
        break;
      case DType::kBFloat16:
        std::memcpy(&half, at(i, j), 2);
        bits = static_cast<uint32_t>(half) << 16;
        break;
      case DType::kFloat16: {
        std::memcpy(&half, at(i, j), 2);
        const int exponent = half >> 10 & 31, mantissa = half & 1023;
        const double size = exponent == 31  ? (mantissa != 0 ? std::nan("") : HUGE_VAL)
                            : exponent == 0 ? std::ldexp(mantissa, -24)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
        return half >> 15 ? -size : size;
      }
      case DType::kInt8:
        return static_cast<int8_t>(*at(i, j));
    }
    std::memcpy(&value, &bits, 4);
    return value;
  }

 private:
  char* at(int64_t i, int64_t j) const { return data() + i * stride_ + j * grank::element_bytes(dtype_); }

  DType dtype_;
  int64_t rows_, width_, stride_, gap_;
  std::unique_ptr<char[]> memory_;
};

std::unique_ptr<float[]> floats(int64_t count) {
  std::unique_ptr<float[]> memory(new float[static_cast<size_t>(count)]);
  std::fill(memory.get(), memory.get() + count, std::nanf(""));
  return memory;
}

// What float32 sums of rounded operands may lose of sums of sizes of order one to a hundred.
double tolerance(DType dtype) { return dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 4e-3 : 3e-2; }

// Of results that are sums of terms of this size.
void check_near(double got, double want, double size, DType dtype, const std::string& what) {
  if (std::fabs(got - want) <= tolerance(dtype) * (1 + size)) return;
  if (++failures < 20) std::printf("FAIL %s: got %.9g, want %.9g\n", what.c_str(), got, want);
}

void check_bits(const std::vector<char>& got, const std::vector<char>& want, const std::string& what) {
  if (got == want) return;
  if (++failures < 20) std::printf("FAIL %s: other bits\n", what.c_str());
}

std::string name_of(const char* op, const char* isa, DType dtype, const std::vector<int64_t>& sizes) {
  static constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int8"};
  std::string name = std::string(op) + " " + isa + " " + kNames[static_cast<int>(dtype)];
  for (const int64_t size : sizes) name += " " + std::to_string(size);
  return name;
}

// Calls run(isa, threads) -> bytes for all that runs here, and compares the bytes that have to be the same.
template <typename Run>
void on_every_isa(const char* op, DType dtype, const std::vector<int64_t>& sizes, Run run) {
  std::vector<char> with_fma;
  for (const grank::Isa& isa : grank::isas()) {
    if (!isa.runs_here) continue;
    const std::string name = name_of(op, isa.name, dtype, sizes);
    const std::vector<char> alone = run(isa, 1, name);
    check_bits(run(isa, 3, name), alone, name + " with three threads");
    ++cases;
    const std::string isa_name = isa.name;
    if (isa_name == "baseline" || isa_name == "avx512bf16" || isa_name == "amx") continue;
    if (with_fma.empty()) with_fma = alone;
    check_bits(alone, with_fma, name + " beside another instruction set");
  }
}

std::vector<int64_t> offsets_of(const std::vector<int64_t>& lengths, int64_t first) {
  std::vector<int64_t> offsets{first};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

// ---- score_candidates ----

double activated(grank::HeadActivation activation, double x) {
  switch (activation) {
    case grank::HeadActivation::kRelu:
      return std::max(x, 0.0);
    case grank::HeadActivation::kSilu:
      return x / (1 + std::exp(-x));
    case grank::HeadActivation::kGelu:
      return x * std::erfc(-x * M_SQRT1_2) / 2;
  }
  return 0;
}

void score(DType table, DType dtype, const std::vector<int64_t>& lengths, int64_t C, int64_t d, int64_t h,
           grank::HeadActivation activation) {
  const auto B = static_cast<int64_t>(lengths.size());
  const int64_t N = 1 + below(50), gap = 6 * grank::element_bytes(dtype);
  const std::vector<int64_t> cu = offsets_of(lengths, 1);  // the first and the last row are nobody's
  const Tensor rows = Tensor::drawn(table, N, d, 5 * grank::element_bytes(table));
  Tensor keys = Tensor::drawn(dtype, cu.back() + 1, d, gap), values = Tensor::drawn(dtype, cu.back() + 1, h, gap);
  for (const int64_t nobody : {int64_t{0}, cu.back()}) {
    for (int64_t j = 0; j < d; ++j) keys.put(nobody, j, std::nan(""));
    for (int64_t j = 0; j < h; ++j) values.put(nobody, j, std::nan(""));
  }
  const Tensor weight = Tensor::drawn(dtype, d, h, 0);
  const auto user = floats(B * h), out = floats(h), row_scale = floats(N), scores = floats(B * C);
  for (int64_t i = 0; i < B * h; ++i) user[i] = static_cast<float>(number());
  for (int64_t j = 0; j < h; ++j) out[j] = static_cast<float>(number());
  for (int64_t i = 0; i < N; ++i) row_scale[i] = static_cast<float>(below(100)) * 3e-4f;
  std::unique_ptr<int64_t[]> ids(new int64_t[static_cast<size_t>(B * C)]);
  for (int64_t i = 0; i < B * C; ++i) ids[i] = below(8) == 0 ? -1 - below(5) : below(N);
  const double scale = 0.5 / std::sqrt(static_cast<double>(d));
  const auto element = [&](int64_t id, int64_t j) {
    return rows.get(id, j) * (table == DType::kInt8 ? row_scale[id] : 1.0f);
  };
  std::vector<double> want(static_cast<size_t>(B * C)), size(want.size());
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const int64_t id = ids[b * C + c];
      if (id < 0) continue;
      std::vector<double> hidden(user.get() + b * h, user.get() + (b + 1) * h), w;
      double total = 0;
      for (int64_t k = cu[b]; k < cu[b + 1]; ++k) {
        double logit = 0;
        for (int64_t j = 0; j < d; ++j) logit += element(id, j) * keys.get(k, j);
        w.push_back(std::exp(scale * logit));
        total += w.back();
      }
      for (int64_t j = 0; j < h; ++j) {
        for (int64_t k = cu[b]; k < cu[b + 1]; ++k) hidden[j] += w[k - cu[b]] / total * values.get(k, j);
        for (int64_t i = 0; i < d; ++i) hidden[j] += element(id, i) * weight.get(i, j);
        const double term = out[j] * activated(activation, hidden[j]);
        want[b * C + c] += term;
        size[b * C + c] += 4 * (std::fabs(term) + std::fabs(out[j]));
      }
      want[b * C + c] += 0.25;
    }
  }
  on_every_isa("score_candidates", dtype, {B, C, d, h, cu.back()},
               [&](const grank::Isa& isa, int threads, const std::string& name) {
                 std::fill(scores.get(), scores.get() + B * C, std::nanf(""));
                 grank::ScoreCandidatesProblem p{};
                 p.candidate_ids = ids.get(), p.num_users = B, p.num_candidates = C;
                 p.rows = rows.data(), p.rows_dtype = table, p.num_rows = N, p.d = d, p.row_stride = rows.stride();
                 p.row_scale = table == DType::kInt8 ? row_scale.get() : nullptr;
                 p.dtype = dtype, p.keys = keys.data(), p.key_stride = keys.stride();
                 p.values = values.data(), p.value_stride = values.stride(), p.h = h, p.cu_seqlens = cu.data();
                 p.user_hidden = user.get(), p.item_weight = weight.data(), p.out_weight = out.get(),
                 p.out_bias = 0.25f;
                 p.softmax_scale = static_cast<float>(scale), p.activation = activation, p.threads = threads,
                 p.scores = scores.get();
                 grank::score_candidates(p, isa);
                 for (int64_t i = 0; i < B * C; ++i) {
                   if (ids[i] < 0) {
                     if (scores[i] != -HUGE_VALF && ++failures < 20) std::printf("FAIL %s: no filler\n", name.c_str());
                   } else {
                     check_near(scores[i], want[i], size[i], dtype, name);
                   }
                 }
                 const auto* bytes = reinterpret_cast<const char*>(scores.get());
                 return std::vector<char>(bytes, bytes + B * C * 4);
               });
}

// ---- candidate_cross_attention ----

void attend(DType dtype, const std::vector<int64_t>& counts, const std::vector<int64_t>& lengths, int64_t H, int64_t D,
            bool silu, bool with_bias) {
  const auto B = static_cast<int64_t>(lengths.size());
  const int64_t gap = 3 * grank::element_bytes(dtype);
  const std::vector<int64_t> cu_q = offsets_of(counts, 1), cu_k = offsets_of(lengths, 2);
  const int64_t Q = cu_q.back() + 1, K = cu_k.back() + 2;
  // (rows, H, D) with heads next to each other; a tensor's row is one of a head, so that gaps lie between heads.
  Tensor q = Tensor::drawn(dtype, Q * H, D, gap), k = Tensor::drawn(dtype, K * H, D, gap);
  Tensor v = Tensor::drawn(dtype, K * H, D, gap), grad = Tensor::drawn(dtype, Q * H, D, gap);
  for (Tensor* t : {&q, &k, &v, &grad}) {  // rows of nobody
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t j = 0; j < D; ++j) t->put(h, j, std::nan("")), t->put(t->rows() - 1 - h, j, std::nan(""));
    }
  }
  const auto bias = floats(K * H);
  for (int64_t i = 0; i < K * H; ++i) bias[i] = static_cast<float>(number());
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  std::vector<double> out(static_cast<size_t>(Q * H * D)), grad_q(out), grad_k(static_cast<size_t>(K * H * D)),
      grad_v(grad_k), grad_bias(static_cast<size_t>(K * H));
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t c = cu_q[b]; c < cu_q[b + 1]; ++c) {
        const int64_t qi = c * H + h, L = lengths[b];
        std::vector<double> x, w, g;
        double total = 0, delta = 0;
        for (int64_t i = cu_k[b]; i < cu_k[b + 1]; ++i) {
          double logit = 0, gradient = 0;
          for (int64_t j = 0; j < D; ++j) {
            logit += q.get(qi, j) * k.get(i * H + h, j);
            gradient += grad.get(qi, j) * v.get(i * H + h, j);
          }
          x.push_back(scale * logit + (with_bias ? bias[i * H + h] : 0));
          g.push_back(gradient);
          total += std::exp(x.back());
        }
        for (int64_t i = 0; i < L; ++i) {
          w.push_back(silu ? x[i] / (1 + std::exp(-x[i])) / static_cast<double>(L) : std::exp(x[i]) / total);
          delta += w[i] * g[i];
        }
        for (int64_t i = 0; i < L; ++i) {
          const int64_t ki = (cu_k[b] + i) * H + h;
          const double gate = 1 / (1 + std::exp(-x[i]));
          const double dx =
              silu ? g[i] * gate * (1 + x[i] * (1 - gate)) / static_cast<double>(L) : w[i] * (g[i] - delta);
          grad_bias[ki] += dx;
          for (int64_t j = 0; j < D; ++j) {
            out[qi * D + j] += w[i] * v.get(ki, j);
            grad_q[qi * D + j] += scale * dx * k.get(ki, j);
            grad_k[ki * D + j] += scale * dx * q.get(qi, j);
            grad_v[ki * D + j] += w[i] * grad.get(qi, j);
          }
        }
      }
    }
  }
  const auto strided = [H](const Tensor& t) { return grank::AttentionTensor{t.data(), 0, H * t.stride(), t.stride()}; };
  const auto numbers = [H](float* data) { return grank::AttentionTensor{reinterpret_cast<char*>(data), 0, H * 4, 4}; };
  const char* op = silu ? "attention silu" : "attention softmax";
  on_every_isa(op, dtype, {B, H, D, Q, K}, [&](const grank::Isa& isa, int threads, const std::string& name) {
    const Tensor got(dtype, Q * H, D, gap), got_q(dtype, Q * H, D, gap), got_k(dtype, K * H, D, gap),
        got_v(dtype, K * H, D, gap);
    const auto lse = floats(Q * H), delta = floats(Q * H), excess = floats(Q * H), got_bias = floats(K * H);
    grank::CandidateCrossAttentionProblem p{};
    p.num_users = B, p.num_heads = H, p.d = D, p.dtype = dtype, p.threads = threads;
    p.activation = silu ? grank::AttentionActivation::kSilu : grank::AttentionActivation::kSoftmax;
    p.softmax_scale = static_cast<float>(scale);
    p.queries = {cu_q.data(), nullptr, 0}, p.keys = {cu_k.data(), nullptr, 0};
    p.q = strided(q), p.k = strided(k), p.v = strided(v), p.out = strided(got), p.grad_out = strided(grad);
    p.grad_q = strided(got_q), p.grad_k = strided(got_k), p.grad_v = strided(got_v);
    if (!silu) p.lse = numbers(lse.get()), p.delta = numbers(delta.get()), p.excess = numbers(excess.get());
    if (with_bias) p.bias = numbers(bias.get()), p.grad_bias = numbers(got_bias.get());
    grank::candidate_cross_attention(p, isa);
    grank::candidate_cross_attention_backward(p, isa);
    std::vector<char> bytes;
    const auto compare = [&](const Tensor& t, const std::vector<double>& want, int64_t begin, int64_t end,
                             const char* what) {
      for (int64_t i = begin * H; i < end * H; ++i) {
        for (int64_t j = 0; j < D; ++j) check_near(t.get(i, j), want[i * D + j], 3, dtype, name + what);
        bytes.insert(bytes.end(), t.data() + i * t.stride(),
                     t.data() + i * t.stride() + D * grank::element_bytes(dtype));
      }
    };
    compare(got, out, cu_q.front(), cu_q.back(), " out");
    compare(got_q, grad_q, cu_q.front(), cu_q.back(), " grad_q");
    compare(got_k, grad_k, cu_k.front(), cu_k.back(), " grad_k");
    compare(got_v, grad_v, cu_k.front(), cu_k.back(), " grad_v");
    for (int64_t i = cu_k.front() * H; i < cu_k.back() * H && with_bias; ++i) {
      check_near(got_bias[i], grad_bias[i], 3, dtype, name + " grad_bias");
    }
    return bytes;
  });
}

}  // namespace

int main() {
  constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  constexpr grank::HeadActivation kHeads[] = {grank::HeadActivation::kRelu, grank::HeadActivation::kSilu,
                                              grank::HeadActivation::kGelu};
  int turn = 0;
  for (const DType dtype : kFloats) {
    for (const DType table : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8}) {
      score(table, dtype, {3, 0, 17}, 5, 1 + below(40), 1 + below(40), kHeads[turn++ % 3]);
      score(table, dtype, {130, 1}, 70, 16, 33, kHeads[turn++ % 3]);
    }
    score(dtype, dtype, {257, 96, 128}, 1, 130, 20, kHeads[turn++ % 3]);
    score(dtype, dtype, {40}, 300, 31, 64, kHeads[turn++ % 3]);
    score(dtype, dtype, {}, 3, 4, 4, kHeads[turn++ % 3]);
    for (const bool silu : {false, true}) {
      attend(dtype, {5, 0, 66}, {7, 30, 0}, 2, 1 + below(40), silu, true);
      attend(dtype, {1, 130}, {200, 3}, 1, 32, silu, false);
      attend(dtype, {270, 33}, {65, 129}, 3, 17, silu, true);
    }
    attend(dtype, {}, {}, 2, 8, false, false);
  }
  std::printf("ranker: %d cases, %d failed\n", cases, failures);
  return failures > 0 || cases == 0;
}
