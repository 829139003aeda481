// candidate_cross_attention, forward: for user b and head, queries q (C, D), keys k and values v (L, D),
//
//   s = softmax_scale q k^T + bias_k;   out = softmax(s) v, lse = log(sum(exp(s)))   or   out = s sigmoid(s) v / L
//
// A block of four warps computes 64 queries of one user and one head. It loops over the user's keys in tiles of 64,
// which cp.async copies to two stages of swizzled shared memory. Both products are mma_m16n8k16 with float32 sums.
// Weights are rounded to the element type before the product with v: softmax weights are in [0, 1] relative to the
// row's maximum, and their float32 sum is at most L; silu weights are at most |s|, and the sum is divided by L. Without
// keys out = 0 and lse = +infinity.
//
// Bytes per block: 64 queries in and out, 4 D per key. Operations: 4 C L D per head (half of both for lse alone), C L
// exponentials (silu: and C L reciprocals). Shared memory: 640 D + 512 bytes.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "attend.cuh"
#include "candidate_cross_attention.h"

namespace grank::cuda {

inline __host__ __device__ RowGroups query_groups(const CandidateCrossAttention& p) {
  return {p.cu_seqlens_q, nullptr, p.users, p.queries_per_user, p.num_queries};
}
inline __host__ __device__ RowGroups key_groups(const CandidateCrossAttention& p) {
  return {p.cu_seqlens_k, p.seqused_k, p.users, p.keys_per_user, p.num_keys};
}
// Of a tensor without rows the address may be null, of both only where there is none.
inline __host__ __device__ bool has_values(const CandidateCrossAttention& p) {
  return p.v != nullptr || p.out != nullptr;
}
// The first row of a user's queries in q; shared queries are stored once.
__device__ __forceinline__ int64_t first_query(const CandidateCrossAttention& p, const Rows& queries) {
  return p.shared_queries ? 0 : queries.begin;
}

template <int kWidth>
struct AttentionShared {
  static constexpr int kRows = Tile<kWidth>::bytes(kTileRows);
  static constexpr int kStage = 2 * kRows + kTileRows * static_cast<int>(sizeof(float));
  static constexpr int kBytes = kRows + 2 * kStage;
};

// At width 64 the compiler's choice of registers spills 28 bytes on sm_90; with three blocks per multiprocessor it does
// not.
template <class Element, int kWidth, class Weights>
__global__ void __launch_bounds__(kThreads, kWidth == 64 ? 3 : 0)
    candidate_cross_attention_kernel(const CandidateCrossAttention p) {
  using Shared = AttentionShared<kWidth>;
  GRANK_DYNAMIC_SHARED(shared);
  const int64_t tiles = query_groups(p).tiles();
  const int head = static_cast<int>(blockIdx.x / tiles);
  const RowTile tile = find_tile(query_groups(p), blockIdx.x % tiles);
  const Rows queries = query_groups(p).rows(tile.user), history = key_groups(p).rows(tile.user);
  if (tile.first >= queries.extent) return;

  const int64_t stride = p.heads * kWidth;
  const auto row_of = [&](const void* tensor, int64_t row) {
    return static_cast<const Element*>(tensor) + row * stride + head * kWidth;
  };
  const int key_tiles = (history.count + kTileRows - 1) / kTileRows;
  const auto stage_of = [&](int key_tile) { return shared + Shared::kRows + key_tile % 2 * Shared::kStage; };
  const auto bias_of = [&](int key_tile) { return reinterpret_cast<float*>(stage_of(key_tile) + 2 * Shared::kRows); };
  const auto copy = [&](int key_tile) {
    const int first = key_tile * kTileRows, valid = history.count - first;
    unsigned char* const stage = stage_of(key_tile);
    copy_rows<kTileRows, kWidth>(stage, row_of(p.k, history.begin + first), stride, valid);
    if (has_values(p)) {
      copy_rows<kTileRows, kWidth>(stage + Shared::kRows, row_of(p.v, history.begin + first), stride, valid);
    }
  };
  // The bias of this thread's key: loaded early, stored when the stage is free.
  const auto fetch_bias = [&](int key_tile) {
    const int key = key_tile * kTileRows + threadIdx.x;
    if (threadIdx.x >= kTileRows || key >= history.count) return -INFINITY;
    return p.bias_k == nullptr ? 0.0f : p.bias_k[(history.begin + key) * p.heads + head] * Weights::kUnit;
  };
  const auto put_bias = [&](int key_tile, float bias) {
    if (threadIdx.x < kTileRows) bias_of(key_tile)[threadIdx.x] = bias;
  };

  const int left = queries.extent - tile.first;
  if (key_tiles > 0) {
    copy_rows<kTileRows, kWidth>(shared, row_of(p.q, first_query(p, queries) + tile.first), stride, left);
    copy(0);
    put_bias(0, fetch_bias(0));
  }
  cp_async_commit();

  const float unit = p.softmax_scale * Weights::kUnit, scale[2] = {unit, unit};
  uint32_t query[kWidth / 16][4];
  float sums[kWidth / 8][4] = {};
  Weights weights;
  for (int key_tile = 0; key_tile < key_tiles; ++key_tile) {
    const bool more = key_tile + 1 < key_tiles;
    if (more) copy(key_tile + 1);
    cp_async_commit();
    const float next_bias = more ? fetch_bias(key_tile + 1) : 0.0f;
    cp_async_wait<1>();
    __syncthreads();
    if (key_tile == 0) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) load_left<kWidth>(query[k], shared, k);
    }
    const unsigned char* const stage = stage_of(key_tile);
    attend<Element, kWidth, kWidth>(query, stage, has_values(p) ? stage + Shared::kRows : nullptr, bias_of(key_tile),
                                    scale, weights, sums);
    if (more) put_bias(key_tile + 1, next_bias);
    __syncthreads();  // the stage is free
  }

  float factor[2];
  if constexpr (std::is_same_v<Weights, OnlineSoftmax>) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = weights.normaliser(half);
      const int row = tile.first + fragment_row(half);
      if (lane_id() % 4 == 0 && row < queries.extent) {
        p.lse[(queries.begin + row) * p.heads + head] = weights.log_sum(half);
      }
    }
  } else {
    factor[0] = factor[1] = history.count == 0 ? 0.0f : 1.0f / static_cast<float>(history.count);
  }
  if (!has_values(p)) return;
  Element* const out = static_cast<Element*>(p.out) + (queries.begin + tile.first) * stride + head * kWidth;
  store_rows<Element, kWidth>(shared, sums, factor, out, stride, left, left);
}

inline unsigned attention_blocks(int64_t tiles, int64_t heads) {
  if (tiles != 0 && heads >= (int64_t{1} << 31) / tiles) {
    throw std::invalid_argument("candidate_cross_attention: more than 2^31 tiles of rows");
  }
  return static_cast<unsigned>(tiles * heads);
}

template <class Element, int kWidth>
void launch_candidate_cross_attention(const CandidateCrossAttention& problem, void* stream) {
  const unsigned blocks = attention_blocks(query_groups(problem).tiles(), problem.heads);
  if (blocks == 0) return;
  const auto kernel = problem.activation == AttentionActivation::kSoftmax
                          ? candidate_cross_attention_kernel<Element, kWidth, OnlineSoftmax>
                          : candidate_cross_attention_kernel<Element, kWidth, SiluWeights>;
  launch(kernel, dim3(blocks), dim3(kThreads), AttentionShared<kWidth>::kBytes, stream, problem);
}

}  // namespace grank::cuda
