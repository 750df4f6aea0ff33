// What every route agrees on: the tensors that the operators return, and small shapes around them.
#pragma once

#include "attention/arguments.h"
#include "stable/aten.h"

namespace anyflash {

// out and lse as the fake kernels promise them, uninitialised: out has q's strides where head_dim_v
// is head_dim, else it is contiguous.
Tensor new_out(const AttentionArgs& args);
Tensor new_lse(const AttentionArgs& args);
// Gradients of every element, none of which counts: empty_like and zero.
Tensor zeros_like(const Tensor& x);

// `x` (dense) with the strides of empty_like(like) and like's dtype. A copy only where they differ.
Tensor as_promised(const Tensor& x, const Tensor& like);

// The result where no row sees a key.
ForwardResult nothing_visible(const AttentionArgs& args);
Gradients no_gradients(const AttentionArgs& args);

// Gradients of a route, laid out like q, k and v.
Gradients promised_gradients(const AttentionArgs& args, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv);

// The type that sums are kept in: fp64 for fp64, else fp32.
ScalarType accumulator_type(const Tensor& x);

// (keys) -> (1, 1, 1, keys), ...
Tensor four_dims(Tensor x);
// `x` narrowed along `dim`; a dimension of 1, which broadcasts, stays as it is.
Tensor narrow_broadcast(const Tensor& x, int64_t dim, int64_t begin, int64_t length);

}  // namespace anyflash
