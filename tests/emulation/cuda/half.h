// float16 and bfloat16 as their bits, to float and back, rounding to nearest even. NaN becomes 0x7fff, as on the GPU.
#pragma once

#include <cstdint>

namespace grank::emulation {

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float float_of_half(uint16_t half) {
  // Exponent and mantissa at their places in a float; the multiplication moves the exponent's bias from 15 to 127 and
  // makes denormals normal. Infinity and NaN become 2^16 and more.
  const float magnitude = float_of(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x1p16f ? 0x7f800000u : 0;
  return float_of(bits_of(magnitude) | special | static_cast<uint32_t>(half & 0x8000) << 16);
}

inline uint16_t half_of_float(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16; from 65520 on by rounding, below
  if (magnitude <
      0x38800000u) {  // below 2^-14: adding 1/2 leaves a mantissa in units of 2^-24, rounded by the addition
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

inline float float_of_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace grank::emulation
