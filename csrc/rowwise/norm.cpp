// Layer norm and RMS norm of a sum: results are allocated, what no kernel reads is converted, the
// core checks and launches.
#include <vector>

#include "operators.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash {
namespace {

// What both directions take beside the tensors that they differ in.
struct Parameters {
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& weight1;
  const OptionalTensor& bias1;
  const OptionalTensor& rowscale;
  const OptionalTensor& dropout_mask;
  const OptionalTensor& dropout_mask1;
};

void set_views(const Parameters& from, NormCall& call) {
  call.weight = view_of(from.weight);
  call.bias = view_of(from.bias);
  call.weight1 = view_of(from.weight1);
  call.bias1 = view_of(from.bias1);
  call.rowscale = view_of(from.rowscale);
  call.dropout_mask = view_of(from.dropout_mask);
  call.dropout_mask1 = view_of(from.dropout_mask1);
}

// Makes the views what a kernel reads; keeps the copies that it takes.
class Converted {
 public:
  Converted(const Parameters& from, NormCall& call) {
    set_numbers(call.weight, from.weight);
    set_numbers(call.bias, from.bias);
    set_numbers(call.weight1, from.weight1);
    set_numbers(call.bias1, from.bias1);
    set_numbers(call.rowscale, from.rowscale);
    set_matrix(call.dropout_mask, from.dropout_mask);
    set_matrix(call.dropout_mask1, from.dropout_mask1);
  }

  void set_matrix(TensorView& view, const OptionalTensor& x) {
    if (x) keep(view, as_matrix(*x));
  }
  void set_numbers(TensorView& view, const OptionalTensor& x) {
    if (x) keep(view, contiguous(to_dtype(*x, ScalarType::Float)));
  }

 private:
  void keep(TensorView& view, const Tensor& x) {
    kept_.push_back(x);
    view = view_of(x);
  }
  std::vector<Tensor> kept_;
};

ScalarType dtype_of_code(int64_t code) {
  switch (static_cast<Dtype>(code)) {
    case Dtype::fp16:
      return ScalarType::Half;
    case Dtype::bf16:
      return ScalarType::BFloat16;
    case Dtype::fp64:
      return ScalarType::Double;
    default:
      return ScalarType::Float;
  }
}

// x's shape where it is wanted, else empty.
Tensor like_if(bool wanted, const Tensor& x, ScalarType dtype) {
  return wanted ? empty(x.sizes(), x, dtype) : empty({0}, x, dtype);
}

// Sums for the gradient of a parameter; `finished` gives them its dtype.
Tensor sums_for(const OptionalTensor& parameter, const Tensor& x) {
  return empty({parameter ? parameter->numel() : 0}, x, ScalarType::Float);
}

Tensor finished(const Tensor& sums, const OptionalTensor& parameter, const Tensor& x) {
  return parameter ? to_dtype(sums, parameter->scalar_type()) : empty({0}, x, x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& x1, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double dropout_p, double eps, bool is_rms_norm,
    bool zero_centered_weight, int64_t out_dtype, int64_t residual_dtype) {
  const NoGrad no_grad;
  const Parameters parameters{weight, bias, weight1, bias1, rowscale, dropout_mask, dropout_mask1};
  NormCall call;
  call.x = view_of(x);
  call.residual = view_of(residual);
  call.x1 = view_of(x1);
  set_views(parameters, call);
  call.dropout_p = dropout_p;
  call.eps = eps;
  call.is_rms_norm = is_rms_norm;
  call.zero_centered_weight = zero_centered_weight;
  call.out_dtype = out_dtype;
  call.residual_dtype = residual_dtype;
  const Instance* kernel = nullptr;
  check_status(anyflash_prepare_norm(&call, nullptr, &kernel));

  const ScalarType y_dtype = dtype_of_code(out_dtype);
  const bool stored = residual_dtype != 0;
  const Tensor y = empty(x.sizes(), x, y_dtype), y1 = like_if(weight1.has_value(), x, y_dtype);
  const Tensor residual_out =
      like_if(stored, x, stored ? dtype_of_code(residual_dtype) : x.scalar_type());
  const Sizes leading = x.sizes().slice(0, x.dim() - 1);
  const Tensor rstd = empty(leading, x, ScalarType::Float);
  const Tensor mean =
      is_rms_norm ? empty({0}, x, ScalarType::Float) : empty(leading, x, ScalarType::Float);
  if (x.numel() == 0) return {y, y1, residual_out, mean, rstd};
  Converted converted(parameters, call);
  converted.set_matrix(call.x, x);
  converted.set_matrix(call.residual, residual);
  converted.set_matrix(call.x1, x1);
  NormResults results;
  results.y = view_to_write(y);
  results.y1 = view_to_write(y1);
  results.residual_out = view_to_write(residual_out);
  results.mean = view_to_write(mean);
  results.rstd = view_to_write(rstd);
  const LaunchOn where(x);
  check_status(anyflash_run_norm(kernel, &call, nullptr, &results, where.get()));
  return {y, y1, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const OptionalTensor& dy1, const OptionalTensor& dresidual_out,
    const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, const OptionalTensor& x, double dropout_p,
    bool is_rms_norm, bool zero_centered_weight, bool has_residual, bool has_x1, int64_t x_dtype) {
  const NoGrad no_grad;
  const Parameters parameters{weight, bias, weight1, bias1, rowscale, dropout_mask, dropout_mask1};
  NormCall call;
  call.x = view_of(x);
  set_views(parameters, call);
  call.dropout_p = dropout_p;
  call.is_rms_norm = is_rms_norm;
  call.zero_centered_weight = zero_centered_weight;
  NormGradient grad{view_of(dy),  view_of(dy1),  view_of(dresidual_out),
                    view_of(z),   view_of(mean), view_of(rstd),
                    has_residual, has_x1,        x_dtype};
  const Instance* kernel = nullptr;
  check_status(anyflash_prepare_norm(&call, &grad, &kernel));

  const ScalarType dtype = dtype_of_code(x_dtype);
  const OptionalTensor scaled = rowscale ? x : std::nullopt;
  const bool masked = dropout_mask.has_value();
  const bool own_dresidual = masked || rowscale || dtype != z.scalar_type();
  const Tensor dx = empty(z.sizes(), z, dtype), dx1 = like_if(has_x1 && masked, z, dtype);
  const Tensor dresidual = like_if(has_residual && own_dresidual, z, z.scalar_type());
  const Tensor dweight = sums_for(weight, z), dbias = sums_for(bias, z);
  const Tensor dweight1 = sums_for(weight1, z), dbias1 = sums_for(bias1, z);
  const Tensor drowscale = sums_for(scaled ? rowscale : std::nullopt, z);
  if (z.numel() == 0) {
    for (const Tensor* sums : {&dweight, &dbias, &dweight1, &dbias1}) fill_(*sums, 0.0);
  } else {
    Converted converted(parameters, call);
    converted.set_matrix(call.x, scaled);
    converted.set_matrix(grad.z, z);
    converted.set_matrix(grad.dy, dy);
    converted.set_matrix(grad.dy1, dy1);
    converted.set_matrix(grad.dresidual_out, dresidual_out);
    if (!is_rms_norm) converted.set_numbers(grad.mean, mean);
    converted.set_numbers(grad.rstd, rstd);
    NormResults results;
    results.dx = view_to_write(dx);
    results.dx1 = view_to_write(dx1);
    results.dresidual = view_to_write(dresidual);
    results.dweight = view_to_write(dweight);
    results.dbias = view_to_write(dbias);
    results.dweight1 = view_to_write(dweight1);
    results.dbias1 = view_to_write(dbias1);
    results.drowscale = view_to_write(drowscale);
    const Tensor workspace = empty({anyflash_norm_workspace(&grad, &results)}, z, ScalarType::Byte);
    results.workspace = workspace.mutable_data_ptr();
    const LaunchOn where(z);
    check_status(anyflash_run_norm(kernel, &call, &grad, &results, where.get()));
  }
  const Tensor dscale =
      scaled ? reshape(to_dtype(drowscale, rowscale->scalar_type()), rowscale->sizes())
             : empty({0}, z, z.scalar_type());
  return {dx,
          dx1,
          dresidual,
          finished(dweight, weight, z),
          finished(dbias, bias, z),
          finished(dweight1, weight1, z),
          finished(dbias1, bias1, z),
          dscale};
}

}  // namespace anyflash
