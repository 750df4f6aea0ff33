#include "launch.h"

#include <torch/csrc/stable/c/shim.h>

#include "stable/aten.h"
#include "stable/check.h"
#include "stable/cuda_shims.h"

namespace anyflash {
namespace {

int32_t launch_on_gpu(const Instance& instance, const void* params, int32_t device) {
  const CudaGuard guard(device);
  return anyflash_launch(&instance, params, current_cuda_stream(device));
}

int32_t launch_on_cpu(const Instance& instance, const void* params) {
  uint32_t num_threads = 1;
  check_code(torch_get_num_threads(&num_threads), "torch_get_num_threads");
  CpuThreads threads{&torch_parallel_for, static_cast<int32_t>(num_threads)};
  return anyflash_launch(&instance, params, &threads);
}

}  // namespace

void launch(const Instance& instance, const void* params, const Tensor& x) {
  const int32_t error = instance.device == Device::cuda
                            ? launch_on_gpu(instance, params, x.get_device_index())
                            : launch_on_cpu(instance, params);
  AF_CHECK(error == 0, "anyflash: ", instance.name, " failed: ", anyflash_error_string(error));
}

}  // namespace anyflash
