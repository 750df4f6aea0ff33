// PyTorch's operators for the code of this library: typed calls through the C shims, and views that
// cost next to nothing.
//
//   Tensor y = aten<Tensor>("aten::exp", "", x);
//   auto [out, lse] = aten<std::tuple<Tensor,
//   Tensor>>("aten::_scaled_dot_product_flash_attention_for_cpu", "", ...);
//
// Arguments follow the schema, defaults included: bool, int64_t, double, Tensor, std::optional of
// these, std::vector<int64_t>, std::vector<Tensor>, ScalarType, Device, std::string. A schema
// argument of type Scalar cannot cross the boundary: take the overload with a Tensor and pass
// scalar(value), a 0-d CPU tensor that every device accepts and that does not change the result's
// type. Not to be included beside torch/csrc/stable/ops.h, whose functions of the same names go
// through the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "stable/check.h"

namespace anyflash {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

namespace detail {

// C++ promotes silently where the boundary copies bits: every integer crosses as int64_t, every
// float as double.
template <class T>
StableIValue to_slot(const T& value) {
  if constexpr (std::is_same_v<T, bool> || std::is_enum_v<T> || !std::is_arithmetic_v<T>) {
    return torch::stable::detail::from(value);
  } else if constexpr (std::is_floating_point_v<T>) {
    return torch::stable::detail::from(static_cast<double>(value));
  } else {
    return torch::stable::detail::from(static_cast<int64_t>(value));
  }
}

// Every handle that a call returns is taken, or it would leak.
template <class T>
struct Results {
  static constexpr size_t kCount = 1;
  static T take(StableIValue* slots) { return torch::stable::detail::to<T>(slots[0]); }
};
template <>
struct Results<void> {
  static constexpr size_t kCount = 0;
  static void take(StableIValue*) {}
};
// PyTorch pairs the results with their types in reverse order, so they must be alike.
template <class... T>
struct Results<std::tuple<T...>> {
  static_assert((std::is_same_v<T, Tensor> && ...), "several results: all must be tensors");
  static constexpr size_t kCount = sizeof...(T);
  static std::tuple<T...> take(StableIValue* slots) {
    return take(slots, std::index_sequence_for<T...>{});
  }
  template <size_t... I>
  static std::tuple<T...> take(StableIValue* slots, std::index_sequence<I...>) {
    return {torch::stable::detail::to<T>(slots[I])...};
  }
};

}  // namespace detail

// Arguments that a newer PyTorch appends to a schema read as None, 0 or false.
constexpr size_t kSpareSlots = 8;

// Calls the operator `op` ("aten::exp") with the overload ("" = default). Result: Tensor, another
// type, void, or a std::tuple of Tensors.
template <class Result, class... Args>
Result aten(const char* op, const char* overload, const Args&... args) {
  constexpr size_t kSlots =
      std::max(sizeof...(Args) + kSpareSlots, detail::Results<Result>::kCount);
  StableIValue slots[kSlots] = {detail::to_slot(args)...};
  check_code(torch_call_dispatcher(op, overload, slots, TORCH_ABI_VERSION), op);
  return detail::Results<Result>::take(slots);
}

// The (major, minor) version of the running PyTorch: 213 = 2.13.
int torch_version();

// ---- Views: no dispatcher, no autograd, at most 8 dimensions. Dimensions may be negative; ranges
// are the caller's to get right.

Tensor view(const Tensor& x, Sizes sizes, Sizes strides,
            int64_t offset = 0);  // offset in elements, from x's first element
Tensor transpose(const Tensor& x, int64_t dim0, int64_t dim1);
Tensor narrow(const Tensor& x, int64_t dim, int64_t start, int64_t length);
Tensor select(const Tensor& x, int64_t dim, int64_t index);
Tensor unsqueeze(const Tensor& x, int64_t dim);
Tensor expand(const Tensor& x, Sizes sizes);  // x.dim() == sizes.size()
Tensor split_dim(const Tensor& x, int64_t dim,
                 int64_t inner);  // (.., n, ..) -> (.., n / inner, inner, ..)

// ---- New tensors. `like` gives the device, and the dtype where none is named.

Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype);  // contiguous
Tensor empty_like(const Tensor& x);                               // x's strides where x is dense
Tensor full(Sizes sizes, double value, const Tensor& like, ScalarType dtype);
Tensor arange(int64_t end, const Tensor& like);  // int64, made on the device
Tensor undefined();            // for arguments of type Tensor that may be left out
Tensor scalar(double value);   // 0-d fp64 on the CPU: see above
Tensor scalar(int64_t value);  // 0-d int64 on the CPU

// ---- The operators used in many places. Anything else: aten<...>() at the place of use.

Tensor contiguous(const Tensor& x);                           // x itself where it is contiguous
Tensor reshape(const Tensor& x, Sizes sizes);                 // a copy only where no view exists
Tensor to_dtype(const Tensor& x, ScalarType dtype);           // x itself where it has the dtype
void copy_(const Tensor& destination, const Tensor& source);  // converts and broadcasts
void fill_(const Tensor& x, double value);
Tensor add(const Tensor& a, const Tensor& b,
           double alpha = 1);  // a + alpha * b; integers give int64
Tensor sub(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, double factor);
Tensor sum(const Tensor& x, std::vector<int64_t> dims, bool keepdim = false);
Tensor amax(const Tensor& x, int64_t dim, bool keepdim = false);
Tensor bmm(const Tensor& a, const Tensor& b);

}  // namespace anyflash
