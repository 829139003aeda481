// All of CUDA that the kernels use beside the language: instructions without a C++ form, element types, vector
// accesses, dynamic shared memory and the launch. This is the only file with inline PTX and the only one that includes
// CUDA's headers. With GRANK_EMULATE_CUDA the same names come from tests/emulation/cuda/, and kernels run on the CPU,
// one fiber per thread.
//
// Rules for kernels, so that the emulator observes every access:
//   - shared memory only through GRANK_DYNAMIC_SHARED, vector accesses only through load_vec and store_vec;
//   - of CUDA's built-ins: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync,
//     __shfl_xor_sync, __ballot_sync, __any_sync, __all_sync, atomicAdd, atomicMax, and float2/4, int2/4, uint2/4;
//   - pointers to float16 and bfloat16 are not dereferenced for arithmetic: to_float, from_float, pack2, unpack2.
//
// Fragments of mma_m16n8k16, D (16, 8) += A (16, 16) B (16, 8), with g = lane / 4 and t = lane % 4. A register of A or
// B holds two elements that are neighbours along k, the smaller k in the low half:
//   a[0], a[1]   rows g and g + 8, k = 2t, 2t + 1
//   a[2], a[3]   rows g and g + 8, k = 2t + 8, 2t + 9
//   b[0], b[1]   column g, k = 2t, 2t + 1 and k = 2t + 8, 2t + 9
//   d[0], d[1]   row g, columns 2t, 2t + 1
//   d[2], d[3]   row g + 8, columns 2t, 2t + 1
// So d of one product, packed in pairs, is one half of A of the next product.
//
// ldmatrix_x4 reads four 8 x 8 matrices of 16-bit elements from shared memory. Row r of matrix j is 16 bytes at the
// address that lane 8 j + r passes; register j of a lane gets row lane / 4, columns 2t, 2t + 1, of matrix j. The _trans
// form transposes each matrix: column lane / 4, rows 2t, 2t + 1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grank::cuda {

// Storage types without arithmetic, the same for nvcc and the emulator.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;  // all lanes, for the _sync built-ins

}  // namespace grank::cuda

#if defined(GRANK_EMULATE_CUDA)
#include "emulated_primitives.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

// Aligned to 128 bytes, the period of the banks: a swizzle may count from the start.
#define GRANK_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace grank::cuda {

// ---- memory ----

// One access of sizeof(Vec) bytes, 4 to 16, at an address that is a multiple of it.
template <class Vec>
__device__ __forceinline__ Vec load_vec(const void* address) {
  return *static_cast<const Vec*>(address);
}
template <class Vec>
__device__ __forceinline__ void store_vec(void* address, Vec value) {
  *static_cast<Vec*>(address) = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes, bypassing registers and L1. If not valid, reads nothing and writes zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of this thread's copies issued so far.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread except the latest kPending. Other threads see the bytes after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores ----

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, float16> || std::is_same_v<Element, bfloat16>);
  if constexpr (std::is_same_v<Element, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// ---- approximate functions of one instruction; denormal inputs and results count as zero ----

// Relative error 2^-22 at most; 0 at -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Error 2^-22 at most: absolute between 0.5 and 2, relative outside.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Relative error 2^-23 at most.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- conversions, all rounding to nearest even ----

// Two elements in one register, the first in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<Element, float16> || std::is_same_v<Element, bfloat16>);
  uint32_t pair;
  if constexpr (std::is_same_v<Element, float16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}
template <class Element>
__device__ __forceinline__ float2 unpack2(uint32_t pair) {
  static_assert(std::is_same_v<Element, float16> || std::is_same_v<Element, bfloat16>);
  float2 values;
  if constexpr (std::is_same_v<Element, float16>) {
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(pair));
  } else {
    values.x = __uint_as_float(pair << 16);
    values.y = __uint_as_float(pair & 0xffff0000u);
  }
  return values;
}

__device__ __forceinline__ float to_float(float value) { return value; }
template <class Element>
__device__ __forceinline__ float to_float(Element value) {
  return unpack2<Element>(value.bits).x;
}
template <class Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    return Element{static_cast<uint16_t>(pack2<Element>(value, 0.0f))};
  }
}

// Converts four int8 of a register to two registers of two elements each, in order. Exact: each byte plus 128 becomes
// the mantissa of a number whose unit is 1, and the offset is subtracted.
template <class Element>
__device__ __forceinline__ void unpack_int8(uint32_t bytes, uint32_t& first, uint32_t& second) {
  static_assert(std::is_same_v<Element, float16> || std::is_same_v<Element, bfloat16>);
  const uint32_t biased = bytes ^ 0x80808080u;
  if constexpr (std::is_same_v<Element, float16>) {
    constexpr uint32_t kOffset = 0x64806480u;  // 1024 + 128, twice
    asm("sub.f16x2 %0, %1, %2;" : "=r"(first) : "r"(__byte_perm(biased, 0x64646464u, 0x4140)), "r"(kOffset));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(second) : "r"(__byte_perm(biased, 0x64646464u, 0x4342)), "r"(kOffset));
  } else {
    constexpr float kOffset = 8388608.0f + 128.0f;
    const auto value = [biased](unsigned byte) {
      return __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u | byte)) - kOffset;
    };
    first = pack2<bfloat16>(value(0), value(1));
    second = pack2<bfloat16>(value(2), value(3));
  }
}

// ---- launch ----

// The stream is a cudaStream_t. Throws std::runtime_error with CUDA's message. Does not synchronise, so a graph can
// capture it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(error));
  };
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace grank::cuda

#endif  // GRANK_EMULATE_CUDA
