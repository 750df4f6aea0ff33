// An int32 or int64 tensor of one dimension, read on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/tensor_view.h"

namespace anyflash {

class Integers {
 public:
  explicit Integers(const TensorView& tensor) : tensor_(tensor) {}
  int64_t size() const { return tensor_.sizes[0]; }
  int64_t operator[](int64_t i) const {
    const int64_t at = i * tensor_.strides[0];
    return tensor_.dtype == ElementType::int64 ? static_cast<const int64_t*>(tensor_.host)[at]
                                               : static_cast<const int32_t*>(tensor_.host)[at];
  }
  std::vector<int64_t> all() const {
    std::vector<int64_t> values(static_cast<size_t>(size()));
    for (int64_t i = 0; i < size(); ++i) values[static_cast<size_t>(i)] = (*this)[i];
    return values;
  }

 private:
  const TensorView& tensor_;
};

}  // namespace anyflash
