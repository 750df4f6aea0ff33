#include "bias_activation.h"
#include "operators.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/dtypes.h"
#include "stable/grad_mode.h"
#include "validate.h"

namespace anyflash {
namespace {

void check_matrix(const Tensor& matrix, const char* name, const Tensor& x) {
  AF_CHECK(dtype_of(matrix) == dtype_of(x), name, ": expected x's dtype ", dtype_text(x), ", got ",
           dtype_text(matrix));
  check_same_device(x, "x", matrix, name);
}

void check_vector(const Tensor& bias, const char* name, int64_t size, const char* owner,
                  const Tensor& x) {
  check_matrix(bias, name, x);
  AF_CHECK(bias.dim() == 1 && bias.size(0) == size, name, ": expected (", size, ",), the rows of ",
           owner, ", got ", shape_text(bias));
}

void validate(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
              const Tensor& weight2, const OptionalTensor& bias2, Activation activation) {
  AF_CHECK(dtypes().is_floating(dtype_of(x)), "x: expected fp16, bf16, fp32 or fp64, got ",
           dtype_text(x));
  AF_CHECK(x.dim() >= 1, "x: expected (..., in_features), got ", shape_text(x));
  const int64_t in = x.size(x.dim() - 1);
  check_matrix(weight1, "weight1", x);
  check_matrix(weight2, "weight2", x);
  AF_CHECK(weight1.dim() == 2 && weight1.size(1) == in, "weight1: expected (hidden, ", in,
           ") for x ", shape_text(x), ", got ", shape_text(weight1));
  const int64_t per_output = inputs_per_output(activation);
  AF_CHECK(weight1.size(0) % per_output == 0,
           "weight1: silu_gate halves the hidden features, expected an even number of rows, got ",
           shape_text(weight1));
  const int64_t hidden = weight1.size(0) / per_output;
  AF_CHECK(weight2.dim() == 2 && weight2.size(1) == hidden, "weight2: expected (out, ", hidden,
           ") for weight1 ", shape_text(weight1), ", got ", shape_text(weight2));
  if (bias1) check_vector(*bias1, "bias1", weight1.size(0), "weight1", x);
  if (bias2) check_vector(*bias2, "bias2", weight2.size(0), "weight2", x);
}

// PyTorch multiplies fp16 matrices on the CPU two orders of magnitude slower than fp32 ones.
bool is_widened(const Tensor& x) { return x.is_cpu() && dtype_of(x) == dtypes().fp16; }

Tensor widen(const Tensor& x) { return is_widened(x) ? to_dtype(x, ScalarType::Float) : x; }

OptionalTensor widen(const OptionalTensor& x) {
  return x ? OptionalTensor(widen(*x)) : std::nullopt;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return aten<Tensor>("aten::linear", "", x, weight, bias);
}

// (..., columns) as (rows, columns). Not left to -1: there may be no columns.
Tensor as_rows(const Tensor& x) {
  int64_t rows = 1;
  const int64_t last = x.dim() - 1;
  for (int64_t i = 0; i < last; ++i) rows *= x.size(i);
  return reshape(x, {rows, x.size(last)});
}

Tensor mm(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::mm", "", a, b); }

// `x`'s shape with another last dimension.
std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return sizes;
}

}  // namespace

std::tuple<Tensor, Tensor> fused_mlp_forward(const Tensor& x, const Tensor& weight1,
                                             const OptionalTensor& bias1, const Tensor& weight2,
                                             const OptionalTensor& bias2, int64_t activation,
                                             bool save_hidden, int64_t backend) {
  const NoGrad no_grad;
  validate(x, weight1, bias1, weight2, bias2, activation_of(activation));
  const Tensor hidden = linear(widen(x), widen(weight1), std::nullopt);
  const Tensor activated = bias_activation(hidden, widen(bias1), activation, backend);
  const Tensor out = linear(activated, widen(weight2), widen(bias2));
  const ScalarType dtype = x.scalar_type();
  return {to_dtype(out, dtype), save_hidden ? to_dtype(hidden, dtype) : empty({0}, x, dtype)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_mlp_backward(
    const Tensor& dout, const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
    const Tensor& weight2, const Tensor& hidden, bool bias2_requires_grad, int64_t activation,
    int64_t backend) {
  const NoGrad no_grad;
  validate(x, weight1, bias1, weight2, std::nullopt, activation_of(activation));
  check_matrix(dout, "dout", x);
  AF_CHECK(dout.dim() == x.dim() && dout.size(dout.dim() - 1) == weight2.size(0) &&
               dout.numel() * x.size(x.dim() - 1) == x.numel() * weight2.size(0),
           "dout: expected x's shape ", shape_text(x), " with last dimension ", weight2.size(0),
           ", got ", shape_text(dout));
  const int64_t hidden_size = weight1.size(0);
  const bool is_saved =
      hidden.numel() > 0 && hidden.dim() == x.dim() && hidden.size(hidden.dim() - 1) == hidden_size;
  AF_CHECK(is_saved || hidden.numel() == 0, "hidden: expected x's shape ", shape_text(x),
           " with last dimension ", hidden_size, ", or an empty tensor, got ", shape_text(hidden));

  const Tensor rows = as_rows(widen(x)), drows = as_rows(widen(dout));
  const Tensor w1 = widen(weight1), w2 = widen(weight2);
  const Tensor z = is_saved ? as_rows(widen(hidden)) : linear(rows, w1, std::nullopt);
  const OptionalTensor b1 = widen(bias1);

  const Tensor dweight2 = mm(transpose(drows, 0, 1), bias_activation(z, b1, activation, backend));
  const auto [dz, dbias1] = bias_activation_backward(mm(drows, w2), z, b1, activation, backend);
  const Tensor dweight1 = mm(transpose(dz, 0, 1), rows);
  const Tensor dx = reshape(mm(dz, w1), with_columns(x, x.size(x.dim() - 1)));
  const ScalarType dtype = x.scalar_type();
  const Tensor dbias2 =
      bias2_requires_grad ? to_dtype(sum(drows, {0}), dtype) : empty({0}, x, dtype);
  return {to_dtype(dx, dtype), to_dtype(dweight1, dtype), to_dtype(dbias1, dtype),
          to_dtype(dweight2, dtype), dbias2};
}

Tensor fused_mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                 const Tensor& weight2, const OptionalTensor& bias2, const std::string& activation,
                 bool recompute) {
  (void)recompute;  // no gradient flows through this operator in C++
  const auto number = static_cast<int64_t>(activation_of(activation));
  return std::get<0>(
      fused_mlp_forward(x, weight1, bias1, weight2, bias2, number, /*save_hidden=*/false, 0));
}

}  // namespace anyflash
