// Tensors that the core's checks look at: shapes, dtypes and strides over memory that nobody reads.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "core/tensor_view.h"

namespace anyflash {

// Contiguous, on the CPU.
inline TensorView make_view(std::initializer_list<int64_t> sizes,
                            ElementType dtype = ElementType::fp32) {
  static double memory;
  TensorView view;
  view.data = &memory;
  view.rank = static_cast<int32_t>(sizes.size());
  view.dtype = dtype;
  std::copy(sizes.begin(), sizes.end(), view.sizes);
  int64_t stride = 1;
  for (int32_t i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.sizes[i];
  }
  view.storage_bytes = stride * bytes_of(dtype);
  return view;
}

inline TensorView on_gpu(TensorView view) {
  view.device = Device::cuda;
  view.device_index = 0;
  return view;
}

inline TensorView freed(TensorView view) {
  view.storage_bytes = 0;
  return view;
}

// What `body` raises; "" where it does not.
template <class Body>
std::string raised_by(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace anyflash
