// CUDA's language and the primitives of csrc/cuda/primitives.cuh on the emulator. Included by that file alone, which
// says what each primitive does. Functions here must be inlined, so that the emulator sees from which line of a kernel
// it is called.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "half.h"

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::grank::emulation::thread_index())
#define blockIdx (::grank::emulation::block_index())
#define blockDim (::grank::emulation::block_size())
#define gridDim (::grank::emulation::grid_size())

#define GRANK_DYNAMIC_SHARED(name) unsigned char* const name = ::grank::emulation::dynamic_shared()

#define GRANK_VECTOR_TYPES(scalar, name)                               \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };   \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
GRANK_VECTOR_TYPES(float, float)
GRANK_VECTOR_TYPES(int, int)
GRANK_VECTOR_TYPES(unsigned, uint)
#undef GRANK_VECTOR_TYPES

using std::max;
using std::min;

__forceinline__ void __syncthreads() { grank::emulation::sync_threads(); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { grank::emulation::sync_warp(mask); }

namespace grank::emulation {

template <class T>
__forceinline__ T shuffle_as(Op op, unsigned mask, T value, int argument) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the built-in takes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return __builtin_bit_cast(T, static_cast<Bits>(shuffle(op, mask, __builtin_bit_cast(Bits, value), argument)));
}

// All fibers run on one thread, so that a read followed by a write is atomic.
template <class T, class Change>
__forceinline__ T read_modify_write(T* address, Change change) {
  atomic(address, sizeof(T));
  T old;
  copy_unseen(&old, address, sizeof(T));
  const T changed = change(old);
  copy_unseen(address, &changed, sizeof(T));
  return old;
}

}  // namespace grank::emulation

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source_lane) {
  return grank::emulation::shuffle_as(grank::emulation::Op::kShuffle, mask, value, source_lane);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return grank::emulation::shuffle_as(grank::emulation::Op::kShuffleXor, mask, value, lane_mask);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return grank::emulation::vote(grank::emulation::Op::kBallot, mask, predicate != 0);
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return grank::emulation::vote(grank::emulation::Op::kAny, mask, predicate != 0) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return grank::emulation::vote(grank::emulation::Op::kAll, mask, predicate != 0) == mask;
}
template <class T>
__forceinline__ T atomicAdd(T* address, T value) {
  return grank::emulation::read_modify_write(address, [value](T old) { return old + value; });
}
template <class T>
__forceinline__ T atomicMax(T* address, T value) {
  return grank::emulation::read_modify_write(address, [value](T old) { return std::max(old, value); });
}

// ---- the primitives ----

namespace grank::cuda {

template <class Vec>
__forceinline__ Vec load_vec(const void* address) {
  Vec value;
  emulation::load(&value, address, sizeof(Vec));
  return value;
}
template <class Vec>
__forceinline__ void store_vec(void* address, Vec value) {
  emulation::store(address, &value, sizeof(Vec));
}

__forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::cp_async_16(shared, global, valid);
}
__forceinline__ void cp_async_commit() { emulation::cp_async_commit(); }
template <int kPending>
__forceinline__ void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::ldmatrix_x4(emulation::Op::kLdmatrix, r, row);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulation::ldmatrix_x4(emulation::Op::kLdmatrixTrans, r, row);
}
template <class Element>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Element, float16> || std::is_same_v<Element, bfloat16>);
  constexpr bool kIsFloat16 = std::is_same_v<Element, float16>;
  emulation::mma_m16n8k16(kIsFloat16 ? emulation::Op::kMmaF16 : emulation::Op::kMmaBf16, d, a, b);
}

__forceinline__ float exp2_approx(float x) { return emulation::exp2_approx(x); }
__forceinline__ float log2_approx(float x) { return emulation::log2_approx(x); }
__forceinline__ float rcp_approx(float x) { return emulation::rcp_approx(x); }

__forceinline__ float to_float(float value) { return value; }
__forceinline__ float to_float(float16 value) { return emulation::float_of_half(value.bits); }
__forceinline__ float to_float(bfloat16 value) { return emulation::float_of_bfloat16(value.bits); }
template <class Element>
__forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else if constexpr (std::is_same_v<Element, float16>) {
    return {emulation::half_of_float(value)};
  } else {
    return {emulation::bfloat16_of_float(value)};
  }
}
template <class Element>
__forceinline__ uint32_t pack2(float low, float high) {
  return from_float<Element>(low).bits | static_cast<uint32_t>(from_float<Element>(high).bits) << 16;
}
template <class Element>
__forceinline__ float2 unpack2(uint32_t pair) {
  return {to_float(Element{static_cast<uint16_t>(pair)}), to_float(Element{static_cast<uint16_t>(pair >> 16)})};
}
template <class Element>
__forceinline__ void unpack_int8(uint32_t bytes, uint32_t& first, uint32_t& second) {
  const auto value = [bytes](int i) { return static_cast<float>(static_cast<int8_t>(bytes >> 8 * i)); };
  first = pack2<Element>(value(0), value(1));
  second = pack2<Element>(value(2), value(3));
}

// Arguments live on the host's stack, which no kernel may read: copying them is not instrumented.
#define GRANK_NOT_INSTRUMENTED __attribute__((no_sanitize("thread")))
template <class... Parameters, class... Arguments>
GRANK_NOT_INSTRUMENTED void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                                   const Arguments&... arguments) {
#if defined(__SANITIZE_THREAD__)
  constexpr bool kInstrumented = true;
#else
  constexpr bool kInstrumented = false;
#endif
  const auto body = [&]() GRANK_NOT_INSTRUMENTED { kernel(arguments...); };
  emulation::run(
      grid, block, shared_bytes, kInstrumented,
      [](const void* context) GRANK_NOT_INSTRUMENTED { (*static_cast<decltype(&body)>(context))(); }, &body);
}
#undef GRANK_NOT_INSTRUMENTED

}  // namespace grank::cuda
