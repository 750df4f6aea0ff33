// CUDA as libtorch sees it: the current device and stream. Everything here raises where libtorch
// has no CUDA.
#pragma once

#include <cstdint>

namespace anyflash {

bool torch_has_cuda();

// Makes a device current while it lives.
class CudaGuard {
 public:
  explicit CudaGuard(int32_t device);
  ~CudaGuard();
  CudaGuard(const CudaGuard&) = delete;
  CudaGuard& operator=(const CudaGuard&) = delete;

 private:
  void* guard_ = nullptr;
};

// The cudaStream_t that torch works on.
void* current_cuda_stream(int32_t device);

}  // namespace anyflash
