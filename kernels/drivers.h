// NVIDIA's drivers: which branch knows which CUDA.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct DriverBranch {
  int32_t number;  // 550
  int32_t cuda;    // 12040
};

constexpr DriverBranch kDriverBranches[] = {
#define DRIVER(number, cuda) {number, cuda},
#include "kernels/drivers.def"
#undef DRIVER
};

// The branch of a driver that says this CUDA version; 0 where none is known.
constexpr int32_t driver_branch(int32_t cuda) {
  for (const DriverBranch& branch : kDriverBranches) {
    if (branch.cuda == cuda) return branch.number;
  }
  return 0;
}

}  // namespace anyflash
