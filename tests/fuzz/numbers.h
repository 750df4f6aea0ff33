// Numbers into storage of any dtype.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tests/cpp/attention_reference.h"
#include "tests/fuzz/guarded.h"

namespace anyflash::fuzz {

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

inline uint16_t fp16_bits(double x) {
  if (std::isnan(x)) return 0x7FFF;
  const double size = std::fabs(x);
  const int sign = std::signbit(x) ? 1 << 15 : 0;
  if (size == reference::kInfinity) return static_cast<uint16_t>(sign | 31 << 10);
  if (size < std::ldexp(1, -14)) {
    return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))));
  }
  const int exponent = std::ilogb(size);
  const auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent))) - 1024;
  return static_cast<uint16_t>(sign | (((exponent + 15) << 10) + fraction));
}

inline void write(Dtype dtype, void* data, int64_t i, double x) {
  const auto single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  if (dtype == Dtype::fp32) static_cast<float*>(data)[i] = single;
  if (dtype == Dtype::bf16) {
    static_cast<uint16_t*>(data)[i] =
        static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  if (dtype == Dtype::fp16) static_cast<uint16_t*>(data)[i] = fp16_bits(x);
}

// All bits set are a NaN in every dtype.
inline void poison(const Guarded& buffer) {
  if (buffer.bytes() > 0) std::memset(buffer.as(), 0xFF, buffer.bytes());
}

}  // namespace anyflash::fuzz
