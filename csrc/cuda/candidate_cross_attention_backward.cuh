// candidate_cross_attention, backward. With s the logits, w the weights, g = grad_out (C, D), by user and head:
//
//   dw = g v^T;   softmax: w = exp(s - lse),            ds = w (dw - delta), delta = rowsum(g out) - grad_lse
//                 silu:    w = s sigmoid(s) / L,        ds = dw sigmoid(s) (1 + s (1 - sigmoid(s))) / L
//   dv = w^T g;   dk = softmax_scale ds^T q;   dq = softmax_scale ds k;   dbias_k = colsum(ds)
//
// Deterministic without atomics: each row of a gradient is summed by one block in a fixed order. The cost is that s and
// dw are computed twice, 7 products instead of 5: by the blocks that own keys (dk, dv, dbias_k) and by those that own
// queries (dq). One kernel does both. 64 rows of the owned side, X1 and X2, stay in shared memory; the other side, Y1
// and Y2, is streamed in two stages:
//
//                  X1   X2   Y1   Y2
//   own keys       k    v    q    g      T = X1 Y1^T = s^T, G = X2 Y2^T = dw^T;   dk += ds^T Y1, dv += w^T Y2
//   own queries    q    g    k    v      T = X1 Y1^T = s,   G = X2 Y2^T = dw;     dq += ds Y1
//
// So the result of a product in registers is the left operand of the next one. 32 streamed rows (16 at D = 128) are
// multiplied at a time, which bounds the registers. All products are mma_m16n8k16 with float32 sums. w and ds are
// rounded to the element type before the last product: w is in [0, 1] (silu: |w| <= |s|, 1 / L follows the sum); ds has
// at most the magnitude of g v^T, which must stay below 65504 in float16.
//
// Bytes per block: 4 x 64 rows, and 4 D bytes per streamed row. Operations per head: 14 C L D, 2 C L exponentials
// (silu: and as many reciprocals). Shared memory: 256 D + 2 stages of 4 D + 8 bytes per streamed row.
#pragma once

#include "candidate_cross_attention.cuh"

namespace grank::cuda {

enum class Owned { kKeys, kQueries };

template <int kWidth>
struct GradientShared {
  static constexpr int kStreamed = kWidth == 128 ? 32 : 64;  // rows per stage
  static constexpr int kStep = kWidth == 128 ? 16 : 32;      // of those, rows in registers at a time
  static constexpr int kOwnedRows = Tile<kWidth>::bytes(kTileRows);
  static constexpr int kRows = Tile<kWidth>::bytes(kStreamed);
  static constexpr int kTerms = kStreamed * static_cast<int>(sizeof(float2));
  static constexpr int kStage = 2 * kRows + kTerms;
  static constexpr int kBytes = 2 * kOwnedRows + 2 * kStage;
};

// The summand of a row in its logits (softmax: in units of log2; for a query -lse), and the row's delta. An invalid
// row, owned or streamed, has -infinity: its weights are 0.
__device__ __forceinline__ float2 terms_of_key(const CandidateCrossAttention& p, float unit, int64_t row, int head,
                                               bool counts) {
  if (!counts) return make_float2(-INFINITY, 0.0f);
  return make_float2(p.bias_k == nullptr ? 0.0f : p.bias_k[row * p.heads + head] * unit, 0.0f);
}
template <bool kSoftmax>
__device__ __forceinline__ float2 terms_of_query(const CandidateCrossAttention& p, const float* delta, int64_t row,
                                                 int head, bool counts) {
  if (!counts) return make_float2(-INFINITY, 0.0f);
  if (!kSoftmax) return make_float2(0.0f, 0.0f);
  const int64_t place = row * p.heads + head;
  return make_float2(-kLog2E * p.lse[place], delta[place]);
}

// In place: products with keys become weights, products of gradients and values become gradients of the logits. For
// silu both still lack the factor 1 / L.
template <bool kSoftmax>
__device__ __forceinline__ void differentiate(float& logit, float& gradient, float scale, float offset, float delta) {
  const float x = fmaf(logit, scale, offset);
  if (kSoftmax) {
    logit = exp2_approx(x);
    gradient = logit * (gradient - delta);
    return;
  }
  const float gate = x == -INFINITY ? 0.0f : sigmoid(x);
  const float finite = x == -INFINITY ? 0.0f : x;
  logit = finite * gate;
  gradient *= gate * (1.0f + finite * (1.0f - gate));
}

template <class Element, int kWidth, Owned kOwned, bool kSoftmax>
__global__ void __launch_bounds__(kThreads)
    candidate_cross_attention_backward_kernel(const CandidateCrossAttention p,
                                              const CandidateCrossAttentionGradients gradients) {
  using Shared = GradientShared<kWidth>;
  constexpr bool kOwnsKeys = kOwned == Owned::kKeys;
  constexpr int kStreamed = Shared::kStreamed, kStep = Shared::kStep;
  GRANK_DYNAMIC_SHARED(shared);
  unsigned char* const owned_first = shared;
  unsigned char* const owned_second = shared + Shared::kOwnedRows;

  const RowGroups groups = kOwnsKeys ? key_groups(p) : query_groups(p);
  const int64_t tiles = groups.tiles();
  const int head = static_cast<int>(blockIdx.x / tiles);
  const RowTile tile = find_tile(groups, blockIdx.x % tiles);
  const Rows queries = query_groups(p).rows(tile.user), history = key_groups(p).rows(tile.user);
  const Rows owned = kOwnsKeys ? history : queries, streamed = kOwnsKeys ? queries : history;
  const int extent = owned.extent - tile.first, count = owned.count - tile.first;  // from the first row of the tile
  if (extent <= 0) return;

  const int64_t stride = p.heads * kWidth;
  const auto row_of = [&](const void* tensor, int64_t row) {
    return static_cast<const Element*>(tensor) + row * stride + head * kWidth;
  };
  const float unit = kSoftmax ? kLog2E : 1.0f, scale = p.softmax_scale * unit;
  const auto terms = [&](bool of_key, const Rows& rows, int row) {
    return of_key ? terms_of_key(p, unit, rows.begin + row, head, row < rows.count)
                  : terms_of_query<kSoftmax>(p, gradients.delta, rows.begin + row, head, row < rows.count);
  };

  const int steps = count <= 0 ? 0 : (streamed.count + kStreamed - 1) / kStreamed;
  const auto stage_of = [&](int step) { return shared + 2 * Shared::kOwnedRows + step % 2 * Shared::kStage; };
  const auto terms_at = [&](int step) { return stage_of(step) + 2 * Shared::kRows; };
  const auto copy = [&](int step) {
    const int first = step * kStreamed, valid = streamed.count - first;
    unsigned char* const stage = stage_of(step);
    const int64_t begin = streamed.begin + first;
    const int64_t query = first_query(p, queries) + first;
    copy_rows<kStreamed, kWidth>(stage, kOwnsKeys ? row_of(p.q, query) : row_of(p.k, begin), stride, valid);
    if (has_values(p)) {
      copy_rows<kStreamed, kWidth>(stage + Shared::kRows, row_of(kOwnsKeys ? gradients.grad_out : p.v, begin), stride,
                                   valid);
    }
  };
  const auto fetch_terms = [&](int step) {
    return threadIdx.x < kStreamed ? terms(!kOwnsKeys, streamed, step * kStreamed + threadIdx.x) : make_float2(0, 0);
  };
  const auto put_terms = [&](int step, float2 value) {
    if (threadIdx.x < kStreamed) store_vec(terms_at(step) + sizeof(float2) * threadIdx.x, value);
  };

  float2 owned_terms[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) owned_terms[half] = terms(kOwnsKeys, owned, tile.first + fragment_row(half));
  if (steps > 0) {
    const int64_t begin = owned.begin + tile.first;
    const int64_t query = first_query(p, queries) + tile.first;
    copy_rows<kTileRows, kWidth>(owned_first, kOwnsKeys ? row_of(p.k, begin) : row_of(p.q, query), stride, count);
    if (has_values(p)) {
      copy_rows<kTileRows, kWidth>(owned_second, row_of(kOwnsKeys ? p.v : gradients.grad_out, begin), stride, count);
    }
    copy(0);
    put_terms(0, fetch_terms(0));
  }
  cp_async_commit();

  float first_sums[kWidth / 8][4] = {};   // ds Y1: dk or dq
  float second_sums[kWidth / 8][4] = {};  // w Y2: dv
  float logit_sums[2] = {0.0f, 0.0f};     // of ds: dbias_k
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) copy(step + 1);
    cp_async_commit();
    const float2 next_terms = more ? fetch_terms(step + 1) : make_float2(0.0f, 0.0f);
    cp_async_wait<1>();
    __syncthreads();
    const unsigned char* const first_rows = stage_of(step);
    const unsigned char* const second_rows = first_rows + Shared::kRows;
#pragma unroll 1  // unrolling spills registers
    for (int row = 0; row < kStreamed; row += kStep) {
      float weights[kStep / 8][4] = {}, logits[kStep / 8][4] = {};
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        uint32_t a[4];
        load_left<kWidth>(a, owned_first, k);
        multiply_rows<Element, kWidth>(weights, a, first_rows, k, row);
        if (has_values(p)) {
          load_left<kWidth>(a, owned_second, k);
          multiply_rows<Element, kWidth>(logits, a, second_rows, k, row);
        }
      }
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float2 streamed_terms =
              load_vec<float2>(terms_at(step) + sizeof(float2) * (row + fragment_column(n) + column));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& logit = logits[n][2 * half + column];
            differentiate<kSoftmax>(weights[n][2 * half + column], logit, scale, owned_terms[half].x + streamed_terms.x,
                                    kOwnsKeys ? streamed_terms.y : owned_terms[half].y);
            if (kOwnsKeys) logit_sums[half] += logit;
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a[4];
        round_left<Element>(a, logits, k);
        multiply_columns<Element, kWidth>(first_sums, a, first_rows, row + 16 * k);
        if (kOwnsKeys && has_values(p)) {
          round_left<Element>(a, weights, k);
          multiply_columns<Element, kWidth>(second_sums, a, second_rows, row + 16 * k);
        }
      }
    }
    if (more) put_terms(step + 1, next_terms);
    __syncthreads();  // the stage is free
  }

  const float norm = kSoftmax || history.count == 0 ? 1.0f : 1.0f / static_cast<float>(history.count);
  const float first_factor[2] = {p.softmax_scale * norm, p.softmax_scale * norm}, second_factor[2] = {norm, norm};
  const auto store = [&](void* gradient, unsigned char* through, const float (&sums)[kWidth / 8][4],
                         const float (&factor)[2]) {
    store_rows<Element, kWidth>(through, sums, factor,
                                static_cast<Element*>(gradient) + (owned.begin + tile.first) * stride + head * kWidth,
                                stride, extent, count);
  };
  store(kOwnsKeys ? gradients.grad_k : gradients.grad_q, owned_first, first_sums, first_factor);
  if (kOwnsKeys) {
    if (has_values(p)) store(gradients.grad_v, owned_second, second_sums, second_factor);
    if (gradients.grad_bias != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(logit_sums[half]) * norm;
        const int row = fragment_row(half);
        if (lane_id() % 4 == 0 && row < extent) {
          gradients.grad_bias[(owned.begin + tile.first + row) * p.heads + head] = row < count ? total : 0.0f;
        }
      }
    }
  }
}

// delta = rowsum(grad_out * out) - grad_lse, float32: kWidth / 8 lanes per row of a head.
template <class Element, int kWidth>
__global__ void __launch_bounds__(kThreads)
    candidate_cross_attention_delta_kernel(const void* out, const void* grad_out, const float* grad_lse, float* delta,
                                           int64_t rows) {
  constexpr int kLanes = kWidth / 8;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / kLanes, place = row < rows ? thread * 8 : 0;
  uint4 a = {0, 0, 0, 0}, b = a;
  if (grad_out != nullptr) {
    a = load_vec<uint4>(static_cast<const Element*>(out) + place);
    b = load_vec<uint4>(static_cast<const Element*>(grad_out) + place);
  }
  const auto dot = [](uint32_t x, uint32_t y) {
    const float2 u = unpack2<Element>(x), v = unpack2<Element>(y);
    return u.x * v.x + u.y * v.y;
  };
  float sum = dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) sum += __shfl_xor_sync(kFullMask, sum, lane);
  if (row < rows && thread % kLanes == 0) delta[row] = grad_lse == nullptr ? sum : sum - grad_lse[row];
}

template <class Element, int kWidth>
void launch_candidate_cross_attention_backward(const CandidateCrossAttention& problem,
                                               const CandidateCrossAttentionGradients& gradients, void* stream) {
  const auto run = [&](auto kernel, const RowGroups& owned) {
    const unsigned blocks = attention_blocks(owned.tiles(), problem.heads);
    if (blocks == 0) return;
    launch(kernel, dim3(blocks), dim3(kThreads), GradientShared<kWidth>::kBytes, stream, problem, gradients);
  };
  const auto run_both = [&](auto softmax) {
    constexpr bool kSoftmax = decltype(softmax)::value;
    run(candidate_cross_attention_backward_kernel<Element, kWidth, Owned::kKeys, kSoftmax>, key_groups(problem));
    run(candidate_cross_attention_backward_kernel<Element, kWidth, Owned::kQueries, kSoftmax>, query_groups(problem));
  };
  if (problem.activation == AttentionActivation::kSilu) return run_both(std::false_type());
  if (const int64_t rows = problem.num_queries * problem.heads; rows > 0) {
    constexpr int kRowsOfBlock = 8 * kThreads / kWidth;
    launch(candidate_cross_attention_delta_kernel<Element, kWidth>,
           dim3(attention_blocks(ceil_div(rows, kRowsOfBlock), 1)), dim3(kThreads), 0, stream, problem.out,
           gradients.grad_out, gradients.grad_lse, gradients.delta, rows);
  }
  run_both(std::true_type());
}

}  // namespace grank::cuda
