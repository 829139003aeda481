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

// An access of 16 bytes by an instruction that knows one address space only.
void check_space(const Lane& lane, const void* address, Access access, Space expected, const char* name, uintptr_t pc) {
  const Space space = check_access(lane, address, 16, access, pc);
  if (space == Space::kUnknown || space == expected) return;
  report("address space", &lane,
         std::string(name) + " to an address that is not in " + (expected == Space::kShared ? "shared" : "global") +
             " memory" + at(pc));
  stop();
}

void ldmatrix_all(const Lane& caller, const Operands* const (&operands)[kWarp], bool transposed) {
  const void* rows[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    rows[lane] = operands[lane]->a;
    check_space(lane_of_warp(caller, lane), rows[lane], Access::kRead, Space::kShared, "ldmatrix", operands[lane]->pc);
  }
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* const* const matrix_rows = rows + 8 * matrix;
    count_matrix(matrix_rows);
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(elements[row], matrix_rows[row], 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transposed ? elements[j][i] : elements[i][j];
      const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
      static_cast<uint32_t*>(operands[lane]->out)[matrix] = low | high << 16;
    }
  }
}

// c + a . b over `count` terms as tensor cores are described to compute it: exact products, all terms and c aligned to
// the largest exponent, cut off after `fraction` bits, added exactly, the result cut off to a float. (Fasi, Higham,
// Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021.)
float dot_in_groups(const float* a, const float (*b)[kN], int count, float c, int fraction) {
  double terms[kK + 1];
  int num_terms = 0, largest = -10000;
  float plain = c;  // what infinities and NaN come to
  const auto add = [&](double term, int exponent) {
    terms[num_terms++] = term;
    largest = std::max(largest, exponent);
  };
  for (int k = 0; k < count; ++k) {
    const float x = a[k], y = b[k][0];
    plain += x * y;
    if (x != 0 && y != 0 && std::isfinite(x) && std::isfinite(y)) {
      add(static_cast<double>(x) * y, std::ilogb(x) + std::ilogb(y));
    }
  }
  if (!std::isfinite(plain)) return plain;
  if (c != 0) add(c, std::max(std::ilogb(c), -126));
  int64_t sum = 0;
  for (int i = 0; i < num_terms; ++i) sum += static_cast<int64_t>(std::ldexp(terms[i], fraction - largest));
  if (sum == 0) return 0;
  uint64_t magnitude = sum < 0 ? -static_cast<uint64_t>(sum) : static_cast<uint64_t>(sum);
  const int excess = std::max(0, 40 - __builtin_clzll(magnitude));
  magnitude = magnitude >> excess << excess;
  return std::copysign(static_cast<float>(std::ldexp(static_cast<double>(magnitude), largest - fraction)),
                       static_cast<float>(sum));
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
          const auto* const column = reinterpret_cast<const float (*)[kN]>(&b[k][n]);
          d[m][n] = dot_in_groups(&a[m][k], column, group, d[m][n], fraction);
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
      return mma_all(operands, float_of_half);
    case Op::kMmaBf16:
      return mma_all(operands, float_of_bfloat16);
  }
}

void cp_async_16(void* shared, const void* global, bool valid) {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  maybe_preempt();
  if (valid) {
    check_space(*current, global, Access::kRead, Space::kGlobal, "cp.async", pc);
    count_access(*current, global, 16, Kind::kCopySource, pc);
  }
  check_space(*current, shared, Access::kCopy, Space::kShared, "cp.async", pc);
  count_access(*current, shared, 16, Kind::kCopyTarget, pc);
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
  check_and_count(from, bytes, Access::kRead, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, int bytes) {
  maybe_preempt();
  check_and_count(to, bytes, Access::kWrite, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  std::memcpy(to, from, bytes);
}

void atomic(const void* address, int bytes) {
  maybe_preempt();
  ++counters.atomics;
  check_access(*current, address, bytes, Access::kAtomic, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
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
