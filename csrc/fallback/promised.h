// Results as the fake kernels promise them: with the strides of empty_like().
#pragma once

#include "attention.h"
#include "stable/aten.h"

namespace anyflash {

// `x` with the strides of empty_like(like) and like's dtype; a copy only where they differ.
Tensor as_promised(const Tensor& x, const Tensor& like);

Tensor zeros_like(const Tensor& x);

// Gradients laid out like q, k and v.
Gradients promised_gradients(const AttentionArgs& args, const Tensor& dq, const Tensor& dk, const Tensor& dv);

}  // namespace anyflash
