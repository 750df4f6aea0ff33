// The dtype numbers of the libtorch that is loaded, asked for once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "stable/check.h"

namespace anyflash {

struct DTypes {
  int32_t fp16 = aoti_torch_dtype_float16();
  int32_t bf16 = aoti_torch_dtype_bfloat16();
  int32_t fp32 = aoti_torch_dtype_float32();
  int32_t fp64 = aoti_torch_dtype_float64();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool();

  bool is_half(int32_t code) const { return code == fp16 || code == bf16; }
  bool is_floating(int32_t code) const { return is_half(code) || code == fp32 || code == fp64; }
};

inline const DTypes& dtypes() {
  static const DTypes types;
  return types;
}

inline int32_t dtype_of(const torch::stable::Tensor& tensor) {
  int32_t code = 0;
  check_code(aoti_torch_get_dtype(tensor.get(), &code), "dtype");
  return code;
}

}  // namespace anyflash
