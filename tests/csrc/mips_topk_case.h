// One search by mips_topk and mips_topk_certified, beside the plainest loop there is, bit for bit. Every buffer has its
// exact size, so that AddressSanitizer finds a read or write past it, and what lies between rows is poisoned.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mips_topk.h"
#include "cpu/mips_topk_certified.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace {

using grank::DType;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16", "int8"};

std::atomic<int> failures{0};
std::atomic<int> cases{0};

// Whether the instruction set in use multiplies and adds with one rounding.
bool fused() {
#if defined(__aarch64__)
  return true;
#else
  return std::string(grank::active_isa().name) != "baseline";
#endif
}

// ---- numbers ----

// Numbers out of a seed; or out of given bytes, as many as the range of a number needs, and a seed when those run out.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  Random(const uint8_t* data, size_t size) : engine_(size), data_(data), left_(size) {}
  int64_t below(int64_t n) {
    int bytes = 1;
    while (bytes < 8 && n > int64_t{1} << 8 * bytes) ++bytes;
    return static_cast<int64_t>(number(bytes) % static_cast<uint64_t>(n));
  }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(double p) { return static_cast<double>(number(2) & 0xffff) < p * 0x10000; }
  uint32_t bits() { return static_cast<uint32_t>(number(4)); }
  template <typename T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }

 private:
  uint64_t number(int bytes) {
    if (left_ == 0) return engine_();
    uint64_t x = 0;
    for (; bytes > 0 && left_ > 0; --bytes, --left_) x = x << 8 | *data_++;
    return x;
  }

  std::mt19937_64 engine_;
  const uint8_t* data_ = nullptr;
  size_t left_ = 0;
};

float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float float_of_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa == 0 ? static_cast<float>(sign * kInf) : std::nanf("");
  return static_cast<float>(sign *
                            (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25)));
}

// What a table is filled with.
enum class Fill { kIntegers, kNumbers, kAnything };

// One element of a row: its bytes go to `place`, its value is returned.
float put_element(Random& random, DType dtype, Fill fill, char* place) {
  if (dtype == DType::kInt8) {
    const auto x = static_cast<int8_t>(fill == Fill::kIntegers ? random.between(-9, 9) : random.between(-127, 127));
    std::memcpy(place, &x, 1);
    return x;
  }
  const auto integer = static_cast<int>(random.between(-4, 4));
  if (dtype == DType::kFloat32) {
    float x = static_cast<float>(integer);
    if (fill == Fill::kNumbers) x = static_cast<float>(random.bits()) * 0x1p-31f - 1.0f;
    if (fill == Fill::kAnything) x = float_of_bits(random.bits());
    std::memcpy(place, &x, 4);
    return x;
  }
  const bool half = dtype == DType::kFloat16;
  // Of 0, 1, 2, 3, 4: float16 and bfloat16.
  static constexpr uint16_t kIntegers[2][5] = {{0, 0x3c00, 0x4000, 0x4200, 0x4400},
                                               {0, 0x3f80, 0x4000, 0x4040, 0x4080}};
  auto bits = static_cast<uint16_t>(kIntegers[!half][std::abs(integer)] | (integer < 0 ? 0x8000 : 0));
  if (fill == Fill::kNumbers) {  // between 2^-8 and 2 in magnitude
    const uint16_t low = half ? 0x1c00 : 0x3b80, high = half ? 0x3fff : 0x3fff;
    bits = static_cast<uint16_t>(random.between(low, high) | (random.bits() & 0x8000));
  }
  if (fill == Fill::kAnything) bits = static_cast<uint16_t>(random.bits());
  std::memcpy(place, &bits, 2);
  return half ? float_of_half(bits) : float_of_bits(static_cast<uint32_t>(bits) << 16);
}

// ---- one case ----

struct Shape {
  DType dtype;
  Fill fill;
  int64_t num_queries, num_rows, d, k;
  int64_t gap = 0;  // elements between the end of a row and the next
  bool ids = false, exclude = false;
  int allow = 0;  // 0: none, 1: for all queries, 2: by query, 3: by query, at a stride of its own
  double allowed = 0.5;
  int threads = 1;
  int64_t distinct = 0;  // so many different rows; 0: all
};

std::string describe(const Shape& s, uint64_t seed) {
  char text[240];
  std::snprintf(text, sizeof text,
                "%s fill=%d B=%lld N=%lld d=%lld k=%lld gap=%lld ids=%d exclude=%d allow=%d threads=%d seed=%llu",
                kDTypeNames[static_cast<int>(s.dtype)], static_cast<int>(s.fill), static_cast<long long>(s.num_queries),
                static_cast<long long>(s.num_rows), static_cast<long long>(s.d), static_cast<long long>(s.k),
                static_cast<long long>(s.gap), s.ids, s.exclude, s.allow, s.threads,
                static_cast<unsigned long long>(seed));
  return text;
}

template <typename T>
using Buffer = std::unique_ptr<T[]>;  // of exactly the size asked for

template <typename T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(new T[static_cast<size_t>(count)]);
}

class Case {
 public:
  Case(const Shape& shape, uint64_t seed) : Case(shape, seed, Random(seed)) {}
  // `seed` is what a failure is reported with.
  Case(const Shape& shape, uint64_t seed, const Random& random) : s_(shape), seed_(seed), random_(random) {
    make_queries();
    make_rows();
    make_filters();
  }
  ~Case() { ASAN_UNPOISON_MEMORY_REGION(rows_.get(), row_bytes_); }

  // Gives one number of one row a value: what the forced misses are made of.
  void set_float32(int64_t row, int64_t j, float x) {
    std::memcpy(rows_.get() + row * stride_ + 4 * j, &x, 4);
    elements_[static_cast<size_t>(row * s_.d + j)] = x;
  }
  void set_query(int64_t b, int64_t j, float x) { queries_[b * s_.d + j] = x; }

  void run() {
    search([](const grank::MipsTopkProblem& p) { grank::mips_topk(p, grank::active_isa()); });
    if (s_.dtype == DType::kInt8) return;
    make_copy();
    search([this](const grank::MipsTopkProblem& p) {
      auto rescored = buffer<int64_t>(s_.num_queries);
      std::fill_n(rescored.get(), s_.num_queries, -77);
      const grank::CoarseRows copy{queries_.get(), copy_.get(), s_.d, copy_scale_.get(), copy_error_.get()};
      grank::mips_topk_certified(p, copy, grank::active_isa(), rescored.get());
      for (int64_t b = 0; b < s_.num_queries; ++b) failures += rescored[b] < 0 || rescored[b] > s_.num_rows;
    });
  }

 private:
  template <typename F>
  void search(F&& searched_by) {
    auto values = buffer<float>(s_.num_queries * s_.k);
    auto positions = buffer<int64_t>(s_.num_queries * s_.k);
    std::fill_n(values.get(), s_.num_queries * s_.k, std::nanf(""));
    std::fill_n(positions.get(), s_.num_queries * s_.k, -77);
    grank::MipsTopkProblem p{};
    p.queries = queries_.get();
    p.num_queries = s_.num_queries;
    p.rows = rows_.get();
    p.dtype = s_.dtype;
    p.num_rows = s_.num_rows;
    p.d = s_.d;
    p.row_stride = stride_;
    p.row_scale = row_scale_.get();
    p.ids = ids_.get();
    p.exclude_offsets = exclude_offsets_.get();
    p.exclude_ids = exclude_ids_.get();
    p.allow = allow_.get();
    p.allow_stride = allow_stride_;
    p.k = s_.k;
    p.threads = s_.threads;
    p.values = values.get();
    p.positions = positions.get();
    searched_by(p);
    ++cases;
    compare(values.get(), positions.get());
  }

  // The certified copy: grank_kernels/table/quantise.py, without a basis.
  void make_copy() {
    copy_ = buffer<int8_t>(s_.num_rows * s_.d);
    copy_scale_ = buffer<float>(s_.num_rows);
    copy_error_ = buffer<float>(s_.num_rows);
    for (int64_t i = 0; i < s_.num_rows; ++i) {
      const float* x = elements_.data() + i * s_.d;
      float largest = 0;
      double squares = 0, copy_squares = 0, off = 0;
      for (int64_t j = 0; j < s_.d; ++j) {
        largest = std::max(largest, std::fabs(x[j]));
        squares += static_cast<double>(x[j]) * x[j];
      }
      const double norm = std::sqrt(squares);
      const bool searched = norm >= 0x1p-40 && norm <= 0x1p50;
      const float scale = copy_scale_[i] = searched ? largest / 127 : 0.0f;
      for (int64_t j = 0; j < s_.d; ++j) {
        const auto number = static_cast<int8_t>(searched ? std::nearbyint(x[j] / scale) : 0);
        const double copy = static_cast<double>(scale) * number;
        copy_[i * s_.d + j] = number;
        copy_squares += copy * copy;
        off += (x[j] - copy) * (x[j] - copy);
      }
      const double error = std::sqrt(off) + std::max({norm, std::sqrt(copy_squares), 0x1p-40}) / 150;
      copy_error_[i] = norm <= 0x1p50 ? static_cast<float>(error * (1 + 0x1p-20)) : kInf;
    }
  }

  void make_queries() {
    const int64_t count = s_.num_queries * s_.d;
    queries_ = buffer<float>(count);
    for (int64_t i = 0; i < count; ++i) {
      char place[4];
      queries_[i] = put_element(random_, DType::kFloat32, s_.dtype == DType::kInt8 ? Fill::kIntegers : s_.fill, place);
      // An int8 query whose largest number is 127 is quantised to itself.
      if (s_.dtype == DType::kInt8) queries_[i] = static_cast<float>(i % s_.d == 0 ? 127 : random_.between(-127, 127));
    }
  }

  void make_rows() {
    const int64_t size = grank::element_bytes(s_.dtype);
    stride_ = (s_.d + s_.gap) * size;
    row_bytes_ = s_.num_rows == 0 ? 0 : (s_.num_rows - 1) * stride_ + s_.d * size;  // no gap behind the last row
    rows_ = buffer<char>(row_bytes_);
    elements_.resize(static_cast<size_t>(s_.num_rows * s_.d));
    for (int64_t i = 0; i < s_.num_rows; ++i) {
      char* row = rows_.get() + i * stride_;
      float* values = elements_.data() + i * s_.d;
      if (s_.distinct > 0 && i >= s_.distinct) {
        const int64_t same = random_.below(s_.distinct);
        std::memcpy(row, rows_.get() + same * stride_, static_cast<size_t>(s_.d * size));
        std::copy_n(elements_.data() + same * s_.d, s_.d, values);
      } else {
        for (int64_t j = 0; j < s_.d; ++j) values[j] = put_element(random_, s_.dtype, s_.fill, row + j * size);
      }
      if (i + 1 < s_.num_rows) {
        std::memset(row + s_.d * size, 0xff, static_cast<size_t>(s_.gap * size));  // NaN
        ASAN_POISON_MEMORY_REGION(row + s_.d * size, static_cast<size_t>(s_.gap * size));
      }
    }
    if (s_.dtype == DType::kInt8) {
      row_scale_ = buffer<float>(s_.num_rows);
      for (int64_t i = 0; i < s_.num_rows; ++i) {
        row_scale_[i] = s_.fill == Fill::kIntegers ? random_.of({0.5f, 1.0f, 2.0f})
                                                   : static_cast<float>(random_.between(0, 1000)) / 999.0f;
      }
    }
  }

  void make_filters() {
    const int64_t B = s_.num_queries, N = s_.num_rows;
    if (s_.ids) {
      ids_ = buffer<int64_t>(N);
      std::iota(ids_.get(), ids_.get() + N, int64_t{1} << 40);
      for (int64_t i = N - 1; i > 0; --i) std::swap(ids_[i], ids_[random_.below(i + 1)]);
    }
    if (s_.exclude) {
      exclude_offsets_ = buffer<int64_t>(B + 1);
      std::vector<int64_t> ids(static_cast<size_t>(random_.below(3)), -1);  // of no query
      exclude_offsets_[0] = static_cast<int64_t>(ids.size());
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t left = N > 0 ? random_.below(60) : 0; left > 0; --left) {
          const int64_t row = random_.below(N);
          ids.push_back(random_.chance(0.1) ? -1 : ids_ ? ids_[row] : row);
        }
        exclude_offsets_[b + 1] = static_cast<int64_t>(ids.size());
      }
      exclude_ids_ = buffer<int64_t>(static_cast<int64_t>(ids.size()));
      std::copy(ids.begin(), ids.end(), exclude_ids_.get());
    }
    if (s_.allow > 0) {
      allow_stride_ = s_.allow == 1 ? 0 : s_.allow == 2 ? N : N + 5;
      const int64_t count = s_.allow == 1 ? N : B == 0 ? 0 : (B - 1) * allow_stride_ + N;
      allow_ = buffer<bool>(count);
      for (int64_t i = 0; i < count; ++i) allow_[i] = random_.chance(s_.allowed);
    }
  }

  int64_t id_of(int64_t row) const { return ids_ ? ids_[row] : row; }

  bool is_eligible(int64_t b, int64_t row) const {
    if (allow_ && !allow_[b * allow_stride_ + row]) return false;
    if (!exclude_offsets_) return true;
    const int64_t* begin = exclude_ids_.get() + exclude_offsets_[b];
    const int64_t* end = exclude_ids_.get() + exclude_offsets_[b + 1];
    return std::find(begin, end, id_of(row)) == end;
  }

  float score(int64_t b, int64_t row) const {
    const float* q = queries_.get() + b * s_.d;
    const float* x = elements_.data() + row * s_.d;
    if (s_.dtype == DType::kInt8) {
      int64_t sum = 0;
      for (int64_t j = 0; j < s_.d; ++j) sum += static_cast<int64_t>(q[j]) * static_cast<int64_t>(x[j]);
      const float scale = 1.0f * row_scale_[row];  // the query's is 127 / 127, or 0 where there is no number
      return s_.d == 0 ? 0.0f : static_cast<float>(sum) * scale + 0.0f;
    }
    const bool once = fused();
    float total = 0;
    for (int64_t begin = 0; begin < s_.d; begin += grank::kSegment) {
      float partial = 0;
      for (int64_t j = begin; j < std::min<int64_t>(begin + grank::kSegment, s_.d); ++j) {
        partial = once ? std::fma(q[j], x[j], partial) : partial + q[j] * x[j];
      }
      total += partial;
    }
    return total + 0.0f;
  }

  void compare(const float* values, const int64_t* positions) const {
    std::vector<std::pair<float, int64_t>> best;
    for (int64_t b = 0; b < s_.num_queries; ++b) {
      best.clear();
      for (int64_t row = 0; row < s_.num_rows; ++row) {
        if (!is_eligible(b, row)) continue;
        const float x = score(b, row);
        if (!std::isnan(x)) best.emplace_back(x, row);
      }
      const auto n = std::min<int64_t>(s_.k, static_cast<int64_t>(best.size()));
      std::partial_sort(best.begin(), best.begin() + n, best.end(), [this](const auto& a, const auto& c) {
        return a.first != c.first ? a.first > c.first : id_of(a.second) < id_of(c.second);
      });
      best.resize(static_cast<size_t>(n));
      best.resize(static_cast<size_t>(s_.k), {-kInf, -1});
      for (int64_t i = 0; i < s_.k; ++i) {
        const auto [want, row] = best[static_cast<size_t>(i)];
        const float got = values[b * s_.k + i];
        const int64_t position = positions[b * s_.k + i];
        if (std::memcmp(&got, &want, sizeof got) == 0 && position == row) continue;
        std::printf("FAIL %s\n     query %lld, place %lld: got %.9g of row %lld, want %.9g of row %lld\n",
                    describe(s_, seed_).c_str(), static_cast<long long>(b), static_cast<long long>(i), got,
                    static_cast<long long>(position), want, static_cast<long long>(row));
        ++failures;
        return;
      }
    }
  }

  const Shape s_;
  const uint64_t seed_;
  Random random_;
  Buffer<float> queries_, row_scale_;
  Buffer<char> rows_;
  Buffer<int8_t> copy_;
  Buffer<float> copy_scale_, copy_error_;
  Buffer<int64_t> ids_, exclude_offsets_, exclude_ids_;
  Buffer<bool> allow_;
  int64_t stride_ = 0, row_bytes_ = 0, allow_stride_ = 0;
  std::vector<float> elements_;  // (num_rows, d), what the rows' bytes mean
};

// A shape for which num_queries * num_rows * d is at most `work`.
Shape draw(Random& random, int64_t work) {
  for (;;) {
    Shape s{};
    s.dtype = random.of({DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8});
    s.fill = random.of({Fill::kIntegers, Fill::kNumbers, Fill::kAnything});
    s.num_queries = random.of<int64_t>({0, 1, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 19, 64, 529, 541});
    s.num_rows = random.of<int64_t>({0, 1, 2, 63, 64, 65, 127, 128, 129, 700, 2047, 2048, 2049, 2111, 4100, 17000});
    s.d = random.of<int64_t>(
        {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 50, 64, 96, 127, 128, 129, 200, 256, 257, 385, 1000});
    s.k = random.of<int64_t>({1, 2, 3, 10, 31, 64, 100, 255, 256, 257, 1000, 3000});
    s.gap = random.of<int64_t>({0, 0, 1, 3, 8, 100});
    s.ids = random.chance(0.3);
    s.exclude = random.chance(0.4);
    s.allow = random.chance(0.4) ? static_cast<int>(random.between(1, 3)) : 0;
    s.allowed = random.of({0.0, 0.01, 0.5, 0.99});
    s.threads = static_cast<int>(random.of({1, 2, 3, 5}));
    s.distinct = random.chance(0.3) ? random.between(1, 50) : 0;
    if (s.num_queries * s.num_rows * s.d <= work) return s;
  }
}

}  // namespace
