// An int32 or int64 tensor of one or two dimensions, read on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/tensor_view.h"

namespace anyflash {

class Integers {
 public:
  explicit Integers(const TensorView& tensor)
      : values_(tensor.host),
        is_int64_(tensor.dtype == ElementType::int64),
        size_(tensor.sizes[0]) {
    // Elsewhere than on the CPU the host has a contiguous copy.
    stride_ = tensor.device == Device::cpu ? tensor.strides[0]
              : tensor.rank == 2           ? tensor.sizes[1]
                                           : 1;
  }
  int64_t size() const { return size_; }
  int64_t operator[](int64_t i) const { return at(i, 0); }
  int64_t at(int64_t row, int64_t column) const {
    const int64_t i = row * stride_ + column;
    return is_int64_ ? static_cast<const int64_t*>(values_)[i]
                     : static_cast<const int32_t*>(values_)[i];
  }
  std::vector<int64_t> all() const {
    std::vector<int64_t> values(static_cast<size_t>(size()));
    for (int64_t i = 0; i < size(); ++i) values[static_cast<size_t>(i)] = (*this)[i];
    return values;
  }

 private:
  const void* values_;
  bool is_int64_;
  int64_t size_;
  int64_t stride_;  // of rows; columns lie side by side
};

}  // namespace anyflash
