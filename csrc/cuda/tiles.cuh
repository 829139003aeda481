// Tiles of 16-bit rows in shared memory: copy in, multiply on the tensor cores, store out.
//
// A tile holds rows of kWidth elements, divided into chunks of 16 bytes. The swizzle stores chunk c of a row at place
// c ^ s, where s is the index of the row's 128-byte line modulo the number of chunks of a row (8 at most). ldmatrix
// reads one chunk of eight consecutive rows at a time: these lie in different groups of four banks for every width from
// 16 on.
//
// A block has four warps. Warp w owns rows 16 w to 16 w + 15 of its 64 and holds their products in registers, as
// mma_m16n8k16 leaves them: sums[n][j] is row lane / 4 + 8 (j / 2), column 8 n + 2 (lane % 4) + j % 2.
#pragma once

#include "primitives.cuh"
#include "row_groups.cuh"

namespace grank::cuda {

constexpr int kThreads = 128;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_row() { return threadIdx.x / kWarp * 16; }  // the first row of this warp
__device__ __forceinline__ int fragment_row(int half) { return warp_row() + lane_id() / 4 + 8 * half; }
__device__ __forceinline__ int fragment_column(int block) { return 8 * block + 2 * (lane_id() % 4); }

template <int kWidth>
struct Tile {
  static_assert(kWidth % 16 == 0);
  static constexpr int kChunks = kWidth / 8;
  static constexpr int kRowsInLine = kChunks < 8 ? 8 / kChunks : 1;
  static constexpr int kPlaces = kChunks < 8 ? kChunks : 8;

  static constexpr __host__ __device__ int bytes(int rows) { return rows * kWidth * 2; }
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int line_chunk = chunk % kPlaces;
    return (row * kChunks + chunk - line_chunk + (line_chunk ^ (row / kRowsInLine % kPlaces))) * 16;
  }
};

// A row in global memory. If it is not valid, nothing is read and zeros are copied.
struct SourceRow {
  const void* address;
  bool valid;
};

// Starts copying kRows rows, `source(row)`, into a tile.
template <int kRows, int kWidth, class Source>
__device__ __forceinline__ void copy_rows(unsigned char* tile, Source source) {
  constexpr int kChunks = Tile<kWidth>::kChunks;
  constexpr int kRowsAtOnce = kThreads / kChunks;  // a multiple of 8: all chunks of a thread have the same swizzle
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  unsigned char* const target = tile + Tile<kWidth>::offset(first, chunk);
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsAtOnce) {
    if (kRows < kRowsAtOnce && first >= kRows) break;
    const SourceRow from = source(first + row);
    cp_async_16(target + Tile<kWidth>::bytes(row), static_cast<const unsigned char*>(from.address) + 16 * chunk,
                from.valid);
  }
}

// The same for the first `valid` of rows that lie `stride` elements apart.
template <int kRows, int kWidth, class Element>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const Element* rows, int64_t stride, int valid) {
  copy_rows<kRows, kWidth>(tile, [=](int row) { return SourceRow{rows + row * stride, row < valid}; });
}

// The 16 rows of this warp and columns 16 step to 16 step + 15, as the left operand.
template <int kWidth>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const unsigned char* tile, int step) {
  ldmatrix_x4(a, tile + Tile<kWidth>::offset(warp_row() + lane_id() % 16, 2 * step + lane_id() / 16));
}

// Two neighbouring blocks of eight columns, from the four registers of one ldmatrix.
template <class Element>
__device__ __forceinline__ void multiply_pair(float (&first)[4], float (&second)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[4]) {
  const uint32_t b_first[2] = {b[0], b[1]}, b_second[2] = {b[2], b[3]};
  mma_m16n8k16<Element>(first, a, b_first);
  mma_m16n8k16<Element>(second, a, b_second);
}

// sums (16, 8 kBlocks) += a (16, 16) times the transpose of rows [row, row + 8 kBlocks), columns from 16 step on.
template <class Element, int kWidth, int kBlocks>
__device__ __forceinline__ void multiply_rows(float (&sums)[kBlocks][4], const uint32_t (&a)[4],
                                              const unsigned char* tile, int step, int row = 0) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kBlocks; n += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, tile + Tile<kWidth>::offset(row + 8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    multiply_pair<Element>(sums[n], sums[n + 1], a, b);
  }
}

// sums (16, 8 kBlocks) += a (16, 16) times rows [row, row + 16), columns from 8 block on.
template <class Element, int kWidth, int kBlocks>
__device__ __forceinline__ void multiply_columns(float (&sums)[kBlocks][4], const uint32_t (&a)[4],
                                                 const unsigned char* tile, int row, int block = 0) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kBlocks; n += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, tile + Tile<kWidth>::offset(row + lane % 16, block + n + lane / 16));
    multiply_pair<Element>(sums[n], sums[n + 1], a, b);
  }
}

// Columns 16 step to 16 step + 15 of a product, rounded, as the left operand of the next one.
template <class Element, int kBlocks>
__device__ __forceinline__ void round_left(uint32_t (&a)[4], const float (&sums)[kBlocks][4], int step) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float (&block)[4] = sums[2 * step + j / 2];
    a[j] = pack2<Element>(block[j % 2 * 2], block[j % 2 * 2 + 1]);
  }
}

// Adds over the four lanes that share a row.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}

// Writes factor[row] * sums, rounded, to the first `extent` of rows `stride` elements apart; rows at and beyond `count`
// become zeros. `tile` is a tile whose rows of this warp no other warp reads: through it every access to global memory
// is 16 bytes a lane, side by side.
template <class Element, int kWidth>
__device__ __forceinline__ void store_rows(unsigned char* tile, const float (&sums)[kWidth / 8][4],
                                           const float (&factor)[2], Element* rows, int64_t stride, int extent,
                                           int count) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row(half);
      store_vec<uint32_t>(tile + Tile<kWidth>::offset(row, n) + lane_id() % 4 * 4,
                          pack2<Element>(sums[n][2 * half] * factor[half], sums[n][2 * half + 1] * factor[half]));
    }
  }
  __syncwarp();
  constexpr int kChunks = Tile<kWidth>::kChunks;
#pragma unroll
  for (int i = lane_id(); i < 16 * kChunks; i += kWarp) {
    const int row = warp_row() + i / kChunks, chunk = i % kChunks;
    if (row < extent) {
      const uint4 zeros = {0, 0, 0, 0};
      store_vec<uint4>(rows + row * stride + 8 * chunk,
                       row < count ? load_vec<uint4>(tile + Tile<kWidth>::offset(row, chunk)) : zeros);
    }
  }
}

}  // namespace grank::cuda
