// What back ends and kernels ask of strides.
#pragma once

#include "stable/aten.h"

namespace anyflash {

// Whether the elements of a row lie side by side.
inline bool has_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.stride(last) == 1 || x.size(last) <= 1;
}

// x itself where they do, else a contiguous copy.
inline Tensor contiguous_rows(const Tensor& x) {
  return has_contiguous_rows(x) ? x : contiguous(x);
}

inline OptionalTensor contiguous_rows(const OptionalTensor& x) {
  return x ? OptionalTensor(contiguous_rows(*x)) : x;
}

// x itself where it is what core/run.h takes for a matrix, else a contiguous copy.
inline Tensor as_matrix(const Tensor& x) {
  return x.dim() == 2 && has_contiguous_rows(x) ? x : contiguous(x);
}

}  // namespace anyflash
