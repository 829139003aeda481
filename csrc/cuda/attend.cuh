// One tile of keys and values: logits, weights, weighted sums of the values. Both forward kernels loop over it.
//
// Weights are OnlineSoftmax, exp(logit) relative to the largest logit so far, or SiluWeights, logit * sigmoid(logit).
// A logit is scale[row] * (query . key) + bias[column]. A column without a key has bias -infinity, so weight zero, and
// zeros as values, because zero times NaN is NaN.
#pragma once

#include <math.h>

#include "tiles.cuh"

namespace grank::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Logits are in units of log2: scale and bias have the factor kLog2E. Sums are float32 and hold at most one per key;
// a warp keeps its own maximum and rescales its sums when it grows.
struct OnlineSoftmax {
  static constexpr float kUnit = kLog2E;
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of this lane's columns

  template <int kBlocks, int kValueBlocks>
  __device__ __forceinline__ void weigh(float (&logits)[kBlocks][4], float (&values)[kValueBlocks][4]) {
    float shift[2], correction[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = max[half];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        highest = fmaxf(highest, fmaxf(logits[n][2 * half], logits[n][2 * half + 1]));
      }
      highest = max_of_row(highest);
      shift[half] = highest == -INFINITY ? 0.0f : highest;  // -infinity - (-infinity) is NaN
      correction[half] = exp2_approx(max[half] - shift[half]);
      max[half] = highest;
      sum[half] *= correction[half];
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        logits[n][j] = exp2_approx(logits[n][j] - shift[j / 2]);
        sum[j / 2] += logits[n][j];
      }
    }
#pragma unroll
    for (int n = 0; n < kValueBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[n][j] *= correction[j / 2];
    }
  }

  // Factor of the final weighted sums: 0 for an empty history.
  __device__ __forceinline__ float normaliser(int half) {
    const float total = sum_of_row(sum[half]);
    sum[half] = total;
    return total == 0.0f ? 0.0f : 1.0f / total;
  }
  // log(sum(exp(logit))); after normaliser(). +infinity for an empty history, so that exp(logit - lse) is 0.
  __device__ __forceinline__ float log_sum(int half) const {
    return sum[half] == 0.0f ? INFINITY : max[half] * kLn2 + logf(sum[half]);
  }
  // log(exp(floor) + sum(exp(logit))), floor below infinity; after normaliser().
  __device__ __forceinline__ float log_sum_above(int half, float floor) const {
    const float most = fmaxf(max[half], floor * kLog2E);
    const float base = most == -INFINITY ? 0.0f : most;
    const float total = sum[half] * exp2_approx(max[half] - base) + exp2_approx(floor * kLog2E - base);
    return base * kLn2 + logf(total);
  }
};

__device__ __forceinline__ float sigmoid(float x) { return rcp_approx(1.0f + exp2_approx(-kLog2E * x)); }

struct SiluWeights {
  static constexpr float kUnit = 1.0f;

  template <int kBlocks, int kValueBlocks>
  __device__ __forceinline__ void weigh(float (&logits)[kBlocks][4], float (&)[kValueBlocks][4]) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = logits[n][j];
        logits[n][j] = x == -INFINITY ? 0.0f : x * sigmoid(x);
      }
    }
  }
};

// The queries of this warp times one tile of kTileRows keys and values. `bias` is in shared memory, one per column.
// Without values (null) only the weights are summed.
template <class Element, int kWidth, int kValueWidth, class Weights>
__device__ __forceinline__ void attend(const uint32_t (&queries)[kWidth / 16][4], const unsigned char* keys,
                                       const unsigned char* values, const float* bias, const float (&scale)[2],
                                       Weights& weights, float (&sums)[kValueWidth / 8][4]) {
  constexpr int kBlocks = kTileRows / 8;
  float logits[kBlocks][4] = {};
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    multiply_rows<Element, kWidth>(logits, queries[step], keys, step);
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const float2 offset = load_vec<float2>(bias + fragment_column(n));
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[n][j] = fmaf(logits[n][j], scale[j / 2], j % 2 ? offset.y : offset.x);
  }
  weights.weigh(logits, sums);
  if (values == nullptr) return;
#pragma unroll
  for (int step = 0; step < kTileRows / 16; ++step) {
    uint32_t a[4];
    round_left<Element>(a, logits, step);
    multiply_columns<Element, kValueWidth>(sums, a, values, 16 * step);
  }
}

}  // namespace grank::cuda
