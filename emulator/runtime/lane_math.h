// What one lane computes without memory or its neighbours: the integer, floating-point and
// conversion instructions whose result is not one C++ operator. Names follow PTX, sections in
// brackets are those of the PTX ISA.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "emulator/runtime/number_formats.h"

namespace emu {

template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

// ---- integers (9.7.1, 9.7.7, 9.7.8) ----

template <typename T>
inline T shift_left(T value, uint32_t count) {
  return count < 8 * sizeof(T) ? T(value << count) : T(0);
}

template <typename T>  // fills with the sign where T has one
inline T shift_right(T value, uint32_t count) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if (count < kBits) return T(value >> count);
  return std::is_signed_v<T> ? T(value >> (kBits - 1)) : T(0);
}

// Division by zero and its overflow have no defined result in PTX, but do not stop the program.
template <typename T>
inline T divide(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (std::is_signed_v<T>) {
    if (b == T(-1)) return T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a));
  }
  return T(a / b);
}

template <typename T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == T(-1)) return 0;
  }
  return T(a % b);
}

template <typename T>
inline uint32_t leading_zeros(T value) {
  constexpr uint32_t kUnused = 64 - 8 * sizeof(T);
  return value == 0 ? 8 * sizeof(T) : __builtin_clzll(value) - kUnused;
}

// Position of the highest bit that differs from the sign, all ones if there is none. [bfind]
template <typename T>
inline uint32_t find_highest(T value) {
  using U = std::make_unsigned_t<T>;
  U bits = U(value);
  if (std::is_signed_v<T> && value < 0) bits = U(~bits);
  return bits == 0 ? ~0u : 8 * sizeof(T) - 1 - leading_zeros(bits);
}

template <typename T>  // by how much to shift left to bring that bit to the top [bfind.shiftamt]
inline uint32_t distance_to_top(T value) {
  const uint32_t found = find_highest(value);
  return found == ~0u ? found : 8 * sizeof(T) - 1 - found;
}

template <typename T>
inline T reverse_bits(T value) {
  T reversed = 0;
  for (uint32_t i = 0; i < 8 * sizeof(T); ++i)
    reversed |= T(value >> i & 1) << (8 * sizeof(T) - 1 - i);
  return reversed;
}

// Position and length count modulo 256; a signed field is extended by its highest bit that exists.
// [bfe]
template <typename T>
inline T extract_field(T value, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  const uint32_t top = position + length - 1 < kBits - 1 ? position + length - 1 : kBits - 1;
  const bool sign = std::is_signed_v<T> && length != 0 && (U(value) >> top & 1);
  U field = 0;
  for (uint32_t i = 0; i < kBits; ++i) {
    const bool bit = i < length && position + i < kBits ? U(value) >> (position + i) & 1 : sign;
    field |= U(bit) << i;
  }
  return T(field);
}

template <typename T>  // [bfi]
inline T insert_field(T field, T into, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  if (position >= 8 * sizeof(T)) return into;
  const T ones = length >= 8 * sizeof(T) ? T(~T(0)) : T((T(1) << length) - 1);
  const T mask = T(ones << position);
  return T((into & ~mask) | (T(field << position) & mask));
}

// Four bytes of b:a; bit 3 of a selector repeats the sign of its byte. [prmt]
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 15;
    const uint8_t byte = uint8_t(bytes >> 8 * (selector & 7));
    const uint8_t chosen = selector & 8 ? uint8_t(byte & 0x80 ? 0xFF : 0) : byte;
    result |= uint32_t(chosen) << 8 * i;
  }
  return result;
}

template <uint32_t kTable>  // [lop3]
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  if constexpr (kTable & 0x01) result |= ~a & ~b & ~c;
  if constexpr (kTable & 0x02) result |= ~a & ~b & c;
  if constexpr (kTable & 0x04) result |= ~a & b & ~c;
  if constexpr (kTable & 0x08) result |= ~a & b & c;
  if constexpr (kTable & 0x10) result |= a & ~b & ~c;
  if constexpr (kTable & 0x20) result |= a & ~b & c;
  if constexpr (kTable & 0x40) result |= a & b & ~c;
  if constexpr (kTable & 0x80) result |= a & b & c;
  return result;
}

// The upper word of b:a shifted left. [shf.l; the count is already wrapped or clamped to 32]
inline uint32_t funnel_left(uint32_t a, uint32_t b, uint32_t count) {
  return uint32_t((uint64_t(b) << 32 | a) << count >> 32);
}

// The lower word of b:a shifted right. [shf.r]
inline uint32_t funnel_right(uint32_t a, uint32_t b, uint32_t count) {
  return uint32_t((uint64_t(b) << 32 | a) >> count);
}

// Sum of four products of bytes, plus c. [dp4a]
template <typename A, typename B>
inline uint32_t dot_bytes(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += uint32_t(int32_t(A(a >> 8 * i)) * int32_t(B(b >> 8 * i)));
  return c;
}

template <typename T>
inline T saturate(__int128 value) {
  if (value < std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  if (value > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  return T(value);
}

// ---- floating point (9.7.3) ----

// Subnormals become zero of the same sign. [.ftz]
inline float flush(float x) {
  const uint32_t bits = float_bits(x);
  return bits & 0x7F800000 ? x : bits_float(bits & 0x80000000);
}

template <typename T>  // to [0, 1]; NaN becomes 0 [.sat]
inline T saturate_unit(T x) {
  return x > 0 ? (x < 1 ? x : T(1)) : T(0);
}

template <typename T>
inline T canonical_nan() {
  if constexpr (sizeof(T) == 4) return bits_as<T>(uint32_t(0x7FFFFFFF));
  return std::numeric_limits<T>::quiet_NaN();
}

// One NaN loses, and -0 is less than +0. [min, max]
template <typename T>
inline T min_number(T a, T b) {
  if (a != a) return b == b ? b : canonical_nan<T>();
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b);
}

template <typename T>
inline T max_number(T a, T b) {
  if (a != a) return b == b ? b : canonical_nan<T>();
  if (b != b) return a;
  return a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b);
}

template <typename T>  // [min.NaN]
inline T min_nan(T a, T b) {
  return a != a || b != b ? canonical_nan<T>() : min_number(a, b);
}

template <typename T>
inline T max_nan(T a, T b) {
  return a != a || b != b ? canonical_nan<T>() : max_number(a, b);
}

// Calls compute() while the processor rounds in this direction: FE_DOWNWARD for .rm, FE_UPWARD .rp,
// FE_TOWARDZERO .rz. Operands reach compute() through memory, so that nothing is folded or moved
// out.
template <typename Compute, typename... T>
inline auto rounded(int direction, Compute compute, T... operands) {
  const int before = std::fegetround();
  std::fesetround(direction);
  const auto through_memory = [](auto x) {
    volatile auto y = x;
    return y;
  };
  volatile auto result = compute(through_memory(operands)...);
  std::fesetround(before);
  return decltype(compute(operands...))(result);
}

inline float reciprocal_sqrt(float x) { return float(1 / std::sqrt(double(x))); }
inline double reciprocal_sqrt(double x) { return 1 / std::sqrt(x); }

template <typename T>
inline bool is_subnormal(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL;
}

// ---- conversions (9.7.9.21) ----

// Narrows by first rounding to odd, after which rounding to a format of at most 22 bits is exact.
inline float to_odd_float(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || x != x || std::isinf(nearest)) return nearest;
  const float toward_zero =
      std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.f) : nearest;
  return bits_as<float>(bits_as<uint32_t>(toward_zero) | 1u);
}

inline uint16_t fp64_to_fp16(double x) { return fp32_to_fp16(to_odd_float(x)); }
inline uint16_t fp64_to_bf16(double x) { return fp32_to_bf16(to_odd_float(x)); }

inline uint16_t fp32_to_bf16_toward_zero(float x) {
  return x != x ? 0x7FFF : uint16_t(float_bits(x) >> 16);
}

// Steps back from the nearest number where that is larger; its bits are ordered like its magnitude.
inline uint16_t fp32_to_fp16_toward_zero(float x) {
  const uint16_t nearest = fp32_to_fp16(x);
  const bool too_large = std::fabs(fp16_to_fp32(nearest)) > std::fabs(x);
  return uint16_t(nearest - too_large);
}

// 10 bits of mantissa in a float; ties away from zero. [cvt.rna.tf32]
inline uint32_t fp32_to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7FFFFFFF;
  return std::isinf(x) ? bits : (bits + 0x1000u) & ~0x1FFFu;
}

// Out of range clamps. NaN is 0, or 2^63 from and to 64 bits.
template <typename To, typename From>
inline To to_integer(From integral) {
  if (integral != integral) {
    return sizeof(From) == 8 || sizeof(To) == 8 ? To(uint64_t(1) << (8 * sizeof(To) - 1)) : To(0);
  }
  if (integral < From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  // 2^n is exact where max() = 2^n - 1 is not.
  if (integral >= std::ldexp(From(1), std::numeric_limits<To>::digits))
    return std::numeric_limits<To>::max();
  return To(integral);
}

// ---- packed halves: .f16x2, .bf16x2, the lower half first ----

struct Half {
  static float wide(uint16_t x) { return fp16_to_fp32(x); }
  static uint16_t narrow(double x) { return fp64_to_fp16(x); }
};

struct Bfloat {
  static float wide(uint16_t x) { return bf16_to_fp32(x); }
  static uint16_t narrow(double x) { return fp64_to_bf16(x); }
};

// compute() on doubles, in which sums and products of such numbers are exact, or nearly so for fma.
template <typename Format, typename Compute, typename... T>
inline auto on_halves(Compute compute, T... operands) {
  using Bits = std::common_type_t<T...>;
  if constexpr (sizeof(Bits) == 2) {
    return Format::narrow(compute(double(Format::wide(operands))...));
  } else {
    const uint16_t low = Format::narrow(compute(double(Format::wide(uint16_t(operands)))...));
    const uint16_t high =
        Format::narrow(compute(double(Format::wide(uint16_t(operands >> 16)))...));
    return uint32_t(high) << 16 | low;
  }
}

}  // namespace emu
