// The route `kernel` of bias + activation: one launch.
#pragma once

#include <utility>

#include "core/mlp.h"
#include "stable/aten.h"

namespace anyflash::kernel {

// `call` are the views of the tensors beside it, prepared.
Tensor bias_activation(const Instance& instance, const Tensor& x, const OptionalTensor& bias,
                       BiasActivationCall call);
// dbias is unset where there is no bias.
std::pair<Tensor, OptionalTensor> bias_activation_backward(const Instance& instance,
                                                           const Tensor& dy, const Tensor& x,
                                                           const OptionalTensor& bias,
                                                           BiasActivationCall call);

}  // namespace anyflash::kernel
