// The architectures that kernels are written for, and the GPUs that run each of them.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

// Compute capabilities are written as major * 10 + minor. An Arch covers an interval of them: code
// without architecture-specific instructions runs on every later GPU (as PTX where no SASS fits),
// sm_90a code on sm_90 alone.
struct Arch {
  const char* name;
  int32_t min_sm;
  int32_t max_sm;

  constexpr bool runs_on(int32_t sm) const { return min_sm <= sm && sm <= max_sm; }
};

constexpr int32_t kAnyLaterSm = 9999;

constexpr Arch kSm75{"sm75", 75, kAnyLaterSm};  // plain CUDA

}  // namespace anyflash
