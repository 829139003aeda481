// Kernels that do one primitive each, so that tests can state what it does.
#include "primitives.cuh"

namespace grank::cuda {

namespace {

// Registers of a lane stand side by side: a (32, 4), b (32, 2), d (32, 4).
template <class Element>
__global__ void probe_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) rd[i] = d[4 * lane + i];
  mma_m16n8k16<Element>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = rd[i];
}

// 32 rows of 16 bytes in shared memory; lane i passes the address of row rows[i]. out (32, 4).
__global__ void probe_ldmatrix(const uint32_t* x, const int* rows, uint32_t* out, bool transposed) {
  GRANK_DYNAMIC_SHARED(raw);
  const int lane = threadIdx.x;
  store_vec(raw + 16 * lane, load_vec<uint4>(x + 4 * lane));
  __syncthreads();
  uint32_t r[4];
  if (transposed) {
    ldmatrix_x4_trans(r, raw + 16 * rows[lane]);
  } else {
    ldmatrix_x4(r, raw + 16 * rows[lane]);
  }
  store_vec(out + 4 * lane, make_uint4(r[0], r[1], r[2], r[3]));
}

// source (32,), others (2, 32): __shfl_sync, __shfl_xor_sync of 64 bits; votes (3, 32): ballot, any, all.
__global__ void probe_warp(const int* x, const int* source, int64_t* others, unsigned* votes, int lane_mask) {
  const int lane = threadIdx.x;
  others[lane] = __shfl_sync(kFullMask, x[lane], source[lane]);
  others[kWarp + lane] = __shfl_xor_sync(kFullMask, int64_t{x[lane]} << 32, lane_mask);
  votes[lane] = __ballot_sync(kFullMask, x[lane] & 1);
  votes[kWarp + lane] = __any_sync(kFullMask, x[lane] & 2);
  votes[2 * kWarp + lane] = __all_sync(kFullMask, x[lane] & 4);
}

// out (3, n)
__global__ void probe_approximations(const float* x, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = exp2_approx(x[i]);
    out[n + i] = log2_approx(x[i]);
    out[2 * n + i] = rcp_approx(x[i]);
  }
}

// Floats to Element and back, one by one and in pairs: singles (n,), pairs (n,), back (2, n).
template <class Element>
__global__ void probe_conversions(const float* x, Element* singles, uint32_t* pairs, float* back, int n) {
  for (int i = 2 * threadIdx.x; i < n; i += 2 * blockDim.x) {
    for (int j = 0; j < 2; ++j) {
      singles[i + j] = from_float<Element>(x[i + j]);
      back[i + j] = to_float(singles[i + j]);
    }
    pairs[i / 2] = pack2<Element>(x[i], x[i + 1]);
    store_vec(back + n + i, unpack2<Element>(pairs[i / 2]));
  }
}

// Four bytes a thread.
template <class Element>
__global__ void probe_unpack_int8(const uint32_t* x, uint32_t* out) {
  const int i = threadIdx.x;
  unpack_int8<Element>(x[i], out[2 * i], out[2 * i + 1]);
}

}  // namespace

#define GRANK_ENTRY extern "C" __attribute__((visibility("default"))) void

#define GRANK_ENTRIES(Element)                                                                                         \
  GRANK_ENTRY probe_mma_##Element(const uint32_t* a, const uint32_t* b, float* d) {                                    \
    launch(probe_mma<Element>, 1, kWarp, 0, nullptr, a, b, d);                                                         \
  }                                                                                                                    \
  GRANK_ENTRY probe_conversions_##Element(const float* x, Element* singles, uint32_t* pairs, float* back, int64_t n) { \
    launch(probe_conversions<Element>, 1, 256, 0, nullptr, x, singles, pairs, back, static_cast<int>(n));              \
  }                                                                                                                    \
  GRANK_ENTRY probe_unpack_int8_##Element(const uint32_t* x, uint32_t* out) {                                          \
    launch(probe_unpack_int8<Element>, 1, 64, 0, nullptr, x, out);                                                     \
  }
GRANK_ENTRIES(float16)
GRANK_ENTRIES(bfloat16)

GRANK_ENTRY probe_ldmatrix_x4(const uint32_t* x, const int* rows, uint32_t* out, int64_t transposed) {
  launch(probe_ldmatrix, 1, kWarp, kWarp * 16, nullptr, x, rows, out, transposed != 0);
}
GRANK_ENTRY probe_warp_operations(const int* x, const int* source, int64_t* others, unsigned* votes,
                                  int64_t lane_mask) {
  launch(probe_warp, 1, kWarp, 0, nullptr, x, source, others, votes, static_cast<int>(lane_mask));
}
GRANK_ENTRY probe_approximate_functions(const float* x, float* out, int64_t n) {
  launch(probe_approximations, 1, kWarp, 0, nullptr, x, out, static_cast<int>(n));
}

}  // namespace grank::cuda
