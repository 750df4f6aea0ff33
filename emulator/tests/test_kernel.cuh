// What the kernels of the emulator's tests share: (out, in), words of 32 bits.
#pragma once

#if defined(__CUDACC_RTC__)  // no standard headers
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

constexpr int kWords = 8;  // of each thread, where threads have their own

extern __shared__ __align__(1024) unsigned char shared[];

#define KERNEL(name) extern "C" __global__ void name(uint32_t* out, const uint32_t* in)

// in and out of this thread
#define THREADS_OWN                              \
  const uint32_t* x = in + threadIdx.x * kWords; \
  uint32_t* y = out + threadIdx.x * kWords

struct alignas(64) Map {  // a CUtensorMap; on the emulator, emu::TensorMap
  uint64_t opaque[16];
};

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
