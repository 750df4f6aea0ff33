// The attention kernels on this machine's GPU, on the emulator's problems, against float64:
//
//   attention_on_device [options of attention_driver.h]
//
// Two runs of each case. Every buffer is an allocation of its own, so that compute-sanitizer sees a
// step beyond it. scripts/gpu_check.sh builds and runs it.
#include "emulator/driver/driver_api.h"
#include "tests/emulated/attention_driver.h"

namespace anyflash::emulated {
namespace {

using driver_api::DevicePointer;
using driver_api::require;

const driver_api::Driver& gpu() { return driver_api::Driver::get(); }

DevicePointer address(const void* data) { return reinterpret_cast<DevicePointer>(data); }

struct DeviceMemory {
  static void* allocate(int64_t bytes) {
    DevicePointer data = 0;
    require(gpu().allocate(&data, size_t(bytes)), "cuMemAlloc");
    require(gpu().fill(data, 0xFF, size_t(bytes)), "cuMemsetD8");
    return reinterpret_cast<void*>(data);
  }
  static void release(void* data) { require(gpu().release(address(data)), "cuMemFree"); }
  static void copy_in(void* to, const void* from, int64_t bytes) {
    require(gpu().copy_in(address(to), from, size_t(bytes)), "cuMemcpyHtoD");
  }
  static void copy_out(void* to, const void* from, int64_t bytes) {
    require(gpu().copy_out(to, address(from), size_t(bytes)), "cuMemcpyDtoH");
  }
};

struct Gpu {
  static constexpr int64_t kRuns = 2;
  static constexpr bool kOrdersAdditions = false;

  std::string run(const Instance* instance, const fuzz::Problem& problem, bool deterministic,
                  int64_t, int64_t, fuzz::Results& results) {
    const int32_t error =
        Transfer<DeviceMemory>(problem, results).run(instance, deterministic, results);
    require(gpu().synchronize(), "cuCtxSynchronize");
    return error == 0 ? "" : std::string(anyflash_error_string(error)) + "; ";
  }
};

}  // namespace
}  // namespace anyflash::emulated

int main(int argc, char** argv) {
  return anyflash::emulated::Driver<anyflash::emulated::Gpu>().main(argc, argv);
}
