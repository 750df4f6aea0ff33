// Running a kernel on a tensor's device.
#pragma once

#include "attention.h"
#include "kernels/launch.h"

namespace anyflash {

// On torch's current stream of x's GPU, or on torch's CPU threads. Raises when the launch fails.
void launch(const Instance& instance, const void* params, const Tensor& x);

}  // namespace anyflash
