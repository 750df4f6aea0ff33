#include "mlp/bias_activation.h"
#include "stable/aten.h"
#include "stable/contiguous_rows.h"
#include "stable/launch_on.h"

namespace anyflash::kernel {
namespace {

Tensor like_output(const Tensor& x, Activation activation) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= inputs_per_output(activation);
  return empty(sizes, x, x.scalar_type());
}

}  // namespace

Tensor bias_activation(const Instance& instance, const Tensor& x, const OptionalTensor& bias,
                       Activation activation) {
  const Matrix in(x);
  Tensor y = like_output(x, activation);
  if (y.numel() == 0) return y;
  const OptionalTensor packed_bias = bias ? OptionalTensor(contiguous(*bias)) : std::nullopt;
  BiasActivationParams params{};
  params.x = in.storage.const_data_ptr();
  params.bias = packed_bias ? packed_bias->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.rows = in.rows;
  params.cols = in.columns / inputs_per_output(activation);
  params.x_row_stride = in.stride;
  params.y_row_stride = params.cols;
  params.activation = activation;
  launch(instance, &params, x);
  return y;
}

std::pair<Tensor, OptionalTensor> bias_activation_backward(const Instance& instance,
                                                           const Tensor& dy, const Tensor& x,
                                                           const OptionalTensor& bias,
                                                           Activation activation) {
  const Matrix in(x), grad(dy);
  Tensor dx = empty(x.sizes(), x, x.scalar_type());
  OptionalTensor dbias;
  if (bias) dbias = empty({in.columns}, x, x.scalar_type());
  if (x.numel() == 0) {
    if (dbias) fill_(*dbias, 0.0);
    return {dx, dbias};
  }
  const OptionalTensor packed_bias = bias ? OptionalTensor(contiguous(*bias)) : std::nullopt;
  BiasActivationParams params{};
  params.x = in.storage.const_data_ptr();
  params.bias = packed_bias ? packed_bias->const_data_ptr() : nullptr;
  params.dy = grad.storage.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  params.rows = in.rows;
  params.cols = grad.columns;
  params.x_row_stride = in.stride;
  params.dy_row_stride = grad.stride;
  params.dx_row_stride = in.columns;
  params.activation = activation;
  OptionalTensor workspace;
  if (dbias) {
    params.dbias = dbias->mutable_data_ptr();
    const int64_t bytes = anyflash_bias_activation_workspace(params.rows, params.cols, activation);
    workspace = empty({(bytes + 3) / 4}, x, ScalarType::Float);
    params.workspace = workspace->mutable_data_ptr();
  }
  launch(instance, &params, x);
  return {dx, dbias};
}

}  // namespace anyflash::kernel
