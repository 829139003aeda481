// What a warp does as one: shuffles, votes, ldmatrix and mma, and the arithmetic of the tensor cores; beside it the
// copies and vector accesses of a single thread.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "runtime.h"

namespace grank::emulation {

namespace {

constexpr int kM = 16, kN = 8, kK = 16;

template <class Do>
void for_each(unsigned mask, Do todo) {
  for (; mask != 0; mask &= mask - 1) todo(__builtin_ctz(mask));
}

void shuffle_all(const Lane& caller, const Operands* const (&operands)[kWarp], unsigned mask) {
  for_each(mask, [&](int lane) {
    const Operands& own = *operands[lane];
    const int source = (own.op == Op::kShuffleXor ? lane ^ own.argument : own.argument) & (kWarp - 1);
    if ((mask >> source & 1) == 0) {
      report("divergence", &lane_of_warp(caller, lane),
             std::string(name_of(own.op)) + " from lane " + std::to_string(source) + ", which the mask does not name" +
                 at(own.pc));
      stop();
    }
    *static_cast<uint64_t*>(own.out) = operands[source]->value;
  });
}

void vote_all(const Operands* const (&operands)[kWarp], unsigned mask) {
  unsigned ballot = 0;
  for_each(mask, [&](int lane) { ballot |= static_cast<unsigned>(operands[lane]->value) << lane; });
  for_each(mask, [&](int lane) { *static_cast<unsigned*>(operands[lane]->out) = ballot; });
}

void ldmatrix_all(const Lane& caller, const Operands* const (&operands)[kWarp], bool transposed) {
  const void* rows[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    rows[lane] = operands[lane]->a;
    check_and_count(lane_of_warp(caller, lane), rows[lane], 16, Access::kRead, Kind::kNone, Kind::kLdmatrix,
                    operands[lane]->pc);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(elements[row], rows[8 * matrix + row], 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transposed ? elements[j][i] : elements[i][j];
      const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
      static_cast<uint32_t*>(operands[lane]->out)[matrix] = low | high << 16;
    }
  }
}

// Of a finite number other than 0; a denormal counts as the smallest normal.
int exponent_of(float x) { return std::max<int>(bits_of(x) >> 23 & 0xff, 1) - 127; }

double power_of_2(int exponent) { return __builtin_bit_cast(double, static_cast<uint64_t>(1023 + exponent) << 52); }

// c + a . b over `count` terms as tensor cores are described to compute it: exact products, all terms and c aligned to
// the largest exponent, cut off after `fraction` bits, added exactly, the result cut off to a float. (Fasi, Higham,
// Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021.) b is a column of a matrix (kK, kN).
float dot_in_groups(const float* a, const float* b, int count, float c, int fraction) {
  double terms[kK + 1];
  int largest = c != 0 ? exponent_of(c) : -1000;
  float plain = c;  // what infinities and NaN come to
  for (int k = 0; k < count; ++k) {
    const float x = a[k], y = b[k * kN];
    plain += x * y;
    terms[k] = static_cast<double>(x) * y;
    if (terms[k] != 0) largest = std::max(largest, exponent_of(x) + exponent_of(y));
  }
  terms[count] = c;
  if (!std::isfinite(plain)) return plain;
  if (largest == -1000) return 0;
  const double unit = power_of_2(fraction - largest);
  int64_t sum = 0;
  for (int i = 0; i <= count; ++i) sum += static_cast<int64_t>(terms[i] * unit);
  if (sum == 0) return 0;
  uint64_t magnitude = sum < 0 ? -static_cast<uint64_t>(sum) : static_cast<uint64_t>(sum);
  const int excess = std::max(0, 40 - __builtin_clzll(magnitude));
  magnitude = magnitude >> excess << excess;
  const auto result = static_cast<float>(static_cast<double>(magnitude) * power_of_2(largest - fraction));
  return sum < 0 ? -result : result;
}

// Fragments as csrc/cuda/primitives.cuh states them.
template <class ToFloat>
void mma_all(const Operands* const (&operands)[kWarp], ToFloat to_float) {
  float a[kM][kK], b[kK][kN], d[kM][kN];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* const ra = static_cast<const uint32_t*>(operands[lane]->a);
    const auto* const rb = static_cast<const uint32_t*>(operands[lane]->b);
    const auto* const rd = static_cast<const float*>(operands[lane]->out);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t pair) { return to_float(static_cast<uint16_t>(pair >> 16 * half)); };
      a[g][t + half] = element(ra[0]);
      a[g + 8][t + half] = element(ra[1]);
      a[g][t + 8 + half] = element(ra[2]);
      a[g + 8][t + 8 + half] = element(ra[3]);
      b[t + half][g] = element(rb[0]);
      b[t + 8 + half][g] = element(rb[1]);
      d[g][t + half] = rd[half];
      d[g + 8][t + half] = rd[2 + half];
    }
  }
  if (config.rounding == Rounding::kSequential) {
    // A product of two elements is exact in float, so this is a chain of fused multiply-adds over ascending k.
    for (int m = 0; m < kM; ++m) {
      for (int k = 0; k < kK; ++k) {
        for (int n = 0; n < kN; ++n) d[m][n] += a[m][k] * b[k][n];
      }
    }
  } else {
    // Group sizes and bits as published for A100 and H100. A way to perturb, not a promise of their bits.
    const bool of_8 = config.rounding == Rounding::kGroupsOf8;
    const int group = of_8 ? 8 : 16, fraction = of_8 ? 24 : 25;
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int k = 0; k < kK; k += group) {
          d[m][n] = dot_in_groups(&a[m][k], &b[k][n], group, d[m][n], fraction);
        }
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* const rd = static_cast<float*>(operands[lane]->out);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      rd[half] = d[g][t + half];
      rd[2 + half] = d[g + 8][t + half];
    }
  }
  ++counters.mma;
}

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Off by up to `bound`, and always by the same for the same argument.
float perturbed(float y, float argument, float bound) {
  if (config.rounding == Rounding::kSequential || !std::isfinite(y)) return flush(y);
  const uint32_t hash = bits_of(argument) * 0x9e3779b1u;
  return flush(y + bound * (static_cast<float>(hash >> 8) * 0x1p-23f - 1));
}

void land(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
}

}  // namespace

void execute(const Lane& lane, unsigned mask) {
  const Operands* operands[kWarp] = {};
  for_each(mask, [&](int i) {
    Lane& other = lane_of_warp(lane, i);
    operands[i] = other.operands;
    other.waits_at = nullptr;
  });
  switch (lane.operands->op) {
    case Op::kShuffle:
    case Op::kShuffleXor:
      return shuffle_all(lane, operands, mask);
    case Op::kBallot:
    case Op::kAny:
    case Op::kAll:
      return vote_all(operands, mask);
    case Op::kSyncWarp:
      return check_warp_barrier(lane, mask);
    case Op::kLdmatrix:
    case Op::kLdmatrixTrans:
      return ldmatrix_all(lane, operands, lane.operands->op == Op::kLdmatrixTrans);
    case Op::kMmaF16:
      return mma_all(operands, [](uint16_t bits) { return float_of_half(bits); });
    case Op::kMmaBf16:
      return mma_all(operands, [](uint16_t bits) { return float_of_bfloat16(bits); });
  }
}

void cp_async_16(void* shared, const void* global, bool valid) {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  maybe_preempt();
  if (valid) check_and_count(*current, global, 16, Access::kRead, Kind::kCopySource, Kind::kNone, pc);
  check_and_count(*current, shared, 16, Access::kCopy, Kind::kNone, Kind::kCopyTarget, pc);
  current->copies.push_back({shared, global, valid, current->copy_group});
  if (config.seed != 0 && random_bits() % 2 == 0) land(current->copies.back());
}

void cp_async_commit() { ++current->copy_group; }

void cp_async_wait(int pending) {
  std::vector<Copy>& copies = current->copies;
  const auto waited_for = [pending](const Copy& copy) {
    return static_cast<int>(current->copy_group - copy.group) > pending;
  };
  const auto end = std::find_if_not(copies.begin(), copies.end(), waited_for);
  for (auto copy = copies.begin(); copy != end; ++copy) {
    land(*copy);
    check_copy_landed(*current, *copy);
  }
  copies.erase(copies.begin(), end);
}

void load(void* to, const void* from, int bytes) {
  maybe_preempt();
  check_and_count(*current, from, bytes, Access::kRead, Kind::kGlobalLoad, Kind::kSharedLoad,
                  reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, int bytes) {
  maybe_preempt();
  check_and_count(*current, to, bytes, Access::kWrite, Kind::kGlobalStore, Kind::kSharedStore,
                  reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void atomic(const void* address, int bytes) {
  maybe_preempt();
  ++counters.atomics;
  check_and_count(*current, address, bytes, Access::kAtomic, Kind::kGlobalStore, Kind::kSharedStore,
                  reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void copy_unseen(void* to, const void* from, int bytes) { std::memcpy(to, from, bytes); }

float exp2_approx(float x) {
  const float y = std::exp2(flush(x));
  return x == 0 ? 1 : perturbed(y, x, y * 0x1p-22f);
}

float log2_approx(float x) {
  const float y = std::log2(flush(x));
  return perturbed(y, x, 0x1p-22f * (x > 0.5f && x < 2 ? 1 : std::fabs(y)));
}

float rcp_approx(float x) {
  const float y = 1 / flush(x);
  return perturbed(y, x, y * 0x1p-23f);
}

}  // namespace grank::emulation
