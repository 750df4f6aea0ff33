// The route `kernel` on a CPU: tensors become AttentionParams, and one launch computes.
#pragma once

#include "attention.h"
#include "kernels/launch.h"

namespace anyflash::cpu_kernel {

// `instance` computes the arguments' problem.
ForwardResult forward(const Instance& instance, const AttentionArgs& args);
Gradients backward(const Instance& instance, const AttentionArgs& args, const BackwardArgs& grad);

}  // namespace anyflash::cpu_kernel
