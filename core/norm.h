// One call of layer norm or RMS norm as data. Shapes and semantics: csrc/schemas.def.
#pragma once

#include "core/tensor_view.h"

namespace anyflash {

struct NormCall {
  TensorView x;             // (..., columns); backward: given where rowscale's gradient is wanted
  TensorView residual, x1;  // x's shape; forward
  TensorView weight, bias, weight1, bias1;  // (columns)
  TensorView rowscale;                      // one number per row, in any shape
  TensorView dropout_mask, dropout_mask1;   // x's shape, bool
  double dropout_p = 0.0;
  double eps = 0.0;
  bool is_rms_norm = false;
  bool zero_centered_weight = false;
  int64_t out_dtype = 0;       // a Dtype; forward
  int64_t residual_dtype = 0;  // the same, 0: residual_out is not wanted
};

// What the backward has beside the forward's arguments.
struct NormGradient {
  TensorView dy, dy1, dresidual_out;  // x's shape
  TensorView z;                       // the sum
  TensorView mean, rstd;              // one number per row
  bool has_residual = false;
  bool has_x1 = false;
  int64_t x_dtype = 0;  // a Dtype
};

// What the kernel writes, all contiguous; absent or empty where it is not wanted.
struct NormResults {
  TensorView y, y1, residual_out;               // forward
  TensorView mean, rstd;                        // forward: fp32
  TensorView dx, dx1, dresidual;                // backward
  TensorView dweight, dbias, dweight1, dbias1;  // backward: (columns) fp32
  TensorView drowscale;                         // backward: one fp32 number per row
  void* workspace = nullptr;                    // backward: norm_workspace() bytes
};

// Refuses what cannot be computed: shapes, dtypes, devices, memory and options. `grad` is null for
// the forward.
void check_norm(const NormCall& call, const NormGradient* grad);

int64_t norm_workspace(const NormGradient& grad, const NormResults& results);

// Runs the kernel on the CPU. `call` is checked and not empty. What has a row per row of x are
// matrices (core/run.h); everything else is fp32 and contiguous. `where` is a CpuThreads.
void run_norm(const Instance& instance, const NormCall& call, const NormGradient* grad,
              const NormResults& results, void* where);

}  // namespace anyflash
