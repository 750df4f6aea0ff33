// The one way from a family's launcher to the GPU. Kernels take one struct by value.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct Grid {
  uint32_t x;
  uint32_t y;
  uint32_t threads;
  uint32_t shared_bytes = 0;  // dynamic
};

// More dynamic shared memory than this must be asked for (CUDA C++ Programming Guide, 5.0 table).
constexpr uint32_t kSharedBytesOfAnyKernel = 48 * 1024;

int32_t launch_on_device(const void* kernel, Grid grid, void** arguments,
                         void* stream);  // driver.cpp

// What a launcher chooses by. A device that tells nothing has the least that any GPU has.
struct DeviceLimits {
  int32_t sm = 0;  // compute capability, major * 10 + minor
  int32_t multiprocessors = 1;
  int32_t shared_bytes_per_block = kSharedBytesOfAnyKernel;  // dynamic ones, when asked for
  int32_t shared_bytes_per_multiprocessor = kSharedBytesOfAnyKernel;
  int32_t l2_bytes = 0;
};

DeviceLimits device_limits();  // of the current device, asked for once; driver.cpp

template <typename Params>
int32_t launch_kernel(void (*kernel)(Params), Grid grid, Params params, void* stream) {
  void* arguments[] = {&params};
  return launch_on_device(reinterpret_cast<const void*>(kernel), grid, arguments, stream);
}

}  // namespace anyflash
