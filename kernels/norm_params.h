// Arguments of the layer and RMS norm kernels: z = dropout(x * rowscale) + dropout(x1) + residual,
// and y, y1 its norm with two sets of weights. csrc/schemas.def has the whole definition.
#pragma once

#include "kernels/launch.h"

namespace anyflash {

// (rows, cols), columns contiguous, rows any distance apart; data is null where there is none.
template <class T>
struct NormRows {
  T* data;
  int64_t row_stride;
};

// x, x1 and their gradients have the instance's dtype, all other vectors are fp32. Masks are bytes,
// 0 where an element is dropped.
struct NormParams {
  int64_t rows;
  int64_t cols;  // at least 1
  float eps;
  float keep_scale;     // 1 / (1 - dropout_p)
  float weight_offset;  // added to weight and weight1
  bool is_rms_norm;
  Dtype sum_dtype;  // of residual, z, and their gradients
  Dtype out_dtype;  // of y, y1, and their gradients

  NormRows<const void> x;  // backward: only where drowscale is wanted
  NormRows<const void> x1;
  NormRows<const void> residual;
  const float* weight;  // (cols)
  const float* bias;    // (cols) or null; forward
  const float* weight1;
  const float* bias1;
  const float* rowscale;  // (rows) or null
  NormRows<const uint8_t> mask;
  NormRows<const uint8_t> mask1;
  float* mean;  // (rows); forward writes it, null for RMS norm
  float* rstd;  // (rows)

  // Forward.
  NormRows<void> y;
  NormRows<void> y1;            // with weight1
  NormRows<void> residual_out;  // z, or null if it is not wanted

  // Backward.
  NormRows<const void> z;
  NormRows<const void> dy;
  NormRows<const void> dy1;
  NormRows<const void> dresidual_out;
  NormRows<void> dx;
  NormRows<void> dx1;        // or null if not wanted, as the following
  NormRows<void> dresidual;  // the gradient of z
  float* dweight;            // (cols), always wanted
  float* dbias;
  float* dweight1;
  float* dbias1;
  float* drowscale;  // (rows)
  float* workspace;  // norm_workspace_floats()
};

// Column sums go over fixed chunks of rows, then over the chunks: the same bits for any number of
// threads.
constexpr int64_t norm_chunk_rows(int64_t rows) {
  constexpr int64_t kLeastRows = 16, kMostChunks = 128;
  const int64_t needed = (rows + kMostChunks - 1) / kMostChunks;
  return needed < kLeastRows ? kLeastRows : needed;
}

constexpr int64_t norm_chunks(int64_t rows) {
  return (rows + norm_chunk_rows(rows) - 1) / norm_chunk_rows(rows);
}

// Columns of a sum in the workspace: whole vectors of any instruction set.
constexpr int64_t norm_padded_cols(int64_t cols) { return (cols + 15) / 16 * 16; }

// Sums of columns that a backward makes.
inline int64_t norm_sums(const NormParams& p) {
  return (p.dweight != nullptr) + (p.dbias != nullptr) + (p.dweight1 != nullptr) +
         (p.dbias1 != nullptr);
}

inline int64_t norm_workspace_floats(const NormParams& p) {
  return norm_chunks(p.rows) * norm_sums(p) * norm_padded_cols(p.cols);
}

}  // namespace anyflash
