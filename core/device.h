// What the decision needs to know of a GPU and of NVIDIA's driver.
#pragma once

#include <cstdint>

namespace anyflash {

// Compute capability as major * 10 + minor; 0 where it cannot be told. Asked for once per device.
int32_t device_sm(int32_t device);

// The newest CUDA that the driver in this process knows: 12040 = 12.4; 0 where it cannot be told.
int32_t driver_version();

}  // namespace anyflash
