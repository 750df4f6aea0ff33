// One PTX instruction, one function; and the 16-bit number formats, which need a few of them.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct alignas(16) Words16 {  // 16 bytes, what one load or store moves at most
  uint32_t w[4];
};

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
using fp32 = float;

namespace ptx {

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

// The larger one of x and 0; NaN stays NaN.
__device__ __forceinline__ float relu(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < 0 ? 0.0f : x;
#endif
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

__device__ __forceinline__ int32_t load_4(const int32_t* global) {
  int32_t x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(global));
  return x;
}

__device__ __forceinline__ Words16 load_16(const void* global) {
  Words16 x;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "l"(global));
  return x;
}

// Adds to global memory, in whatever order threads come.
__device__ __forceinline__ void add(float* global, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(global), "f"(x) : "memory");
}

__device__ __forceinline__ void store_8(void* global, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(low), "r"(high) : "memory");
}

__device__ __forceinline__ void store_16(void* global, const Words16& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.w[0]), "r"(x.w[1]),
               "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

// log2(x) with an absolute error below 2^-22 or a relative one below 2^-22, whichever is larger.
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in one register, `low` in its low half.
__device__ __forceinline__ uint32_t pack(fp16, float low, float high) {
  uint32_t y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("mov.b32 %0, {%1, %2};" : "=r"(y) : "h"(fp32_to_fp16(low)), "h"(fp32_to_fp16(high)));
#endif
  return y;
}
__device__ __forceinline__ uint32_t pack(bf16, float low, float high) {  // sm_80
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float shuffle_xor(float x, int32_t lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, x, lanes);
}

// How many lanes of a warp say yes; every lane must ask.
__device__ __forceinline__ int32_t count_lanes(bool yes) {
  return __popc(__ballot_sync(0xFFFFFFFFu, yes));
}

__device__ __forceinline__ float shuffle(float x, int32_t from_lane) {
  return __shfl_sync(0xFFFFFFFFu, x, from_lane);
}

// Of lane `from` of each group of `lanes`, a power of two.
__device__ __forceinline__ char* shuffle(char* x, int32_t from, int32_t lanes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(x);
  const uint64_t low = __shfl_sync(0xFFFFFFFFu, uint32_t(bits), from, lanes);
  const uint64_t high = __shfl_sync(0xFFFFFFFFu, uint32_t(bits >> 32), from, lanes);
  return reinterpret_cast<char*>(high << 32 | low);
}

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// The rest is for sm_75 and newer, bf16 and cp.async for sm_80. Addresses of shared memory are
// 32-bit.

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// The same address, of which the compiler forgets how it came about: what is added to it stays an
// offset in the instruction, where else each sum would be an address of its own, and it is kept in
// its register instead of being worked out again.
template <typename Element>
__device__ __forceinline__ Element* opaque(Element* address) {
  asm volatile("" : "+l"(address));
  return address;
}
__device__ __forceinline__ uint32_t opaque(uint32_t shared) {
  asm volatile("" : "+r"(shared));
  return shared;
}

__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t shared, const Words16& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.w[0]), "r"(x.w[1]),
               "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasCpAsync = false;
#else
constexpr bool kHasCpAsync = true;
#endif

// Queues a copy of 16 bytes, past L1, and has L2 fetch the 128 bytes around. Bytes that are not
// wanted are written as zeros, and the source is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred ignored;\n"
      "setp.eq.u32 ignored, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignored;\n"
      "}" ::"r"(shared),
      "l"(global), "r"(uint32_t(wanted))
      : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
  if constexpr (kHasCpAsync) asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are unfinished. Other threads see what was
// copied after a barrier behind the wait.
template <int32_t kPending>
__device__ __forceinline__ void cp_async_wait() {
  if constexpr (kHasCpAsync) asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lanes 8i ... 8i + 7 give the addresses of the rows of
// matrix i, and register i of lane l receives elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// The same with each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// c (16x8) += a (16x8) b (8x8): the first half of the fragments below.
__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// c (16x8) += a (16x16) b (16x8). With g = lane / 4 and t = 2 (lane % 4) the registers hold
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8 at columns t, t, t + 8, t + 8 and the next
//   b0, b1: rows t, t + 8 and the next of column g
//   c[0], c[1]: row g at columns t, t + 1;  c[2], c[3]: row g + 8
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type").
__device__ __forceinline__ void mma_m16n8k16(fp16, float (&c)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_m16n8k8(c, a[0], a[1], b0);
  mma_m16n8k8(c, a[2], a[3], b1);
#endif
}
__device__ __forceinline__ void mma_m16n8k16(bf16, float (&c)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ptx

__device__ __forceinline__ float to_fp32(fp16 x) { return ptx::fp16_to_fp32(x.bits); }
__device__ __forceinline__ float to_fp32(bf16 x) { return ptx::bf16_to_fp32(x.bits); }
__device__ __forceinline__ float to_fp32(fp32 x) { return x; }

__device__ __forceinline__ void from_fp32(float x, fp16& y) { y.bits = ptx::fp32_to_fp16(x); }
__device__ __forceinline__ void from_fp32(float x, bf16& y) { y.bits = ptx::fp32_to_bf16(x); }
__device__ __forceinline__ void from_fp32(float x, fp32& y) { y = x; }

}  // namespace anyflash
