#include "kernels/launch.h"

#include <cstring>

#include "kernels/arch.h"
#include "kernels/common/launch_kernel.h"
#include "kernels/driver.h"
#include "kernels/elementwise/bias_activation_shape.h"
#include "kernels/features.h"
#include "kernels/sm80/backward_plan.h"

namespace anyflash {

// built.def, written by CMake: the lines of instances.def whose architecture is in this build. Each
// is a function, and machine code where it is for GPUs.

#define LINE(name)                                \
  int32_t name(const void* params, void* stream); \
  extern const Cubin cubins_##name[];
#define BIAS_ACTIVATION(arch, direction, dtype, checked_on) \
  LINE(bias_activation_##direction##_##dtype##_##arch)
#define ATTENTION(arch, direction, dtype, max_head_dim, multiple, features, checked_on) \
  LINE(attention_##direction##_##dtype##_d##max_head_dim##_##arch)
#define KVCACHE_APPEND(arch, dtype, checked_on) LINE(kvcache_append_forward_##dtype##_##arch)
#define ROWWISE(arch, family, direction, dtype, checked_on) \
  LINE(family##_##direction##_##dtype##_##arch)
#include "built.def"
#undef ROWWISE
#undef KVCACHE_APPEND
#undef ATTENTION
#undef BIAS_ACTIVATION
#undef LINE

namespace {

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
                    #checked_on,                                                              \
                    arch::arch_name.device == Device::cuda                                    \
                        ? cubins_##family##_##direction##_##kind##_##arch_name                \
                        : nullptr,                                                            \
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

int64_t anyflash_attention_workspace(const Instance* instance,
                                     const anyflash::AttentionParams* params) {
  if (instance->device != anyflash::Device::cuda) return 0;
  if (instance->direction == anyflash::Direction::backward) {
    return anyflash::sm80::backward_plan_of(*params, instance->min_sm, instance->max_head_dim)
        .workspace_bytes();
  }
  const auto kernels = anyflash::sm80::kernels_of(instance->min_sm, instance->max_head_dim);
  return anyflash::sm80::plan_of(*params, anyflash::device_limits().multiprocessors, kernels)
      .workspace_bytes();
}

int32_t anyflash_device_sm(int32_t device) {
  const int32_t sm = anyflash::driver::device_sm(device);
  return sm > 0 ? sm : anyflash::kErrorNoCuda;
}

int32_t anyflash_driver_version(void) { return anyflash::driver::version(); }

const char* anyflash_build_nvrtc(void) { return ANYFLASH_NVRTC; }

const char* anyflash_build_archs(void) { return ANYFLASH_ARCHS; }

const char* anyflash_error_string(int32_t code) {
  switch (code) {
    case 0:
      return "no error";
    case anyflash::kErrorInvalidParams:
      return "invalid kernel parameters";
    case anyflash::kErrorNoMemory:
      return "out of memory";
    case anyflash::kErrorParallelFor:
      return "the parallel-for of the caller failed";
  }
  return anyflash::driver::error_text(code);
}
