// The attention kernels on this machine's GPU, on the emulator's problems, against float64:
//
//   attention_on_device [options of attention_driver.h]
//
// Two runs of each case. Every buffer is an allocation of its own, so that compute-sanitizer sees a
// step beyond it. scripts/gpu_check.sh builds and runs it.
#include <cuda_runtime_api.h>

#include "tests/emulated/attention_driver.h"

namespace anyflash::emulated {
namespace {

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct DeviceMemory {
  static void* allocate(int64_t bytes) {
    void* data = nullptr;
    require(cudaMalloc(&data, static_cast<size_t>(bytes)));
    require(cudaMemset(data, 0xFF, static_cast<size_t>(bytes)));
    return data;
  }
  static void release(void* data) { require(cudaFree(data)); }
  static void copy_in(void* to, const void* from, int64_t bytes) {
    require(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
  }
  static void copy_out(void* to, const void* from, int64_t bytes) {
    require(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
  }
};

struct Gpu {
  static constexpr int64_t kRuns = 2;

  std::string run(const Instance* instance, const fuzz::Problem& problem, int64_t, int64_t,
                  fuzz::Results& results) {
    const int32_t error = Transfer<DeviceMemory>(problem, results).run(instance, results);
    require(cudaDeviceSynchronize());
    return error == 0 ? "" : std::string(anyflash_error_string(error)) + "; ";
  }
};

}  // namespace
}  // namespace anyflash::emulated

int main(int argc, char** argv) {
  return anyflash::emulated::Driver<anyflash::emulated::Gpu>().main(argc, argv);
}
