// y = activation(x + bias): what the operators and the fused MLP share.
#pragma once

#include <string>

#include "attention/arguments.h"
#include "kernels/launch.h"

namespace anyflash {

// Raises std::invalid_argument (ValueError in Python) for a number or name that is none.
Activation activation_of(int64_t number);
Activation activation_of(const std::string& name);

// Columns of x per column of y.
inline int64_t inputs_per_output(Activation activation) {
  return activation == Activation::silu_gate ? 2 : 1;
}

// The route `kernel`: one launch. `instance` fits x's dtype and device.
namespace kernel {
Tensor bias_activation(const Instance& instance, const Tensor& x, const OptionalTensor& bias,
                       Activation activation);
// dbias is unset where there is no bias.
std::pair<Tensor, OptionalTensor> bias_activation_backward(const Instance& instance,
                                                           const Tensor& dy, const Tensor& x,
                                                           const OptionalTensor& bias,
                                                           Activation activation);
}  // namespace kernel

}  // namespace anyflash
