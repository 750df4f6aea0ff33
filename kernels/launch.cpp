#include "kernels/launch.h"

#include <cstring>

#include "kernels/arch.h"
#include "kernels/common/launch_kernel.h"
#include "kernels/elementwise/bias_activation_shape.h"

#if ANYFLASH_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace anyflash {

#if ANYFLASH_HAS_CUDA

namespace arch {
constexpr Arch sm75 = kSm75;
}

// Defined by the generated translation units.
#define BIAS_ACTIVATION(arch, direction, dtype, checked_on) \
  int32_t bias_activation_##direction##_##dtype##_##arch(const void* params, void* stream);
#include "kernels/instances.def"
#undef BIAS_ACTIVATION

namespace {

constexpr Instance kInstances[] = {
#define BIAS_ACTIVATION(arch_name, direction, dtype, checked_on) \
  {"bias_activation_" #direction "_" #dtype "_" #arch_name,      \
   Family::bias_activation,                                      \
   arch::arch_name.name,                                         \
   arch::arch_name.min_sm,                                       \
   arch::arch_name.max_sm,                                       \
   Direction::direction,                                         \
   Dtype::dtype,                                                 \
   0,                                                            \
   #checked_on,                                                  \
   bias_activation_##direction##_##dtype##_##arch_name},
#include "kernels/instances.def"
#undef BIAS_ACTIVATION
};
constexpr int32_t kNumInstances = sizeof(kInstances) / sizeof(Instance);

}  // namespace

int32_t launch_on_device(const void* kernel, Grid grid, void** arguments, void* stream) {
  return cudaLaunchKernel(kernel, dim3(grid.x, grid.y), dim3(grid.threads), arguments, 0,
                          static_cast<cudaStream_t>(stream));
}

#else

namespace {

constexpr const Instance* kInstances = nullptr;
constexpr int32_t kNumInstances = 0;

}  // namespace

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

int32_t anyflash_device_sm(int32_t) { return anyflash::kErrorNoCuda; }

int32_t anyflash_build_cuda_version(void) { return 0; }

#endif

const char* anyflash_build_archs(void) { return ANYFLASH_ARCHS; }

const char* anyflash_error_string(int32_t code) {
  if (code == anyflash::kErrorInvalidParams) return "invalid kernel parameters";
  if (code == anyflash::kErrorNoCuda) return "no CUDA device";
#if ANYFLASH_HAS_CUDA
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return code == 0 ? "no error" : "this build has no CUDA";
#endif
}
