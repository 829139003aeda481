// score_candidates: ids in, scores out, in one kernel. For user b, candidate row e, history K (L, d), V (L, h):
//
//   s = softmax_scale e K^T + bias_k
//   score = out_weight . act(softmax(s) V + e item_weight + user_hidden[b]) + out_bias
//           + lse_weight log(exp(lse_floor) + sum(exp(s)))
//
// Without a head (out_weight is null) values and item_weight are not read, and the first summand is 0.
//
// A block of four warps scores a tile of 64 candidates of one user. Their rows are gathered by id; the history is
// streamed in tiles of 64 keys and values, copied by cp.async to swizzled shared memory while the previous tile is
// used. item_weight is the last tile: its 2 d h <= 128 (d + h) bytes fit into a stage. All products are mma_m16n8k16
// with float32 sums. The weights exp(logit - max) are in [0, 1] and are rounded to the element type before the product
// with V; their float32 sum is at most L. Logits, hidden layer and score stay in registers.
//
// int8 rows convert to elements exactly. All products are linear in a row's scale, which multiplies softmax_scale and
// the product with item_weight, in float32.
//
// A block with several tiles of candidates keeps the history in shared memory if one stage remains for item_weight;
// otherwise it streams the history once per tile.
//
// Bytes per block: 8 and a row per candidate, 2 (d + h) per key and 2 d h for item_weight, once per tile (once in all
// if the history is kept); 4 per score. Padding is not read. Operations: 2 C L (d + h) + 2 C d h, and C L exponentials.
// Shared memory: 128 d + stages (128 (d + h) + 256) bytes, 82432 for two stages at d = h = 128.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "attend.cuh"
#include "score_candidates.h"

namespace grank::cuda {

template <int kWidth, int kHidden>
struct ScoreShared {
  static constexpr int kCandidates = Tile<kWidth>::bytes(kTileRows);
  static constexpr int kKeys = Tile<kWidth>::bytes(kTileRows);
  static constexpr int kValues = Tile<kHidden>::bytes(kTileRows);
  static constexpr int kBias = kTileRows * sizeof(float);
  static constexpr int kStage = kKeys + kValues + kBias;
  static_assert(Tile<kHidden>::bytes(kWidth) <= kKeys + kValues);
  static constexpr int bytes(int stages) { return kCandidates + stages * kStage; }
};

struct Relu {
  __device__ __forceinline__ float operator()(float x) const { return x < 0.0f ? 0.0f : x; }  // keeps NaN
};
struct Silu {
  __device__ __forceinline__ float operator()(float x) const { return x * sigmoid(x); }
};
struct Gelu {
  __device__ __forceinline__ float operator()(float x) const { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

// scores[half] += weight . activate(hidden), of this lane's columns.
template <class Element, int kBlocks, class Activation>
__device__ __forceinline__ void add_scores(float (&scores)[2], const float (&hidden)[kBlocks][4], const Element* weight,
                                           Activation activate) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const float2 pair = unpack2<Element>(load_vec<uint32_t>(weight + fragment_column(n)));
#pragma unroll
    for (int j = 0; j < 4; ++j) scores[j / 2] += (j % 2 ? pair.y : pair.x) * activate(hidden[n][j]);
  }
}

// The score head for the 16 candidates of this warp: each lane gets the scores of its two rows.
// `attended` is a @ V before the factor `normaliser`, and is overwritten.
// Read from constant memory at each use: a register for it would spill.
__device__ __forceinline__ bool has_head(const ScoreCandidates& p) { return p.out_weight != nullptr; }

template <class Element, int kWidth, int kHidden>
__device__ __forceinline__ void score_rows(const ScoreCandidates& p, int64_t user,
                                           const uint32_t (&candidates)[kWidth / 16][4], const float (&row_scale)[2],
                                           const unsigned char* item_weight, float (&attended)[kHidden / 8][4],
                                           const float (&normaliser)[2], float (&scores)[2]) {
  const Element* const user_hidden = static_cast<const Element*>(p.user_hidden) + user * kHidden;
#pragma unroll
  for (int n = 0; n < kHidden / 8; n += 2) {
    float direct[2][4] = {};
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      multiply_columns<Element, kHidden>(direct, candidates[k], item_weight, 16 * k, n);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float2 of_user = unpack2<Element>(load_vec<uint32_t>(user_hidden + fragment_column(n + block)));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& hidden = attended[n + block][j];
        hidden = hidden * normaliser[j / 2] + direct[block][j] * row_scale[j / 2] + (j % 2 ? of_user.y : of_user.x);
      }
    }
  }
  const Element* const out_weight = static_cast<const Element*>(p.out_weight);
  float of_head[2] = {0.0f, 0.0f};
  switch (p.activation) {
    case HeadActivation::kRelu:
      add_scores(of_head, attended, out_weight, Relu());
      break;
    case HeadActivation::kSilu:
      add_scores(of_head, attended, out_weight, Silu());
      break;
    case HeadActivation::kGelu:
      add_scores(of_head, attended, out_weight, Gelu());
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) scores[half] += sum_of_row(of_head[half]);
}

// Gathers int8 rows by id as elements. The tile may be read after the next barrier.
template <int kWidth, class Element, class Source>
__device__ __forceinline__ void convert_rows(unsigned char* tile, Source source) {
  constexpr int kVectors = kWidth / 16;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTileRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const SourceRow from = source(row);
    uint4 bytes = {0, 0, 0, 0};
    if (from.valid) bytes = load_vec<uint4>(static_cast<const unsigned char*>(from.address) + 16 * vector);
    uint4 low, high;
    unpack_int8<Element>(bytes.x, low.x, low.y);
    unpack_int8<Element>(bytes.y, low.z, low.w);
    unpack_int8<Element>(bytes.z, high.x, high.y);
    unpack_int8<Element>(bytes.w, high.z, high.w);
    store_vec(tile + Tile<kWidth>::offset(row, 2 * vector), low);
    store_vec(tile + Tile<kWidth>::offset(row, 2 * vector + 1), high);
  }
}

// Position of a block: tile of candidates, tile of keys (after the last one: item_weight), and its stage.
struct Place {
  int candidate_tile, key_tile, stage;
};

// Blocks per multiprocessor that the compiler must leave registers for; 0: its choice. At width 128 shared memory holds
// two blocks, so each may use half of the registers. At (16, 32) and (64, 32) the compiler's choice spills 8 bytes.
template <int kWidth, int kHidden>
constexpr int kScoreBlocks = kWidth == 128   ? 2
                             : kHidden != 32 ? 0
                             : kWidth == 16  ? 5
                             : kWidth == 64  ? 3
                                             : 0;

template <class Element, int kWidth, int kHidden>
__global__ void __launch_bounds__(kThreads, kScoreBlocks<kWidth, kHidden>)
    score_candidates_kernel(const ScoreCandidates p, const ScorePlan plan) {
  using Shared = ScoreShared<kWidth, kHidden>;
  GRANK_DYNAMIC_SHARED(shared);

  const int num_candidates = static_cast<int>(p.candidates);
  const int rows_per_block = plan.tiles_per_block * kTileRows;
  const int blocks_per_user = (num_candidates - 1) / rows_per_block + 1;
  const int64_t user = blockIdx.x / blocks_per_user;
  const int first_candidate = static_cast<int>(blockIdx.x % blocks_per_user) * rows_per_block;
  const int last_tile = (min(num_candidates - first_candidate, rows_per_block) - 1) / kTileRows;

  const Rows history = RowGroups{p.cu_seqlens, nullptr, p.users, 0, p.num_keys}.rows(user);
  const Element* const keys = static_cast<const Element*>(p.keys) + history.begin * kWidth;
  const Element* const values = static_cast<const Element*>(p.values) + history.begin * kHidden;
  const int key_tiles = (history.count + kTileRows - 1) / kTileRows;
  const bool stays = key_tiles < plan.stages;

  // The id of a candidate, -1 if it is outside the table.
  const auto id_of = [&](int tile, int row) {
    const int candidate = first_candidate + tile * kTileRows + row;
    const int64_t id = candidate < num_candidates ? p.candidate_ids[user * num_candidates + candidate] : int64_t{-1};
    return id >= 0 && id < p.num_items ? id : int64_t{-1};
  };
  const auto scale_of = [&](int64_t id) { return p.row_scale == nullptr || id < 0 ? 1.0f : p.row_scale[id]; };
  const auto gather = [&](int tile) {
    const auto row_of_table = [&](int row) {
      const int64_t id = id_of(tile, row);
      return SourceRow{static_cast<const unsigned char*>(p.items) + id * p.item_stride, id >= 0};
    };
    if (p.row_scale != nullptr) {
      convert_rows<kWidth, Element>(shared, row_of_table);
    } else {
      copy_rows<kTileRows, kWidth>(shared, row_of_table);
    }
  };
  const auto stage_of = [&](const Place& at) { return shared + Shared::kCandidates + at.stage * Shared::kStage; };
  const auto copy = [&](const Place& at) {
    unsigned char* const stage = stage_of(at);
    if (at.key_tile == key_tiles) {
      if (has_head(p)) copy_rows<kWidth, kHidden>(stage, static_cast<const Element*>(p.item_weight), kHidden, kWidth);
      return;
    }
    const int first = at.key_tile * kTileRows, valid = history.count - first;
    copy_rows<kTileRows, kWidth>(stage, keys + int64_t{first} * kWidth, kWidth, valid);
    if (has_head(p))
      copy_rows<kTileRows, kHidden>(stage + Shared::kKeys, values + int64_t{first} * kHidden, kHidden, valid);
    if (threadIdx.x < kTileRows) {
      float bias = static_cast<int>(threadIdx.x) < valid ? 0.0f : -INFINITY;
      if (p.bias_k != nullptr && static_cast<int>(threadIdx.x) < valid) {
        bias = p.bias_k[history.begin + first + threadIdx.x] * OnlineSoftmax::kUnit;
      }
      store_vec(stage + Shared::kKeys + Shared::kValues + 4 * threadIdx.x, bias);
    }
  };
  const auto after = [&](const Place& at) {
    Place next = at;
    if (++next.key_tile > key_tiles) {
      next.key_tile = 0;
      ++next.candidate_tile;
    }
    if (++next.stage == (stays ? key_tiles + 1 : plan.stages)) next.stage = 0;
    return next;
  };

  Place at = {0, 0, 0};
  gather(0);
  copy(at);
  cp_async_commit();

  uint32_t candidates[kWidth / 16][4];
  float scale[2];  // of the logits of this lane's two candidates
  OnlineSoftmax softmax;
  float attended[kHidden / 8][4];
  while (at.candidate_tile <= last_tile) {
    const Place next = after(at);
    if (next.candidate_tile <= (stays ? 0 : last_tile)) copy(next);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

    const unsigned char* const stage = stage_of(at);
    if (at.key_tile == 0) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) load_left<kWidth>(candidates[k], shared, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[half] = p.softmax_scale * OnlineSoftmax::kUnit * scale_of(id_of(at.candidate_tile, fragment_row(half)));
      }
      softmax = OnlineSoftmax();
#pragma unroll
      for (int n = 0; n < kHidden / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) attended[n][j] = 0.0f;
      }
    }
    if (at.key_tile < key_tiles) {
      attend<Element, kWidth, kHidden>(candidates, stage, has_head(p) ? stage + Shared::kKeys : nullptr,
                                       reinterpret_cast<const float*>(stage + Shared::kKeys + Shared::kValues), scale,
                                       softmax, attended);
    } else {
      const int64_t ids[2] = {id_of(at.candidate_tile, fragment_row(0)), id_of(at.candidate_tile, fragment_row(1))};
      const float row_scale[2] = {scale_of(ids[0]), scale_of(ids[1])};
      const float normaliser[2] = {softmax.normaliser(0), softmax.normaliser(1)};
      float scores[2] = {p.out_bias, p.out_bias};
      if (p.lse_weight != 0.0f) {  // before the head, which needs the registers of the softmax
#pragma unroll
        for (int half = 0; half < 2; ++half) scores[half] += p.lse_weight * softmax.log_sum_above(half, p.lse_floor);
      }
      if (has_head(p)) {
        score_rows<Element, kWidth, kHidden>(p, user, candidates, row_scale, stage, attended, normaliser, scores);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int candidate = first_candidate + at.candidate_tile * kTileRows + fragment_row(half);
        if (lane_id() % 4 == 0 && candidate < num_candidates) {
          p.scores[user * num_candidates + candidate] = ids[half] < 0 ? -INFINITY : scores[half];
        }
      }
    }
    __syncthreads();  // the stage is free for the place after the next, and so is the tile of candidates
    if (at.key_tile == 0 && at.candidate_tile < last_tile) {
      gather(at.candidate_tile + 1);
      cp_async_commit();  // older than the copies of the next round, which therefore waits for it
    }
    at = next;
  }
}

// Two stages and one tile per block; more of both if the grid still fills a large device several times and histories of
// up to twice the average length then stay in shared memory (96 KiB, which every device from sm_80 on gives a block).
template <int kWidth, int kHidden>
ScorePlan score_plan(const ScoreCandidates& problem) {
  using Shared = ScoreShared<kWidth, kHidden>;
  constexpr int64_t kBlocks = 1024, kMostTiles = 8;
  constexpr int64_t kMostStages = ((96 << 10) - Shared::kCandidates) / Shared::kStage;
  const int64_t stages = ceil_div(2 * problem.num_keys, problem.users * kTileRows) + 1;
  const int64_t tiles = problem.users * ceil_div(problem.candidates, kTileRows) / kBlocks;
  if (stages > kMostStages || tiles < 2) return {2, 1};
  return {static_cast<int>(stages < 2 ? 2 : stages), static_cast<int>(tiles < kMostTiles ? tiles : kMostTiles)};
}

template <class Element, int kWidth, int kHidden>
void launch_score_candidates(const ScoreCandidates& problem, const ScorePlan* given, void* stream) {
  if (problem.users == 0 || problem.candidates == 0) return;
  if (problem.candidates > INT32_MAX - 8 * kTileRows) {
    throw std::invalid_argument("score_candidates: a user has " + std::to_string(problem.candidates) +
                                " candidates; at most 2^31 - 513 are taken");
  }
  const ScorePlan plan = given != nullptr ? *given : score_plan<kWidth, kHidden>(problem);
  const int64_t blocks = problem.users * ceil_div(ceil_div(problem.candidates, kTileRows), plan.tiles_per_block);
  if (blocks >= int64_t{1} << 31) throw std::invalid_argument("score_candidates: more than 2^31 tiles of candidates");
  launch(score_candidates_kernel<Element, kWidth, kHidden>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         ScoreShared<kWidth, kHidden>::bytes(plan.stages), stream, problem, plan);
}

}  // namespace grank::cuda
