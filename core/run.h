// From views to the pointers and strides that kernels take, and the launch itself.
#pragma once

#include "core/tensor_view.h"
#include "kernels/params.h"

namespace anyflash {

// (batch, rows, heads, columns), paged the same, or packed (rows, heads, columns).
inline Rows rows_of(const TensorView& x) {
  if (x.rank == 3) return {x.data, 0, x.strides[0], x.strides[1]};
  return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}

// A view of (..., columns): two dimensions with rows any distance apart, or contiguous.
struct Matrix {
  void* data;
  int64_t rows, columns;
  int64_t stride;  // of rows
};

inline Matrix matrix_of(const TensorView& x) {
  const int64_t columns = x.size(-1);
  const int64_t rows = columns == 0 ? 0 : x.numel() / columns;
  return {x.data, rows, columns, x.rank == 2 ? x.strides[0] : columns};
}

template <class T>
const T* data_of(const TensorView& x) {
  return x.given() ? static_cast<const T*>(x.data) : nullptr;
}

// `where` is a stream of the current GPU, or a CpuThreads. Raises std::runtime_error with what the
// kernel returned.
void launch(const Instance& instance, const void* params, void* where);

}  // namespace anyflash
