// The one demand on strides that all back ends share.
#pragma once

#include "stable/aten.h"

namespace anyflash {

// x itself where the elements of a row lie side by side, else a contiguous copy.
inline Tensor contiguous_last_dim(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.stride(last) == 1 || x.size(last) <= 1 ? x : contiguous(x);
}

inline OptionalTensor contiguous_last_dim(const OptionalTensor& x) {
  return x ? OptionalTensor(contiguous_last_dim(*x)) : x;
}

}  // namespace anyflash
