// Arguments of the kernel families: plain data, device pointers, strides in elements.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

enum class Activation : int32_t {
  gelu_tanh = 0,
  gelu_erf = 1,
  relu = 2,
  squared_relu = 3,
  silu_gate = 4,  // u * silu(g): u the first half of the input's columns, g the second
};

constexpr int32_t kNumActivations = 5;

// y = activation(x + bias), and backwards dx, dbias from dy. All tensors have the instance's dtype;
// the arithmetic is fp32. in_cols = cols, for silu_gate 2 * cols. Columns are contiguous, rows may
// have any stride. Nothing may overlap.
struct BiasActivationParams {
  const void* x;     // (rows, in_cols)
  const void* bias;  // (in_cols), or null
  void* y;           // (rows, cols); forward
  const void* dy;    // (rows, cols); backward
  void* dx;          // (rows, in_cols); backward
  void* dbias;       // (in_cols), or null if not wanted; backward
  void* workspace;   // anyflash_bias_activation_workspace() bytes, 16-byte aligned; backward with
                     // dbias
  int64_t rows;
  int64_t cols;
  int64_t x_row_stride;
  int64_t y_row_stride;
  int64_t dy_row_stride;
  int64_t dx_row_stride;
  Activation activation;
};

}  // namespace anyflash
