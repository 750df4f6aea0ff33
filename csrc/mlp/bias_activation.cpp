#include "mlp/bias_activation.h"

#include <stdexcept>

#include "operators.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/dtypes.h"
#include "stable/grad_mode.h"
#include "stable/view.h"

namespace anyflash {
namespace {

constexpr const char* kActivationNames[kNumActivations] = {"gelu_tanh", "gelu_erf", "relu",
                                                           "squared_relu", "silu_gate"};

void validate(const Tensor& x, const OptionalTensor& bias, Activation activation) {
  AF_CHECK(dtypes().is_floating(dtype_of(x)), "x: expected fp16, bf16, fp32 or fp64, got ",
           dtype_text(x));
  AF_CHECK(x.dim() >= 1 && x.dim() <= 7, "x: expected (..., columns), 1 to 7 dimensions, got ",
           shape_text(x));
  const int64_t columns = x.size(x.dim() - 1);
  AF_CHECK(columns % inputs_per_output(activation) == 0,
           "x: silu_gate halves the last dimension, expected an even size, got ", shape_text(x));
  if (!bias) return;
  AF_CHECK(dtype_of(*bias) == dtype_of(x), "bias: expected x's dtype ", dtype_text(x), ", got ",
           dtype_text(*bias));
  AF_CHECK(bias->dim() == 1 && bias->size(0) == columns, "bias: expected (", columns,
           ",), x's last dimension, got ", shape_text(*bias));
  check_same_device(x, "x", *bias, "bias");
}

void validate_gradient(const Tensor& dy, const Tensor& x, Activation activation) {
  AF_CHECK(dtype_of(dy) == dtype_of(x), "dy: expected x's dtype ", dtype_text(x), ", got ",
           dtype_text(dy));
  const int64_t last = x.dim() - 1;
  bool fits = dy.dim() == x.dim() && dy.size(last) * inputs_per_output(activation) == x.size(last);
  for (int64_t i = 0; fits && i < last; ++i) fits = dy.size(i) == x.size(i);
  AF_CHECK(fits, "dy: expected the shape of y for x ", shape_text(x), ", got ", shape_text(dy));
  check_same_device(x, "x", dy, "dy");
}

Choice chosen(const Tensor& x, Direction direction, int64_t backend) {
  const TensorView view = view_of(x);
  const Caller from = caller(backend);
  Choice choice;
  check_status(anyflash_choose(&view, Family::bias_activation, direction, &from, &choice));
  return choice;
}

// ---- The route `math`: plain operators. Half precision is widened, so that only the result is
// rounded.

ScalarType compute_dtype(const Tensor& x) {
  return dtypes().is_half(dtype_of(x)) ? ScalarType::Float : x.scalar_type();
}

Tensor activation_input(const Tensor& x, const OptionalTensor& bias) {
  const Tensor wide = to_dtype(x, compute_dtype(x));
  return bias ? add(wide, *bias) : wide;
}

std::pair<Tensor, Tensor> halves(const Tensor& z) {
  const int64_t columns = z.size(z.dim() - 1) / 2;
  return {narrow(z, -1, 0, columns), narrow(z, -1, columns, columns)};
}

// GELU is z * Phi(z). Written out: libtorch leaks the string that its own operator takes as an
// argument (2.10 to 2.15).
constexpr double kTanhScale =
    1.5957691216057308;  // 2 sqrt(2 / pi): (1 + tanh(t / 2)) / 2 = sigmoid(t)
constexpr double kTanhCubic = 0.044715;
constexpr double kInvSqrt2 = 0.70710678118654752;
constexpr double kInvSqrt2Pi = 0.39894228040143268;

Tensor mul_(const Tensor& x, const Tensor& factor) {
  return aten<Tensor>("aten::mul_", "Tensor", x, factor);
}

// constant + factor * x
Tensor affine(double constant, const Tensor& x, double factor) {
  return add(scalar(constant), x, factor);
}

Tensor gelu_probability(const Tensor& z, Activation activation) {
  if (activation == Activation::gelu_erf) {
    return affine(0.5, aten<Tensor>("aten::erf", "", mul(z, kInvSqrt2)), 0.5);
  }
  const Tensor slope = affine(kTanhScale, mul(z, z), kTanhScale * kTanhCubic);
  return aten<Tensor>("aten::sigmoid_", "", mul_(slope, z));
}

Tensor gelu_derivative(const Tensor& z, Activation activation) {
  const Tensor probability = gelu_probability(z, activation);
  if (activation == Activation::gelu_erf) {
    const Tensor density = aten<Tensor>("aten::exp_", "", mul_(mul(z, z), scalar(-0.5)));
    return add(probability, mul_(density, z), kInvSqrt2Pi);
  }
  // p' = p (1 - p) t', multiplied in an order in which 0 meets infinity only where z itself
  // overflows.
  const Tensor slope = affine(kTanhScale, mul(z, z), 3 * kTanhScale * kTanhCubic);
  const Tensor relative = mul_(mul_(affine(1.0, probability, -1.0), slope), z);
  return mul_(affine(1.0, relative, 1.0), probability);
}

Tensor activated(const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::gelu_tanh:
    case Activation::gelu_erf:
      return mul_(gelu_probability(z, activation), z);
    case Activation::relu:
      return aten<Tensor>("aten::relu", "", z);
    case Activation::squared_relu: {
      const Tensor positive = aten<Tensor>("aten::relu", "", z);
      return mul(positive, positive);
    }
    default: {
      const auto [u, gate] = halves(z);
      return mul(u, aten<Tensor>("aten::silu", "", gate));
    }
  }
}

Tensor activation_gradient(const Tensor& dy, const Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::gelu_tanh:
    case Activation::gelu_erf:
      return mul_(gelu_derivative(z, activation), dy);
    case Activation::relu: {
      const Tensor zero = scalar(0.0);
      return aten<Tensor>("aten::where", "self", aten<Tensor>("aten::le", "Tensor", z, zero), zero,
                          dy);
    }
    case Activation::squared_relu:
      return mul(mul(dy, aten<Tensor>("aten::relu", "", z)), 2.0);
    default: {
      const auto [u, gate] = halves(z);
      Tensor dz = empty(z.sizes(), z, z.scalar_type());
      const auto [du, dgate] = halves(dz);
      copy_(du, mul(dy, aten<Tensor>("aten::silu", "", gate)));
      copy_(dgate, aten<Tensor>("aten::silu_backward", "", mul(dy, u), gate));
      return dz;
    }
  }
}

}  // namespace

Activation activation_of(int64_t number) {
  if (number < 0 || number >= kNumActivations) {
    throw std::invalid_argument(
        text("activation: expected 0 to ", kNumActivations - 1, ", got ", number));
  }
  return static_cast<Activation>(number);
}

Activation activation_of(const std::string& name) {
  std::string known;
  for (int32_t i = 0; i < kNumActivations; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
    known += text(i == 0 ? "" : ", ", kActivationNames[i]);
  }
  throw std::invalid_argument(text("activation: expected one of ", known, ", got '", name, "'"));
}

Tensor _bias_activation_forward(const Tensor& x, const OptionalTensor& bias, int64_t activation,
                                int64_t backend) {
  const NoGrad no_grad;
  const Activation act = activation_of(activation);
  validate(x, bias, act);
  const Choice choice = chosen(x, Direction::forward, backend);
  if (choice.route == Route::kernel) {
    return kernel::bias_activation(*choice.instance, x, bias, act);
  }
  return contiguous(to_dtype(activated(activation_input(x, bias), act), x.scalar_type()));
}

std::tuple<Tensor, Tensor> _bias_activation_backward(const Tensor& dy, const Tensor& x,
                                                     const OptionalTensor& bias, int64_t activation,
                                                     int64_t backend) {
  const NoGrad no_grad;
  const Activation act = activation_of(activation);
  validate(x, bias, act);
  validate_gradient(dy, x, act);
  const Choice choice = chosen(x, Direction::backward, backend);
  const Tensor no_dbias = empty({0}, x, x.scalar_type());
  if (choice.route == Route::kernel) {
    auto [dx, dbias] = kernel::bias_activation_backward(*choice.instance, dy, x, bias, act);
    return {dx, dbias.value_or(no_dbias)};
  }
  const Tensor z = activation_input(x, bias);
  const Tensor dz = activation_gradient(to_dtype(dy, z.scalar_type()), z, act);
  const Tensor dx = contiguous(to_dtype(dz, x.scalar_type()));
  if (!bias) return {dx, no_dbias};
  std::vector<int64_t> leading(x.dim() - 1);
  for (size_t i = 0; i < leading.size(); ++i) leading[i] = static_cast<int64_t>(i);
  const Tensor dbias = leading.empty() ? dz : sum(dz, leading);
  return {dx, to_dtype(dbias, x.scalar_type())};
}

}  // namespace anyflash
