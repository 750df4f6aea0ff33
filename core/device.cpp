#include "core/device.h"

#include <array>
#include <atomic>

#include "core/late_symbol.h"
#include "kernels/launch.h"

namespace anyflash {
namespace {

// The driver is asked, which torch has loaded: the kernel library may be built without CUDA, or
// with a runtime that is too new for this driver, while torch's own attention runs.
constexpr const char* kDriver = "libcuda.so.1";
LateSymbol<int(int*)> get_version("cuDriverGetVersion", kDriver);
LateSymbol<int(int*, int)> device_get("cuDeviceGet", kDriver);
LateSymbol<int(int*, int, int)> device_attribute("cuDeviceGetAttribute", kDriver);
constexpr int kMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kMinor = 76;

int32_t read_sm(int32_t device) {
  auto* get = device_get.find();
  auto* attribute = device_attribute.find();
  int handle = 0, major = 0, minor = 0;
  if (get != nullptr && attribute != nullptr && get(&handle, device) == 0 &&
      attribute(&major, kMajor, handle) == 0 && attribute(&minor, kMinor, handle) == 0) {
    return major * 10 + minor;
  }
  const int32_t sm = anyflash_device_sm(device);
  return sm > 0 ? sm : 0;
}

int32_t read_driver_version() {
  auto* get = get_version.find();
  int version = 0;
  return get != nullptr && get(&version) == 0 ? version : 0;
}

}  // namespace

int32_t driver_version() {
  static std::atomic<int32_t> known{0};
  int32_t version = known.load(std::memory_order_relaxed);
  if (version == 0) {
    version = read_driver_version();
    known.store(version, std::memory_order_relaxed);
  }
  return version;
}

int32_t device_sm(int32_t device) {
  constexpr int32_t kKnownDevices = 64;
  static std::array<std::atomic<int32_t>, kKnownDevices> known{};
  if (device < 0 || device >= kKnownDevices) return read_sm(device);
  int32_t sm = known[device].load(std::memory_order_relaxed);
  if (sm == 0) {
    sm = read_sm(device);
    known[device].store(sm, std::memory_order_relaxed);
  }
  return sm;
}

}  // namespace anyflash
