// The fused MLP: matrix products by PyTorch around bias + activation.
#include <algorithm>

#include "operators.h"
#include "stable/aten.h"
#include "stable/grad_mode.h"
#include "stable/view.h"

namespace anyflash {
namespace {

// PyTorch multiplies fp16 matrices on the CPU two orders of magnitude slower than fp32 ones.
bool is_widened(const Tensor& x) { return x.is_cpu() && x.scalar_type() == ScalarType::Half; }

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

// What the backward gives beside dbias2; dbias1 is empty without bias1.
struct Gradients {
  Tensor dx, dweight1, dbias1, dweight2;
};

// From act's input before its bias, z (rows, per_output * hidden), which it uses up.
Gradients differentiate(const Tensor& drows, const Tensor& rows, Tensor z, const Tensor& weight1,
                        const OptionalTensor& bias1, const Tensor& weight2, int64_t activation,
                        int64_t backend) {
  const Tensor dweight2 =
      mm(transpose(drows, 0, 1), _bias_activation_forward(z, bias1, activation, backend));
  const auto [dz, dbias1] =
      _bias_activation_backward(mm(drows, weight2), z, bias1, activation, backend);
  z = Tensor();
  return {mm(dz, weight1), mm(transpose(dz, 0, 1), rows), dbias1, dweight2};
}

// The same where z was not saved. An MLP is a sum over slices of its hidden features: going through
// them one by one, no tensor of the hidden width is ever whole. More slices would save little more
// and round dx, their sum, more often.
Gradients recompute(const Tensor& drows, const Tensor& rows, const Tensor& weight1,
                    const OptionalTensor& bias1, const Tensor& weight2, int64_t activation,
                    int64_t backend) {
  constexpr int64_t kSlices = 4;
  const int64_t per_output = inputs_per_output(static_cast<Activation>(activation));
  const int64_t hidden = weight2.size(1), in = rows.size(1);
  const ScalarType dtype = rows.scalar_type();
  Gradients sum{full({rows.size(0), in}, 0.0, rows, dtype),
                empty({per_output * hidden, in}, rows, dtype),
                empty({bias1 ? per_output * hidden : 0}, rows, dtype),
                empty({weight2.size(0), hidden}, rows, dtype)};
  int64_t width = (hidden + kSlices - 1) / kSlices;
  for (int64_t start = 0; start < hidden; start += width) {
    width = std::min(width, hidden - start);
    // Rows of weight1 or elements of bias1; silu_gate takes a slice of either half.
    const auto slice = [&](const Tensor& x, int64_t columns) {
      return narrow(reshape(x, {per_output, hidden, columns}), 1, start, width);
    };
    const Tensor w1 = reshape(slice(weight1, in), {per_output * width, in});
    const OptionalTensor b1 =
        bias1 ? OptionalTensor(reshape(slice(*bias1, 1), {per_output * width})) : std::nullopt;
    const Gradients part = differentiate(drows, rows, linear(rows, w1, std::nullopt), w1, b1,
                                         narrow(weight2, 1, start, width), activation, backend);
    sum.dx = add(sum.dx, part.dx);
    copy_(slice(sum.dweight1, in), reshape(part.dweight1, {per_output, width, in}));
    if (bias1) copy_(slice(sum.dbias1, 1), reshape(part.dbias1, {per_output, width, 1}));
    copy_(narrow(sum.dweight2, 1, start, width), part.dweight2);
  }
  return sum;
}

// `x`'s shape with another last dimension.
std::vector<int64_t> with_columns(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  return sizes;
}

MlpCall views_of(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                 const Tensor& weight2, int64_t activation) {
  MlpCall call;
  call.x = view_of(x);
  call.weight1 = view_of(weight1);
  call.bias1 = view_of(bias1);
  call.weight2 = view_of(weight2);
  call.activation = activation;
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> _fused_mlp_forward(const Tensor& x, const Tensor& weight1,
                                              const OptionalTensor& bias1, const Tensor& weight2,
                                              const OptionalTensor& bias2, int64_t activation,
                                              bool save_hidden, int64_t backend) {
  const NoGrad no_grad;
  MlpCall call = views_of(x, weight1, bias1, weight2, activation);
  call.bias2 = view_of(bias2);
  check_status(anyflash_check_fused_mlp(&call));
  const ScalarType dtype = x.scalar_type();
  Tensor hidden = linear(widen(x), widen(weight1), std::nullopt);
  const Tensor activated = _bias_activation_forward(hidden, widen(bias1), activation, backend);
  hidden = save_hidden ? to_dtype(hidden, dtype) : empty({0}, x, dtype);
  return {to_dtype(linear(activated, widen(weight2), widen(bias2)), dtype), hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> _fused_mlp_backward(
    const Tensor& dout, const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
    const Tensor& weight2, const Tensor& hidden, bool bias2_requires_grad, int64_t activation,
    int64_t backend) {
  const NoGrad no_grad;
  MlpCall call = views_of(x, weight1, bias1, weight2, activation);
  call.dout = view_of(dout);
  call.hidden = view_of(hidden);
  check_status(anyflash_check_fused_mlp(&call));
  const bool is_saved = hidden.numel() > 0;

  const Tensor rows = as_rows(widen(x)), drows = as_rows(widen(dout));
  const Tensor w1 = widen(weight1), w2 = widen(weight2);
  const OptionalTensor b1 = widen(bias1);

  const auto [dx, dweight1, dbias1, dweight2] =
      is_saved ? differentiate(drows, rows, as_rows(widen(hidden)), w1, b1, w2, activation, backend)
               : recompute(drows, rows, w1, b1, w2, activation, backend);
  const ScalarType dtype = x.scalar_type();
  const Tensor dbias2 =
      bias2_requires_grad ? to_dtype(sum(drows, {0}), dtype) : empty({0}, x, dtype);
  return {to_dtype(reshape(dx, with_columns(x, x.size(x.dim() - 1))), dtype),
          to_dtype(dweight1, dtype), to_dtype(dbias1, dtype), to_dtype(dweight2, dtype), dbias2};
}

Tensor fused_mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                 const Tensor& weight2, const OptionalTensor& bias2, const std::string& activation,
                 bool recompute) {
  (void)recompute;  // no gradient flows through this operator in C++
  int64_t number = 0;
  check_status(anyflash_activation(activation.c_str(), &number));
  return std::get<0>(
      _fused_mlp_forward(x, weight1, bias1, weight2, bias2, number, /*save_hidden=*/false, 0));
}

}  // namespace anyflash
