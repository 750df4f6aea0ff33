// The kernel library as its users see it: a table of compiled kernels and one way to launch them. C
// linkage, no torch, no CUDA types.
#pragma once

#include "kernels/cubin.h"
#include "kernels/params.h"
#include "kernels/portable.h"

#if defined(__CUDACC_RTC__)
#define ANYFLASH_EXPORT
#else
#define ANYFLASH_EXPORT __attribute__((visibility("default")))
#endif

namespace anyflash {

enum class Family : int32_t {
  attention,
  bias_activation,
  kvcache_append,
  rotary,
  norm,
  cross_entropy
};
enum class Device : int32_t { cpu, cuda, hip, mps, xpu, other };  // kernels: the first two
enum class Direction : int32_t { forward, backward };
enum class Dtype : int32_t {
  fp16 = 1,
  bf16 = 2,
  fp32 = 4,
  fp64 = 8
};  // one bit each: routes list several

// One line of instances.def.
struct Instance {
  const char* name;  // family_direction_dtype_arch, for attention family_direction_dtype_d128_arch
  Family family;
  Device device;
  const char* arch;
  int32_t min_sm;  // runs on min_sm <= compute capability <= max_sm; on a CPU the Isa of arch.h
  int32_t max_sm;
  Direction direction;
  Dtype dtype;
  int32_t max_head_dim;  // of q and of v; 0: the family has none
  int32_t head_dim_multiple;
  uint32_t features;       // supported ones, a set of features.h
  const char* checked_on;  // the CPU that ran its tests, "none" until then; "code": see the cubins
  const Cubin* cubins;     // by GPU generation; null on a CPU
  int32_t (*run)(const void* params, void* stream);
};

// Beside the CUDA driver's own codes, which are positive. 0 is success.
constexpr int32_t kErrorInvalidParams = -1;
constexpr int32_t kErrorNoCuda = -2;  // no driver
constexpr int32_t kErrorNoMemory = -3;
constexpr int32_t kErrorParallelFor = -4;  // the caller's parallel-for failed
constexpr int32_t kErrorOldDriver = -5;
constexpr int32_t kErrorNoCode = -6;  // for this GPU

}  // namespace anyflash

extern "C" {

// The compiled kernels: those for CPUs of the build's processor family and, in a build with CUDA,
// those for GPUs.
ANYFLASH_EXPORT const anyflash::Instance* anyflash_instances(int32_t* count);

// The instance of that name, or null.
ANYFLASH_EXPORT const anyflash::Instance* anyflash_find_instance(const char* name);

// Queues the kernel on `stream` (a CUstream) of the current device, or, on a CPU, computes before
// it returns: there `stream` is a const CpuThreads*, null for the calling thread alone. `params` is
// the family's struct of params.h.
ANYFLASH_EXPORT int32_t anyflash_launch(const anyflash::Instance* instance, const void* params,
                                        void* stream);

// Bytes of workspace for a backward that returns dbias.
ANYFLASH_EXPORT int64_t anyflash_bias_activation_workspace(int64_t rows, int64_t cols,
                                                           anyflash::Activation activation);

// Bytes of workspace for this call of an attention instance; depends on lengths, sizes and the
// current device alone.
ANYFLASH_EXPORT int64_t anyflash_attention_workspace(const anyflash::Instance* instance,
                                                     const anyflash::AttentionParams* params);

// The best instruction set with kernels here that this CPU has: an Isa of arch.h.
ANYFLASH_EXPORT int32_t anyflash_cpu_isa(void);

// Compute capability of a device as major * 10 + minor, or a negative number if it cannot be told.
ANYFLASH_EXPORT int32_t anyflash_device_sm(int32_t device);

// The newest CUDA that the NVIDIA driver of this process knows: 12040 = 12.4; 0 without one.
ANYFLASH_EXPORT int32_t anyflash_driver_version(void);

// What a code means that this thread was returned last; never null.
ANYFLASH_EXPORT const char* anyflash_error_string(int32_t code);

// Versions of the CUDA compilers, e.g. "12.4, 12.8"; empty in a build without CUDA.
ANYFLASH_EXPORT const char* anyflash_build_nvrtc(void);

// Architectures with code in this library, e.g. "75, 80, 90"; empty in a build without CUDA.
ANYFLASH_EXPORT const char* anyflash_build_archs(void);

}  // extern "C"
