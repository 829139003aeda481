// Vector types and operations of the instruction set of this compilation. Included by kernel sources only; one
// namespace per instruction set, so that the linker cannot merge inline functions of different ones.
//
// Written with the compilers' vector extensions; intrinsics only for instructions that these cannot express.
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
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

constexpr float kLog2E = 0x1.715476p0f;  // log2(e)

template <typename V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first `bytes` bytes at p, zero padded. Does not read past them.
template <typename V>
inline V load_first(const void* p, int64_t bytes) {
  V v{};
  __builtin_memcpy(&v, p, bytes);
  return v;
}

template <typename V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename V, typename T>
inline V broadcast(T x) {
  return x - V{};  // V{} + x would turn -0.0 into 0.0
}

// a * b + c, rounded once on instruction sets with FMA.
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

// The larger of a and b; if one is NaN, the other.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_range_ps(a, b, 0x5);
#else
  const Ints take = (a > b) | (b != b);
  return (Floats)(((Ints)a & take) | ((Ints)b & ~take));
#endif
}

// Bit i: a[i] >= b[i]; 0 if either is NaN.
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

// v in the lanes where `where` is all ones, 0 elsewhere.
inline Floats only(Ints where, Floats v) { return (Floats)((Ints)v & where); }

// Whether any lane is set.
inline bool any(Ints where) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)where) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)where) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)where) != 0;
#else
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= where[lane];
  return all != 0;
#endif
}

// The smaller of x and `most`; NaN stays.
inline Floats at_most(Floats x, float most) {
  const Ints above = x > most;
  return (Floats)(((Ints)broadcast<Floats>(most) & above) | ((Ints)x & ~above));
}

// 2^x for x < 127; 0 for x < -125, so that no result is subnormal; NaN for NaN; 1 for 0. The same bits for every
// instruction set with FMA. Relative error below 1.8e-7: 9.2e-8 of the polynomial, a fit of 2^r on [-1/2, 1/2], and its
// rounding.
inline Floats exp2(Floats x) {
  constexpr float kCoefficients[] = {
      1, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
#if defined(__AVX512F__)
  const Floats r = _mm512_maskz_reduce_ps(0xffff, x, 0);  // x minus the nearest integer, ties to even
#else
  const Floats shifted = x + 0x1.8p23f;  // that integer in the lowest bits
  const Floats r = x - (shifted - 0x1.8p23f);
#endif
  Floats p = broadcast<Floats>(kCoefficients[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = multiply_add(r, p, broadcast<Floats>(kCoefficients[i]));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast<Floats>(-125.0f), _CMP_NLT_UQ), p, x - r);
#else
  return only(~(x < -125.0f), (Floats)((Units)p + ((Units)shifted << 23)));
#endif
}

// max(x, -2^20), where silu and its gradient are 0 in float32; silu() divides by at most 2^126, too little for -inf.
inline Floats at_least_minus_far(Floats x) { return -at_most(-x, 0x1p20f); }

// x / (1 + exp(-x))
inline Floats silu(Floats x) {
  x = at_least_minus_far(x);
  return x / (1.0f + exp2(at_most(x * -kLog2E, 126.0f)));
}

// erfc(x) for x >= 0, absolute error <= 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Floats erfc_of_positive(Floats x) {
  const Floats t = 1.0f / multiply_add(x, broadcast<Floats>(0.3275911f), broadcast<Floats>(1.0f));
  Floats p = multiply_add(t, broadcast<Floats>(1.061405429f), broadcast<Floats>(-1.453152027f));
  p = multiply_add(t, p, broadcast<Floats>(1.421413741f));
  p = multiply_add(t, p, broadcast<Floats>(-0.284496736f));
  p = multiply_add(t, p, broadcast<Floats>(0.254829592f));
  return t * p * exp2(x * x * -kLog2E);
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

// ---- and back, to nearest, ties to even ----

inline Halves bfloat16_of_float(Floats x) {
  const Units bits = (Units)x;
  const Units rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Units nan = (Units)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40u) & nan), Halves);
}

inline Halves float16_of_float(Floats x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Halves)vreinterpret_u16_f16(vcvt_f16_f32(x));
#else
  const Units bits = (Units)x, magnitude = bits & 0x7fffffffu;
  const Units normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const Units small = (Units)((Floats)magnitude + 0.5f) - 0x3f000000u;  // 0.5f's last bit is worth the least float16
  const Units is_small = (Units)(magnitude < 0x38800000u), is_large = (Units)(magnitude >= 0x477ff000u);
  const Units is_nan = (Units)(magnitude > 0x7f800000u);
  const Units rounded =
      (small & is_small) | (normal & ~is_small & ~is_large) | (0x7c00u & is_large) | (0x200u & is_nan);
  return __builtin_convertvector(rounded | (bits >> 16 & 0x8000u), Halves);
#endif
}

// ---- int8 products; a packed 32-bit unit holds kInt8PerUnit numbers of a row, the operand of one dot() ----
#if defined(__AVX512VNNI__)
constexpr int kInt8PerUnit = 4;  // u8 (row + 128) x s8 (query), compensated by -128 sum(q) in the accumulator
inline Ints dot(Ints sum, Units row, Units query) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)query);
}
#else
constexpr int kInt8PerUnit = 2;  // s16 x s16
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

// ---- transposition of strided or gathered rows ----

typedef uint32_t Piece __attribute__((vector_size(16)));
constexpr int kPieces = kLanes / 4;  // 16-byte pieces in a register

// `v` with 16-byte piece `g` replaced; `g` is a constant after the caller's loop is unrolled.
[[gnu::always_inline]] inline Units put_piece(Units v, Piece piece, int g) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)v;
  const __m128i y = (__m128i)piece;
  switch (g) {
    case 0:
      return (Units)_mm512_inserti32x4(x, y, 0);
    case 1:
      return (Units)_mm512_inserti32x4(x, y, 1);
    case 2:
      return (Units)_mm512_inserti32x4(x, y, 2);
    default:
      return (Units)_mm512_inserti32x4(x, y, 3);
  }
#elif defined(__AVX2__)
  const __m256i x = (__m256i)v;
  return (Units)(g == 0 ? _mm256_inserti128_si256(x, (__m128i)piece, 0)
                        : _mm256_inserti128_si256(x, (__m128i)piece, 1));
#else
  (void)v, (void)g;
  return piece;
#endif
}

// Interleaves, in each 16-byte piece, the elements of kBytes bytes of the lower or upper halves of a and b.
template <int kBytes, bool kUpper>
inline Units interleave(Units a, Units b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = (__m512i)b;
  if constexpr (kBytes == 4) return (Units)(kUpper ? _mm512_unpackhi_epi32(x, y) : _mm512_unpacklo_epi32(x, y));
  return (Units)(kUpper ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = (__m256i)b;
  if constexpr (kBytes == 4) return (Units)(kUpper ? _mm256_unpackhi_epi32(x, y) : _mm256_unpacklo_epi32(x, y));
  return (Units)(kUpper ? _mm256_unpackhi_epi16(x, y) : _mm256_unpacklo_epi16(x, y));
#elif defined(__SSE2__)
  const __m128i x = (__m128i)a, y = (__m128i)b;
  if constexpr (kBytes == 4) return (Units)(kUpper ? _mm_unpackhi_epi32(x, y) : _mm_unpacklo_epi32(x, y));
  return (Units)(kUpper ? _mm_unpackhi_epi16(x, y) : _mm_unpacklo_epi16(x, y));
#else
  constexpr int k = kUpper ? 8 / kBytes : 0;
  if constexpr (kBytes == 4) return __builtin_shufflevector(a, b, k, k + 4, k + 1, k + 5);
  return (Units)__builtin_shufflevector((Shorts)a, (Shorts)b, k, k + 8, k + 1, k + 9, k + 2, k + 10, k + 3, k + 11);
#endif
}

// Transposes the square of elements in each 16-byte piece: element j of v[i] becomes element i of v[j].
template <int kBytes>
[[gnu::always_inline]] inline void transpose_pieces(Units (&v)[16 / kBytes]) {
  constexpr int kSize = 16 / kBytes;
#pragma GCC unroll 3  // all loops: else v becomes an array in memory
  for (int stage = 1; stage < kSize; stage *= 2) {
    Units out[kSize];
#pragma GCC unroll 4
    for (int i = 0; i < kSize / 2; ++i) {
      out[2 * i] = interleave<kBytes, false>(v[i], v[i + kSize / 2]);
      out[2 * i + 1] = interleave<kBytes, true>(v[i], v[i + kSize / 2]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) v[i] = out[i];
  }
}

// Loads 16 bytes (kWhole) or the first `bytes` bytes of each row, transposed: element i of columns[j] is element j of
// row i. Elements of kBytes bytes: 4, kLanes rows, or 2, 2 kLanes rows. Row i is at first + (kListed ? list[i] : i) *
// stride.
template <int kBytes, bool kListed, bool kWhole>
[[gnu::always_inline]] inline void load_columns(const char* first, int64_t stride, const uint32_t* list, int64_t bytes,
                                                Units (&columns)[16 / kBytes]) {
  constexpr int kSize = 16 / kBytes;
  const char* row = first;
#pragma GCC unroll 4
  for (int g = 0; g < kPieces; ++g) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i, row += stride) {
      if (kListed) row = first + list[g * kSize + i] * stride;
      asm("" : "+r"(row));  // one running address; else the compiler spills one address per row
      columns[i] =
          put_piece(g == 0 ? Units{} : columns[i], kWhole ? load<Piece>(row) : load_first<Piece>(row, bytes), g);
    }
  }
  transpose_pieces<kBytes>(columns);
}

}  // namespace GRANK_ISA
}  // namespace grank
