// fp16 and bf16 as their bits. Conversions to them round to nearest even, as cvt.rn does.
#pragma once

#include <cstdint>
#include <cstring>

namespace emu {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float bf16_to_fp32(uint16_t x) { return bits_float(uint32_t{x} << 16); }

inline uint16_t fp32_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Moves the exponent with a product, which also normalises subnormal numbers.
inline float fp16_to_fp32(uint16_t x) {
  const float magnitude = bits_float(uint32_t(x & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t infinite_or_nan = (x & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
  return bits_float(float_bits(magnitude) | infinite_or_nan | uint32_t(x & 0x8000) << 16);
}

inline uint16_t fp32_to_fp16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to 65520 or more
  if (magnitude < 0x38800000) {  // subnormal: a sum whose last bit is worth 2^-24
    const float sum = bits_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_bits(sum) - 0x3F000000));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return uint16_t(sign | ((rounded - 0x38000000) >> 13));
}

}  // namespace emu
