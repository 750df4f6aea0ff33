// What lets one header serve NVRTC and a plain host compiler.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define ANYFLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ANYFLASH_HOST_DEVICE inline __attribute__((always_inline))
#endif
