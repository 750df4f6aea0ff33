#include "kernels/launch.h"

#include <cstring>

#include "kernels/arch.h"
#include "kernels/common/launch_kernel.h"
#include "kernels/elementwise/bias_activation_shape.h"
#include "kernels/features.h"
#include "kernels/sm80/plan.h"

#if ANYFLASH_HAS_CUDA
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#endif

namespace anyflash {

// built.def, written by CMake: the lines of instances.def whose architecture is in this build.

#define BIAS_ACTIVATION(arch, direction, dtype, checked_on) \
  int32_t bias_activation_##direction##_##dtype##_##arch(const void* params, void* stream);
#define ATTENTION(arch, direction, dtype, max_head_dim, multiple, features, checked_on)  \
  int32_t attention_##direction##_##dtype##_d##max_head_dim##_##arch(const void* params, \
                                                                     void* stream);
#define KVCACHE_APPEND(arch, dtype, checked_on) \
  int32_t kvcache_append_forward_##dtype##_##arch(const void* params, void* stream);
#define ROWWISE(arch, family, direction, dtype, checked_on) \
  int32_t family##_##direction##_##dtype##_##arch(const void* params, void* stream);
#include "built.def"
#undef ROWWISE
#undef KVCACHE_APPEND
#undef ATTENTION
#undef BIAS_ACTIVATION

namespace {

#if ANYFLASH_HAS_CUDA
constexpr int32_t kMinDriver = CUDART_VERSION;
#else
constexpr int32_t kMinDriver = 0;
#endif

#define INSTANCE(family, kind, arch_name, direction, dtype, max_head_dim, multiple, features, \
                 checked_on)                                                                  \
  [] {                                                                                        \
    using namespace Feature;                                                                  \
    return Instance{#family "_" #direction "_" #kind "_" #arch_name,                          \
                    Family::family,                                                           \
                    arch::arch_name.device,                                                   \
                    arch::arch_name.name,                                                     \
                    arch::arch_name.min_sm,                                                   \
                    arch::arch_name.max_sm,                                                   \
                    Direction::direction,                                                     \
                    Dtype::dtype,                                                             \
                    max_head_dim,                                                             \
                    multiple,                                                                 \
                    (features),                                                               \
                    arch::arch_name.device == Device::cuda ? kMinDriver : 0,                  \
                    #checked_on,                                                              \
                    family##_##direction##_##kind##_##arch_name};                             \
  }(),
#define BIAS_ACTIVATION(arch, direction, dtype, checked_on) \
  INSTANCE(bias_activation, dtype, arch, direction, dtype, 0, 1, 0, checked_on)
#define ATTENTION(arch, direction, dtype, max_head_dim, multiple, features, checked_on)        \
  INSTANCE(attention, dtype##_d##max_head_dim, arch, direction, dtype, max_head_dim, multiple, \
           features, checked_on)
#define KVCACHE_APPEND(arch, dtype, checked_on) \
  INSTANCE(kvcache_append, dtype, arch, forward, dtype, 512, 1, 0, checked_on)
#define ROWWISE(arch, family, direction, dtype, checked_on) \
  INSTANCE(family, dtype, arch, direction, dtype, 0, 1, 0, checked_on)

constexpr Instance kInstances[] = {
#include "built.def"
    {}  // an end: a build may have no kernel at all
};
constexpr int32_t kNumInstances = sizeof(kInstances) / sizeof(Instance) - 1;

#undef ROWWISE
#undef KVCACHE_APPEND
#undef ATTENTION
#undef BIAS_ACTIVATION
#undef INSTANCE

}  // namespace

#if ANYFLASH_HAS_CUDA

int32_t launch_on_device(const void* kernel, Grid grid, void** arguments, void* stream) {
  if (grid.shared_bytes > kSharedBytesOfAnyKernel) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return cudaLaunchKernel(kernel, dim3(grid.x, grid.y), dim3(grid.threads), arguments,
                          grid.shared_bytes, static_cast<cudaStream_t>(stream));
}

namespace {

DeviceLimits read_limits(int device) {
  DeviceLimits limits;
  int major = 0;
  int minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int32_t* value;
  } kAttributes[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &limits.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.shared_bytes_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.shared_bytes_per_multiprocessor},
      {cudaDevAttrL2CacheSize, &limits.l2_bytes},
  };
  for (const auto& [attribute, value] : kAttributes) {
    if (cudaDeviceGetAttribute(value, attribute, device) != cudaSuccess) return {};
  }
  limits.sm = major * 10 + minor;
  return limits;
}

}  // namespace

DeviceLimits device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceLimits& limits = known[device];
  if (limits.sm == 0) limits = read_limits(device);
  return limits;
}

#endif

}  // namespace anyflash

using anyflash::Activation;
using anyflash::Instance;

const Instance* anyflash_instances(int32_t* count) {
  *count = anyflash::kNumInstances;
  return anyflash::kInstances;
}

const Instance* anyflash_find_instance(const char* name) {
  for (int32_t i = 0; i < anyflash::kNumInstances; ++i) {
    if (std::strcmp(anyflash::kInstances[i].name, name) == 0) return &anyflash::kInstances[i];
  }
  return nullptr;
}

int32_t anyflash_launch(const Instance* instance, const void* params, void* stream) {
  return instance && params ? instance->run(params, stream) : anyflash::kErrorInvalidParams;
}

int64_t anyflash_bias_activation_workspace(int64_t rows, int64_t cols, Activation activation) {
  const int64_t in_cols = activation == Activation::silu_gate ? 2 * cols : cols;
  return anyflash::bias_activation::num_partials(rows, cols) * in_cols * int64_t{sizeof(float)};
}

#if ANYFLASH_HAS_CUDA

int64_t anyflash_attention_workspace(const Instance* instance,
                                     const anyflash::AttentionParams* params) {
  if (instance->device != anyflash::Device::cuda) return 0;
  const auto kernels = anyflash::sm80::kernels_of(instance->min_sm, instance->max_head_dim);
  return anyflash::sm80::plan_of(*params, anyflash::device_limits().multiprocessors, kernels)
      .workspace_bytes();
}

int32_t anyflash_device_sm(int32_t device) {
  int major = 0;
  int minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return anyflash::kErrorNoCuda;
  }
  return major * 10 + minor;
}

int32_t anyflash_build_cuda_version(void) { return CUDART_VERSION; }

#else

int64_t anyflash_attention_workspace(const Instance*, const anyflash::AttentionParams*) {
  return 0;
}

int32_t anyflash_device_sm(int32_t) { return anyflash::kErrorNoCuda; }

int32_t anyflash_build_cuda_version(void) { return 0; }

#endif

const char* anyflash_build_archs(void) { return ANYFLASH_ARCHS; }

const char* anyflash_error_string(int32_t code) {
  switch (code) {
    case 0:
      return "no error";
    case anyflash::kErrorInvalidParams:
      return "invalid kernel parameters";
    case anyflash::kErrorNoCuda:
      return "no CUDA device";
    case anyflash::kErrorNoMemory:
      return "out of memory";
    case anyflash::kErrorParallelFor:
      return "the parallel-for of the caller failed";
  }
#if ANYFLASH_HAS_CUDA
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return "this build has no CUDA";
#endif
}
