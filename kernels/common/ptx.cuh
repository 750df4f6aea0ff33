// One PTX instruction, one function; and the 16-bit number formats, which need a few of them.
// Compiled for a CPU (tests only), the same names come from simt.h beside the tests.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct Words16 {  // 16 bytes, what one load or store moves at most
  uint32_t w[4];
};

}  // namespace anyflash

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include "tests/cpp/simt.h"
#else

namespace anyflash::ptx {

// 2^x within 2 ulp; subnormal results are 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp; 0 for infinite x.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fp16_to_fp32(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ uint16_t fp32_to_fp16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float bf16_to_fp32(uint16_t x) {
  return __uint_as_float(uint32_t{x} << 16);
}

__device__ __forceinline__ uint16_t fp32_to_bf16(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else  // no instruction before sm_80
  const uint32_t bits = __float_as_uint(x);
  return x == x ? uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16) : uint16_t{0x7FFF};
#endif
}

__device__ __forceinline__ Words16 load_16(const void* global) {
  Words16 x;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "l"(global));
  return x;
}

__device__ __forceinline__ void store_16(void* global, const Words16& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.w[0]), "r"(x.w[1]),
               "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

}  // namespace anyflash::ptx

#endif

namespace anyflash {

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
using fp32 = float;

__device__ __forceinline__ float to_fp32(fp16 x) { return ptx::fp16_to_fp32(x.bits); }
__device__ __forceinline__ float to_fp32(bf16 x) { return ptx::bf16_to_fp32(x.bits); }
__device__ __forceinline__ float to_fp32(fp32 x) { return x; }

__device__ __forceinline__ void from_fp32(float x, fp16& y) { y.bits = ptx::fp32_to_fp16(x); }
__device__ __forceinline__ void from_fp32(float x, bf16& y) { y.bits = ptx::fp32_to_bf16(x); }
__device__ __forceinline__ void from_fp32(float x, fp32& y) { y = x; }

}  // namespace anyflash
