// What the build embeds: machine code of a line of instances.def, and the kernels in it.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

// Integrated GPUs (Xavier, Orin, Thor), which run their own code alone.
constexpr bool is_integrated(int32_t sm) { return sm == 72 || sm == 87 || sm == 101; }

// Machine code for one generation of GPUs. A line has several, ended by one without data.
struct Cubin {
  int32_t sm;          // compute capability as major * 10 + minor; later ones of its major run it
  int32_t min_driver;  // oldest CUDA of a driver that loads it, 12040 = 12.4
  const void* data;    // an ELF file; with changes, that of a kernel which differs in a few bytes
  int64_t bytes;
  const uint32_t* changes = nullptr;  // offset << 8 | byte
  int64_t num_changes = 0;
  const int32_t* checked_on = nullptr;  // sm of the GPUs that it passed on, ended by 0: checked.def

  constexpr bool runs_on(int32_t device_sm) const {
    return sm == device_sm ||
           (sm < device_sm && sm / 10 == device_sm / 10 && !is_integrated(device_sm));
  }
};

// The build defines one under the mangled name of every kernel: a launcher that takes the address
// of forward_kernel<...> has it.
struct GpuKernel {
  const char* name;  // mangled
  const Cubin* cubins;
};

// The newest that the device runs, or null.
constexpr const Cubin* cubin_for(const Cubin* cubins, int32_t device_sm) {
  const Cubin* found = nullptr;
  for (const Cubin* cubin = cubins; cubin && cubin->data; ++cubin) {
    if (cubin->runs_on(device_sm) && (!found || found->sm < cubin->sm)) found = cubin;
  }
  return found;
}

constexpr bool passed_on(const Cubin& cubin, int32_t device_sm) {
  for (const int32_t* gpu = cubin.checked_on; gpu && *gpu; ++gpu) {
    if (*gpu == device_sm) return true;
  }
  return false;
}

}  // namespace anyflash
