// What the decision needs to know of a GPU.
#pragma once

#include <cstdint>

namespace anyflash {

// Compute capability as major * 10 + minor; 0 where it cannot be told. Asked for once per device.
int32_t device_sm(int32_t device);

}  // namespace anyflash
