#include "core/device.h"

#include <array>
#include <atomic>

#include "kernels/launch.h"

namespace anyflash {
namespace {

// What `read` says, asked for until it says something.
template <typename Read>
int32_t remembered(std::atomic<int32_t>& known, Read read) {
  int32_t value = known.load(std::memory_order_relaxed);
  if (value == 0) {
    value = read();
    known.store(value, std::memory_order_relaxed);
  }
  return value;
}

int32_t read_sm(int32_t device) {
  const int32_t sm = anyflash_device_sm(device);
  return sm > 0 ? sm : 0;
}

}  // namespace

int32_t driver_version() {
  static std::atomic<int32_t> known{0};
  return remembered(known, anyflash_driver_version);
}

int32_t device_sm(int32_t device) {
  constexpr int32_t kKnownDevices = 64;
  static std::array<std::atomic<int32_t>, kKnownDevices> known{};
  if (device < 0 || device >= kKnownDevices) return read_sm(device);
  return remembered(known[device], [device] { return read_sm(device); });
}

}  // namespace anyflash
