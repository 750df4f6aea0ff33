// The storage types of tensors, and their numbers on the host.
#pragma once

#include <type_traits>

#include "tests/fuzz/numbers.h"

namespace anyflash {

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
using fp32 = float;

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, fp32>   ? Dtype::fp32
                           : std::is_same_v<T, bf16> ? Dtype::bf16
                                                     : Dtype::fp16;

template <typename T>
double number(const T& x) {
  return reference::read(dtype_of<T>, &x, 0);
}

template <typename T>
T stored(double x) {
  T y;
  fuzz::write(dtype_of<T>, &y, 0, x);
  return y;
}

}  // namespace anyflash
