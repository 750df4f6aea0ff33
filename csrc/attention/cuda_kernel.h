// The route `kernel` on a GPU: tensors become AttentionParams, and one launch computes. Nothing is
// read on the host, nothing waits for the device.
#pragma once

#include "attention.h"
#include "kernels/launch.h"

namespace anyflash::cuda_kernel {

// `instance` computes the arguments' problem.
ForwardResult forward(const Instance& instance, const AttentionArgs& args);

}  // namespace anyflash::cuda_kernel
