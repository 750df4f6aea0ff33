#include "stable/launch_on.h"

#include <torch/csrc/stable/c/shim.h>

#include "stable/check.h"

namespace anyflash {

LaunchOn::LaunchOn(const torch::stable::Tensor& x) {
  if (x.is_cuda()) {
    guard_.emplace(x.get_device_index());
    stream_ = current_cuda_stream(x.get_device_index());
    return;
  }
  uint32_t num_threads = 1;
  check_code(torch_get_num_threads(&num_threads), "torch_get_num_threads");
  threads_ = {&torch_parallel_for, static_cast<int32_t>(num_threads)};
}

}  // namespace anyflash
