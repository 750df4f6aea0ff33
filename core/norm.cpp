#include "core/norm.h"

#include "core/huge_pages.h"
#include "core/run.h"
#include "kernels/norm_params.h"

namespace anyflash {
namespace {

template <class T = const void>
NormRows<T> rows_of_matrix(const TensorView& x) {
  if (!x.given() || x.numel() == 0) return {};
  const Matrix matrix = matrix_of(x);
  return {static_cast<T*>(matrix.data), matrix.stride};
}

// The rows of a result, which the kernel is the first to touch.
NormRows<void> rows_to_write(const TensorView& x) {
  ask_for_huge_pages(x);
  return rows_of_matrix<void>(x);
}

float* numbers_of(const TensorView& x) {
  return x.given() && x.numel() > 0 ? static_cast<float*>(x.data) : nullptr;
}

Dtype dtype_of(const TensorView& x) { return static_cast<Dtype>(x.dtype); }

// What forward and backward share; `x` is a tensor like x.
NormParams params_of(const NormCall& call, const TensorView& x) {
  NormParams params{};
  params.rows = x.numel() / x.size(-1);
  params.cols = x.size(-1);
  params.eps = static_cast<float>(call.eps);
  params.keep_scale = static_cast<float>(1 / (1 - call.dropout_p));
  params.weight_offset = call.zero_centered_weight ? 1.0f : 0.0f;
  params.is_rms_norm = call.is_rms_norm;
  params.weight = numbers_of(call.weight);
  params.bias = numbers_of(call.bias);
  params.weight1 = numbers_of(call.weight1);
  params.bias1 = numbers_of(call.bias1);
  params.rowscale = numbers_of(call.rowscale);
  params.mask = rows_of_matrix<const uint8_t>(call.dropout_mask);
  params.mask1 = rows_of_matrix<const uint8_t>(call.dropout_mask1);
  return params;
}

void set_forward(const NormCall& call, const NormResults& results, NormParams& params) {
  const TensorView& sum = call.residual.given() ? call.residual : call.x;
  params.sum_dtype =
      call.residual_dtype != 0 ? static_cast<Dtype>(call.residual_dtype) : dtype_of(sum);
  params.out_dtype = static_cast<Dtype>(call.out_dtype);
  params.x = rows_of_matrix(call.x);
  params.x1 = rows_of_matrix(call.x1);
  params.residual = rows_of_matrix(call.residual);
  params.mean = numbers_of(results.mean);
  params.rstd = numbers_of(results.rstd);
  params.y = rows_to_write(results.y);
  params.y1 = rows_to_write(results.y1);
  params.residual_out = rows_to_write(results.residual_out);
}

void set_sums(const NormResults& results, NormParams& params) {
  params.dweight = numbers_of(results.dweight);
  params.dbias = numbers_of(results.dbias);
  params.dweight1 = numbers_of(results.dweight1);
  params.dbias1 = numbers_of(results.dbias1);
}

void set_backward(const NormCall& call, const NormGradient& grad, const NormResults& results,
                  NormParams& params) {
  params.sum_dtype = dtype_of(grad.z);
  params.out_dtype = dtype_of(grad.dy);
  params.mean = call.is_rms_norm ? nullptr : numbers_of(grad.mean);
  params.rstd = numbers_of(grad.rstd);
  if (call.rowscale.given()) params.x = rows_of_matrix(call.x);
  params.z = rows_of_matrix(grad.z);
  params.dy = rows_of_matrix(grad.dy);
  params.dy1 = rows_of_matrix(grad.dy1);
  params.dresidual_out = rows_of_matrix(grad.dresidual_out);
  params.dx = rows_to_write(results.dx);
  params.dx1 = rows_to_write(results.dx1);
  params.dresidual = rows_to_write(results.dresidual);
  set_sums(results, params);
  params.drowscale = numbers_of(results.drowscale);
  params.workspace = static_cast<float*>(results.workspace);
}

}  // namespace

int64_t norm_workspace(const NormGradient& grad, const NormResults& results) {
  NormParams params{};
  params.rows = grad.z.numel() / grad.z.size(-1);
  params.cols = grad.z.size(-1);
  set_sums(results, params);
  return norm_workspace_floats(params) * int64_t(sizeof(float));
}

void run_norm(const Instance& instance, const NormCall& call, const NormGradient* grad,
              const NormResults& results, void* where) {
  NormParams params = params_of(call, grad == nullptr ? call.x : grad->z);
  if (grad == nullptr) {
    set_forward(call, results, params);
  } else {
    set_backward(call, *grad, results, params);
  }
  launch(instance, &params, where);
}

}  // namespace anyflash
