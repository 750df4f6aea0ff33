// Lets a plain C++ compiler read the kernels' sources for the sake of their launchers: CUDA's words
// mean nothing or are declared, never defined. Included before everything else.
//
// Of a kernel only the name stays behind: the address of a gnu_inline function is that of a
// definition elsewhere, and the build has one, a GpuKernel (kernels/cubin.h).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define __CUDACC__
#define __CUDA_ARCH__ 800
#define __global__ inline __attribute__((gnu_inline))
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// PTX: asm(...) and asm volatile(...) with operands that no CPU has.
#define asm(...)
#define volatile(...) ("")

struct HostIndex {
  uint32_t x, y, z;
};
extern const HostIndex threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xFFFFFFFF);
int __syncthreads_or(int predicate);
float __shfl_sync(unsigned mask, float value, int lane, int width = 32);
float __shfl_xor_sync(unsigned mask, float value, int lanes, int width = 32);
unsigned __ballot_sync(unsigned mask, int predicate);
int __popc(unsigned bits);
float __int_as_float(int bits);
float __uint_as_float(unsigned bits);
int __float_as_int(float value);
unsigned __float_as_uint(float value);
unsigned __umulhi(unsigned a, unsigned b);
size_t __cvta_generic_to_shared(const void* pointer);
