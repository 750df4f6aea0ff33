// Where a kernel runs on a tensor's device: torch's threads, or torch's current stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels/launch.h"
#include "stable/cuda_shims.h"

namespace anyflash {

// A GPU is the current device while this lives.
class LaunchOn {
 public:
  explicit LaunchOn(const torch::stable::Tensor& x);
  // What a launch takes: a CpuThreads, or a stream.
  void* get() const { return guard_ ? stream_ : &threads_; }

 private:
  std::optional<CudaGuard> guard_;
  void* stream_ = nullptr;
  mutable CpuThreads threads_{};
};

}  // namespace anyflash
