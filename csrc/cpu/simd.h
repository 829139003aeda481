// The vector types of the instruction set this file is compiled for. Included by kernel sources only, inside their
// own namespace per instruction set, so that nothing compiled for one can be linked into another.
//
// Written with the compilers' vector extensions; intrinsics stand only where those have no word for the instruction.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace grank {
namespace GRANK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Units __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first `bytes` bytes at p, the rest zero. Never touches what lies behind them.
template <typename V>
inline V load_first(const void* p, int64_t bytes) {
  V v{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(V) == 64) {
    return (V)_mm512_maskz_loadu_epi8(_cvtu64_mask64(~0ull >> (64 - bytes)), p);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_maskz_loadu_epi8(_cvtu32_mask32(~0u >> (32 - bytes)), p);
  }
#endif
  __builtin_memcpy(&v, p, bytes);
  return v;
}

template <typename V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename V, typename T>
inline V broadcast(T x) {
  return x - V{};  // not V{} + x, which would turn -0.0 into 0.0
}

// a * b + c, rounded once where the instruction set can.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// One bit a lane: a >= b, false where either is NaN.
inline uint64_t at_least(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#elif defined(__SSE2__)
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpge_ps(a, b)));
#else
  const Ints passed = a >= b;
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint64_t>(passed[lane] & 1) << lane;
  return bits;
#endif
}

inline Floats float_of_bfloat16(Halves h) { return (Floats)(__builtin_convertvector(h, Units) << 16); }

inline Floats float_of_float16(Halves h) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)h);  // the plain form draws a false warning from GCC 12
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)h));
#else
  // Exponent and mantissa moved into a float's place are off by a power of two, subnormals included; the exponent of
  // infinity and NaN is then put right.
  const Units wide = __builtin_convertvector(h, Units);
  const Units magnitude = (wide & 0x7fff) << 13;
  const Floats scaled = (Floats)magnitude * broadcast<Floats>(0x1p112f);
  const Units special = (Units)(magnitude >= 0x0f800000u);
  return (Floats)(((Units)scaled & ~special) | ((magnitude | 0x7f800000u) & special) | (wide & 0x8000) << 16);
#endif
}

// ---- int8 products. A packed unit holds what one dot() takes of a row: kInt8PerUnit numbers in 32 bits. ----
#if defined(__AVX512VNNI__)
constexpr int kInt8PerUnit = 4;  // u8 (row + 128) times s8 (query); the query's accumulator starts at -128 sum(q)
inline Ints dot(Ints sum, Units row, Units query) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)query);
}
#else
constexpr int kInt8PerUnit = 2;  // s16 times s16
inline Ints dot(Ints sum, Units row, Units query) {
#if defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)row, (__m512i)query);
#elif defined(__AVX2__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)row, (__m256i)query);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)row, (__m128i)query);
#else
  return sum + ((Ints)row << 16 >> 16) * ((Ints)query << 16 >> 16) + ((Ints)row >> 16) * ((Ints)query >> 16);
#endif
}
#endif

// Writes the kLanes x kLanes matrix of units whose row i is v[i] with rows and columns exchanged.
inline void transpose(Units (&v)[kLanes]) {
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Units out[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      const Units a = v[i], b = v[i + kLanes / 2];
#if defined(__AVX512F__)
      out[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      out[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      out[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      out[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
    for (int i = 0; i < kLanes; ++i) v[i] = out[i];
  }
}

}  // namespace GRANK_ISA
}  // namespace grank
