// Division by a number that the host knows and the compiler does not: a multiplication and a shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct Divisor {
  uint32_t value;
  uint32_t factor;
  uint32_t shift;

  // value in 1 ... 2^31.
  static ANYFLASH_HOST_DEVICE Divisor of(int64_t value) {
    uint32_t shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - uint64_t(value);
    return {uint32_t(value), uint32_t((excess << 32) / uint64_t(value) + 1), shift};
  }

  // n below 2^31.
  ANYFLASH_HOST_DEVICE uint32_t quotient(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, factor);
#else
    const uint32_t high = uint32_t(uint64_t{n} * factor >> 32);
#endif
    return (high + n) >> shift;
  }
};

}  // namespace anyflash
