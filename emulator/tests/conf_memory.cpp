// What conf.cu needs of the CUDA runtime and the library's launchers do not. The emulator's
// launches return when they are done; what it reports fails the next synchronisation.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

#include "emulator/runtime/emulator.h"

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = emu::global_malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  emu::global_free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const emu::Result result = emu::take_result();
  std::fputs(result.text().c_str(), stderr);
  return result.reports.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // extern "C"
