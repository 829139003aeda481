// Small kernels that are right with Bug::kNone and wrong in one way otherwise: what the emulator must find.
#include "primitives.cuh"

namespace grank::cuda {

namespace {

enum class Bug : int64_t {
  kNone = 0,
  kNoBarrierAfterCopy,
  kNoBarrierBeforePrefetch,
  kWaitForTooFewGroups,
  kNotWaitedFor,
  kReadPastBuffer,
  kWritePastBuffer,
  kReadPastShared,
  kReadUnwrittenShared,
  kReadUnwrittenOutput,
  kMisalignedVector,
  kMisalignedCopy,
  kBlocksWithoutAtomic,
  kNoWarpBarrier,
  kBarrierInBranch,
  kCallerNotInMask,
  kSourceNotInMask,
  kMaskNamesOthers,
  kMatrixFromGlobal,
  kTooMuchShared,
  kNoBarrierAfterReads,
  kWarpBarrierForBlock,
  kReadFromOtherBlocks,
  kBarrierBeforeWait,
  kReadAcrossTheEnd,
  kDifferentOperations,
  kWarpBarrierAfterCopy,
};

constexpr int kThreads = 128;
constexpr int kTile = 4 * kThreads;  // floats, 16 bytes a thread

// out[i] = sum over tiles of x[tile][kTile - 1 - i] in groups of 4: every thread reads what another thread copied.
__global__ void sum_reversed_tiles(const float* x, float* out, int tiles, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  float* const stage = reinterpret_cast<float*>(raw);
  const int thread = threadIdx.x;
  const auto prefetch = [&](int tile) {
    cp_async_16(stage + tile % 2 * kTile + 4 * thread, x + tile * kTile + 4 * thread, true);
    cp_async_commit();
  };
  float4 sum{};
  prefetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    const bool more = tile + 1 < tiles;
    if (more) prefetch(tile + 1);
    if (bug == Bug::kBarrierBeforeWait) __syncthreads();
    if (more && bug == Bug::kWaitForTooFewGroups) {
      cp_async_wait<2>();
    } else if (more) {
      cp_async_wait<1>();
    } else if (bug != Bug::kNotWaitedFor) {
      cp_async_wait<0>();
    }
    if (bug == Bug::kWarpBarrierAfterCopy) {
      __syncwarp();
    } else if (bug != Bug::kNoBarrierAfterCopy && bug != Bug::kBarrierBeforeWait) {
      __syncthreads();
    }
    const float4 other = load_vec<float4>(stage + tile % 2 * kTile + 4 * (kThreads - 1 - thread));
    sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
    if (bug != Bug::kNoBarrierBeforePrefetch) __syncthreads();
  }
  store_vec(out + 4 * thread, sum);
}

// out[i] = x[i] for i < n, by way of shared memory.
__global__ void copy(const float* x, float* out, int n, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  float* const shared = reinterpret_cast<float*>(raw);
  const int i = threadIdx.x;
  if (bug != Bug::kReadUnwrittenShared || i % 2 == 0) shared[i] = i < n + (bug == Bug::kReadPastBuffer) ? x[i] : 0.0f;
  const float value = shared[i + (bug == Bug::kReadPastShared)];
  if (bug == Bug::kReadUnwrittenOutput && i < n) out[i] += value;
  if (i < n + (bug == Bug::kWritePastBuffer)) out[i] = value;
}

// out[4 i + j] = x[4 i + j].
__global__ void copy_vectors(const float* x, float* out, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  const int i = 4 * threadIdx.x;
  float* const mine = reinterpret_cast<float*>(raw) + i;
  const bool valid = threadIdx.x + 1 < blockDim.x || bug == Bug::kReadAcrossTheEnd;
  cp_async_16(mine, x + i + (bug == Bug::kMisalignedCopy), valid);
  cp_async_commit();
  cp_async_wait<0>();
  store_vec(out + i, load_vec<float4>(mine));
  if (threadIdx.x + 1 == blockDim.x) return;
  store_vec(out + i, load_vec<float4>(x + i + (bug == Bug::kMisalignedVector)));
}

// *out = the largest x.
__global__ void maximum(const int* x, int* out, Bug bug) {
  int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(kFullMask, value, lanes));
  if (threadIdx.x != 0) return;
  if (bug == Bug::kBlocksWithoutAtomic) {
    *out = max(*out, value);
  } else {
    atomicMax(out, value);
  }
}

// out[i] += x[i + 1], one block for each, and the last one x[0].
__global__ void add_next(const int* x, int* out, Bug bug) {
  const int next = (bug == Bug::kReadFromOtherBlocks ? out : x)[(blockIdx.x + 1) % gridDim.x];
  const int sum = out[blockIdx.x] + next;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out[i] = the sum of x over `rounds`: thread 0 hands round after round to all others.
__global__ void broadcast(const int* x, int* out, int rounds, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  int* const shared = reinterpret_cast<int*>(raw);
  const auto barrier = [](bool of_block) {
    if (of_block) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };
  const bool many_warps = blockDim.x > kWarp;
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) *shared = x[round];
    barrier(many_warps);
    sum += *shared;
    if (bug != Bug::kNoBarrierAfterReads) barrier(many_warps && bug != Bug::kWarpBarrierForBlock);
  }
  out[threadIdx.x] = sum;
}

// out[i] = x[i ^ 1], by way of shared memory, every second lane of a warp.
__global__ void swap_within_warp(const float* x, float* out, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  float* const shared = reinterpret_cast<float*>(raw);
  const int i = threadIdx.x;
  constexpr unsigned kEven = 0x55555555u;
  shared[i] = x[i];
  if (bug != Bug::kNoWarpBarrier) __syncwarp();
  float value = shared[i ^ 1];
  if (bug == Bug::kCallerNotInMask || i % 2 == 0) {  // of no effect where it is right
    value = __shfl_sync(kEven, value, i ^ (bug == Bug::kSourceNotInMask));
  }
  if (bug == Bug::kDifferentOperations) i % 2 == 0 ? __any_sync(kFullMask, 1) : __all_sync(kFullMask, 1);
  if (bug == Bug::kMaskNamesOthers && i % 2 == 0) __ballot_sync(kFullMask, 1);
  out[i] = value;
  if (bug != Bug::kBarrierInBranch || i < 16) __syncthreads();
}

// Rows of 64 elements, 128 bytes; out[row] = element 0 of each row.
__global__ void first_column(const uint32_t* x, uint32_t* out, bool swizzled, Bug bug) {
  GRANK_DYNAMIC_SHARED(raw);
  const int row = threadIdx.x;
  const auto chunk = [&](int i) { return raw + row * 128 + 16 * (swizzled ? i ^ row % 8 : i); };
  for (int i = 0; i < 8; ++i) cp_async_16(chunk(i), x + row * 32 + 4 * i, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, bug == Bug::kMatrixFromGlobal ? reinterpret_cast<const unsigned char*>(x + row * 32) : chunk(0));
  for (int matrix = 0; matrix < 4; ++matrix) {
    if (row % 4 == 0) out[8 * matrix + row / 4] = r[matrix];
  }
}

// out[i] = x[stride i].
__global__ void gather(const float* x, float* out, int stride) { out[threadIdx.x] = x[threadIdx.x * stride]; }

// out[i] = x[i], written to shared memory at stride * i.
__global__ void spread(const float* x, float* out, int stride) {
  GRANK_DYNAMIC_SHARED(raw);
  float* const shared = reinterpret_cast<float*>(raw);
  shared[threadIdx.x * stride] = x[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x * stride];
}

}  // namespace

#define GRANK_ENTRY extern "C" __attribute__((visibility("default"))) void

GRANK_ENTRY planted_sum_reversed_tiles(const float* x, float* out, int64_t tiles, int64_t bug) {
  launch(sum_reversed_tiles, 1, kThreads, 2 * kTile * sizeof(float), nullptr, x, out, static_cast<int>(tiles),
         Bug{bug});
}
GRANK_ENTRY planted_copy(const float* x, float* out, int64_t n, int64_t bug) {
  const size_t bytes = Bug{bug} == Bug::kTooMuchShared ? 200 << 10 : kThreads * sizeof(float);
  launch(copy, 1, kThreads, bytes, nullptr, x, out, static_cast<int>(n), Bug{bug});
}
GRANK_ENTRY planted_copy_vectors(const float* x, float* out, int64_t bug) {
  launch(copy_vectors, 1, kThreads, kThreads * sizeof(float4), nullptr, x, out, Bug{bug});
}
GRANK_ENTRY planted_maximum(const int* x, int* out, int64_t blocks, int64_t bug) {
  launch(maximum, static_cast<unsigned>(blocks), kWarp, 0, nullptr, x, out, Bug{bug});
}
GRANK_ENTRY planted_add_next(const int* x, int* out, int64_t blocks, int64_t bug) {
  launch(add_next, static_cast<unsigned>(blocks), 2, 0, nullptr, x, out, Bug{bug});
}
GRANK_ENTRY planted_broadcast(const int* x, int* out, int64_t rounds, int64_t threads, int64_t bug) {
  launch(broadcast, 1, static_cast<unsigned>(threads), sizeof(int), nullptr, x, out, static_cast<int>(rounds),
         Bug{bug});
}
GRANK_ENTRY planted_swap_within_warp(const float* x, float* out, int64_t bug) {
  launch(swap_within_warp, 1, kThreads, kThreads * sizeof(float), nullptr, x, out, Bug{bug});
}
GRANK_ENTRY planted_first_column(const uint32_t* x, uint32_t* out, int64_t swizzled, int64_t bug) {
  launch(first_column, 1, kWarp, kWarp * 128, nullptr, x, out, swizzled != 0, Bug{bug});
}
GRANK_ENTRY planted_gather(const float* x, float* out, int64_t stride) {
  launch(gather, 1, kWarp, 0, nullptr, x, out, static_cast<int>(stride));
}
GRANK_ENTRY planted_spread(const float* x, float* out, int64_t stride) {
  launch(spread, 1, kWarp, kWarp * sizeof(float) * stride, nullptr, x, out, static_cast<int>(stride));
}

}  // namespace grank::cuda
