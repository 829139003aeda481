// score_candidates: ids in, scores out, in one kernel. For user b, candidate row e, history K (L, d), V (L, h):
//
//   score = out_weight . act(softmax(softmax_scale e K^T) V + e item_weight + user_hidden[b]) + out_bias
//
// A block of four warps takes tiles of 64 candidates of one user, and walks the history in tiles of 64 keys: their rows
// come by cp.async into swizzled shared memory while the tile before is in use. Then item_weight comes the same way, as
// if it were one more tile: it never needs more room than 64 keys and values, 2 d h <= 128 (d + h). All products are
// mma_m16n8k16 with float32 sums. Weights are exp(logit - max) in [0, 1], rounded to the element type before they meet
// V; their sum is float32 and at most L. A candidate lives in 16 lanes' registers from its gather to its score.
//
// Int8 rows become elements exactly; e is linear in its scale, which therefore multiplies softmax_scale and the product
// with item_weight, in float32.
//
// A history of fewer tiles than there are stages stays in shared memory with item_weight, for all tiles of the block.
//
// Bytes: a block reads, per tile of candidates, 64 ids and 64 rows, and 2 (d + h) bytes a key of its history, rounded
// up to 64 keys nowhere: rows past the end are not read; once per block, not per tile, where the history stays. Plus
// 2 d h for item_weight. It writes 4 bytes a candidate. Operations: 2 C L (d + h) + 2 C d h, and C L exponentials.
// Shared memory: 128 d + stages * (128 (d + h) + 256) bytes.
#pragma once

#include <stdexcept>

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

__device__ __forceinline__ float activate(float x, HeadActivation activation) {
  switch (activation) {
    case HeadActivation::kRelu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case HeadActivation::kSilu:
      return x * sigmoid(x);
    default:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  }
}

// Rows of int8 by id, as elements. The tile may be read after the next barrier.
template <int kWidth, class Element, class Address>
__device__ __forceinline__ void convert_rows(unsigned char* tile, Address address) {
  constexpr int kVectors = kWidth / 16;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTileRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const unsigned char* source = address(row);
    uint4 bytes = {0, 0, 0, 0};
    if (source != nullptr) bytes = load_vec<uint4>(source + 16 * vector);
    uint4 low, high;
    unpack_int8<Element>(bytes.x, low.x, low.y);
    unpack_int8<Element>(bytes.y, low.z, low.w);
    unpack_int8<Element>(bytes.z, high.x, high.y);
    unpack_int8<Element>(bytes.w, high.z, high.w);
    store_vec(tile + Tile<kWidth>::offset(row, 2 * vector), low);
    store_vec(tile + Tile<kWidth>::offset(row, 2 * vector + 1), high);
  }
}

template <class Element, int kWidth, int kHidden>
__global__ void __launch_bounds__(kThreads) score_candidates_kernel(const ScoreCandidates p, const ScorePlan plan) {
  using Shared = ScoreShared<kWidth, kHidden>;
  GRANK_DYNAMIC_SHARED(shared);
  unsigned char* const stages = shared + Shared::kCandidates;

  const int64_t tiles = (p.candidates + kTileRows - 1) / kTileRows;
  const int64_t blocks = (tiles + plan.tiles_per_block - 1) / plan.tiles_per_block;
  const int64_t user = blockIdx.x / blocks;
  const int64_t first_tile = blockIdx.x % blocks * plan.tiles_per_block;
  const int my_tiles = static_cast<int>(min(tiles - first_tile, static_cast<int64_t>(plan.tiles_per_block)));
  const int64_t* const ids = p.candidate_ids + user * p.candidates;

  const Rows history = RowGroups{p.cu_seqlens, nullptr, p.users, 0, p.num_keys}.rows(user);
  const Element* const keys = static_cast<const Element*>(p.keys) + history.begin * kWidth;
  const Element* const values = static_cast<const Element*>(p.values) + history.begin * kHidden;
  const int key_tiles = (history.count + kTileRows - 1) / kTileRows;
  const bool stays = key_tiles < plan.stages;

  const auto id_of = [&](int64_t candidate) { return candidate < p.candidates ? ids[candidate] : int64_t{-1}; };
  const auto known = [&](int64_t id) { return id >= 0 && id < p.num_items; };
  const auto gather = [&](int tile) {
    const int64_t begin = (first_tile + tile) * kTileRows;
    const auto address = [&](int row) -> const unsigned char* {
      const int64_t id = id_of(begin + row);
      return known(id) ? static_cast<const unsigned char*>(p.items) + id * p.item_stride : nullptr;
    };
    if (p.row_scale != nullptr) {
      convert_rows<kWidth, Element>(shared, address);
    } else {
      copy_rows<kTileRows, kWidth>(shared, address);
    }
  };
  // Step s of the walk: tile s % (key_tiles + 1) of the history, item_weight after the last one.
  const int steps_of_tile = key_tiles + 1, steps = my_tiles * steps_of_tile;
  const auto stage_of = [&](int step) {
    return stages + (stays ? step % steps_of_tile : step % plan.stages) * Shared::kStage;
  };
  const auto copy = [&](int step) {
    unsigned char* const stage = stage_of(step);
    const int tile = step % steps_of_tile;
    if (tile == key_tiles) {
      copy_rows<kWidth, kHidden>(stage, static_cast<const Element*>(p.item_weight), kHidden, kWidth);
      return;
    }
    const int first = tile * kTileRows, valid = history.count - first;
    copy_rows<kTileRows, kWidth>(stage, keys + int64_t{first} * kWidth, kWidth, valid);
    copy_rows<kTileRows, kHidden>(stage + Shared::kKeys, values + int64_t{first} * kHidden, kHidden, valid);
    if (threadIdx.x < kTileRows) {
      store_vec(stage + Shared::kKeys + Shared::kValues + 4 * threadIdx.x,
                static_cast<int>(threadIdx.x) < valid ? 0.0f : -INFINITY);
    }
  };

  gather(0);
  copy(0);
  cp_async_commit();

  uint32_t candidate[kWidth / 16][4];
  float row_scale[2], scale[2];
  bool scored[2];
  OnlineSoftmax softmax;
  float attended[kHidden / 8][4];
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps && !(stays && step + 1 >= steps_of_tile)) copy(step + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

    const int tile = step / steps_of_tile, key_tile = step % steps_of_tile;
    const unsigned char* const stage = stage_of(step);
    if (key_tile == 0) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) load_left<kWidth>(candidate[k], shared, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t id = id_of((first_tile + tile) * kTileRows + fragment_row(half));
        scored[half] = known(id);
        row_scale[half] = scored[half] && p.row_scale != nullptr ? p.row_scale[id] : 1.0f;
        scale[half] = p.softmax_scale * OnlineSoftmax::kUnit * row_scale[half];
      }
      softmax = OnlineSoftmax();
#pragma unroll
      for (int n = 0; n < kHidden / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) attended[n][j] = 0.0f;
      }
    }
    if (key_tile < key_tiles) {
      attend<Element, kWidth, kHidden>(candidate, stage, stage + Shared::kKeys,
                                       reinterpret_cast<const float*>(stage + Shared::kKeys + Shared::kValues), scale,
                                       softmax, attended);
    } else {
      const float normaliser[2] = {softmax.normaliser(0), softmax.normaliser(1)};
      const Element* const user_hidden = static_cast<const Element*>(p.user_hidden) + user * kHidden;
      float score[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kHidden / 8; n += 2) {
        float direct[2][4] = {};
#pragma unroll
        for (int k = 0; k < kWidth / 16; ++k) {
          multiply_columns<Element, kHidden>(direct, candidate[k], stage, 16 * k, n);
        }
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const int column = fragment_column(n + block);
          const float2 of_user = unpack2<Element>(load_vec<uint32_t>(user_hidden + column));
          const float2 weight =
              unpack2<Element>(load_vec<uint32_t>(static_cast<const Element*>(p.out_weight) + column));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float hidden = attended[n + block][j] * normaliser[j / 2] + direct[block][j] * row_scale[j / 2] +
                                 (j % 2 ? of_user.y : of_user.x);
            score[j / 2] += (j % 2 ? weight.y : weight.x) * activate(hidden, p.activation);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(score[half]) + p.out_bias;
        const int64_t place = (first_tile + tile) * kTileRows + fragment_row(half);
        if (lane_id() % 4 == 0 && place < p.candidates) {
          p.scores[user * p.candidates + place] = scored[half] ? total : -INFINITY;
        }
      }
    }
    __syncthreads();  // the stage is free for step + 2, and the candidates' tile, whose rows are in registers
    if (key_tile == 0 && tile + 1 < my_tiles) {
      gather(tile + 1);
      cp_async_commit();  // older than the next step's copies, so that the next step waits for it
    }
  }
}

// Enough stages for histories up to twice the average, within 96 KiB: what every device from sm_80 on can give a
// block. Several tiles per block only where the blocks still fill a large device a few times over.
template <int kWidth, int kHidden>
ScorePlan score_plan(const ScoreCandidates& problem) {
  using Shared = ScoreShared<kWidth, kHidden>;
  constexpr int kMost = ((96 << 10) - Shared::kCandidates) / Shared::kStage;
  constexpr int64_t kBlocks = 1024, kTiles = 8;
  static_assert(kMost >= 2);
  const int64_t wanted = ceil_div(2 * problem.num_keys, problem.users * kTileRows) + 1;
  const int64_t tiles = problem.users * ceil_div(problem.candidates, kTileRows);
  if (wanted > kMost) return {2, 1};
  return {static_cast<int>(wanted < 2 ? 2 : wanted), static_cast<int>(tiles < 2 * kBlocks        ? 1
                                                                      : tiles / kBlocks < kTiles ? tiles / kBlocks
                                                                                                 : kTiles)};
}

template <class Element, int kWidth, int kHidden>
void launch_score_candidates(const ScoreCandidates& problem, const ScorePlan* given, void* stream) {
  if (problem.users == 0 || problem.candidates == 0) return;
  const ScorePlan plan = given != nullptr ? *given : score_plan<kWidth, kHidden>(problem);
  const int64_t blocks = problem.users * ceil_div(ceil_div(problem.candidates, kTileRows), plan.tiles_per_block);
  if (blocks >= int64_t{1} << 31) throw std::invalid_argument("score_candidates: more than 2^31 tiles of candidates");
  launch(score_candidates_kernel<Element, kWidth, kHidden>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         ScoreShared<kWidth, kHidden>::bytes(plan.stages), stream, problem, plan);
}

}  // namespace grank::cuda
