// Bias + activation: prepare, then the kernel or plain operators.
#include "mlp/bias_activation.h"

#include "operators.h"
#include "stable/aten.h"
#include "stable/grad_mode.h"
#include "stable/view.h"

namespace anyflash {
namespace {

Choice prepare(const BiasActivationCall& call, int64_t backend) {
  const Caller from = caller(backend);
  Choice choice;
  check_status(anyflash_prepare_bias_activation(&call, &from, &choice));
  return choice;
}

// ---- The route `math`: plain operators. Half precision is widened, so that only the result is
// rounded.

ScalarType compute_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  const bool is_half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  return is_half ? ScalarType::Float : dtype;
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

Tensor _bias_activation_forward(const Tensor& x, const OptionalTensor& bias, int64_t activation,
                                int64_t backend) {
  const NoGrad no_grad;
  const BiasActivationCall call{view_of(x), view_of(bias), {}, activation};
  const Choice choice = prepare(call, backend);
  if (choice.route == Route::kernel) {
    return kernel::bias_activation(*choice.instance, x, bias, call);
  }
  const Tensor y = activated(activation_input(x, bias), static_cast<Activation>(activation));
  return contiguous(to_dtype(y, x.scalar_type()));
}

std::tuple<Tensor, Tensor> _bias_activation_backward(const Tensor& dy, const Tensor& x,
                                                     const OptionalTensor& bias, int64_t activation,
                                                     int64_t backend) {
  const NoGrad no_grad;
  const BiasActivationCall call{view_of(x), view_of(bias), view_of(dy), activation};
  const Choice choice = prepare(call, backend);
  const Tensor no_dbias = empty({0}, x, x.scalar_type());
  if (choice.route == Route::kernel) {
    auto [dx, dbias] = kernel::bias_activation_backward(*choice.instance, dy, x, bias, call);
    return {dx, dbias.value_or(no_dbias)};
  }
  const Tensor z = activation_input(x, bias);
  const Tensor dz =
      activation_gradient(to_dtype(dy, z.scalar_type()), z, static_cast<Activation>(activation));
  const Tensor dx = contiguous(to_dtype(dz, x.scalar_type()));
  if (!bias) return {dx, no_dbias};
  std::vector<int64_t> leading(x.dim() - 1);
  for (size_t i = 0; i < leading.size(); ++i) leading[i] = static_cast<int64_t>(i);
  const Tensor dbias = leading.empty() ? dz : sum(dz, leading);
  return {dx, to_dtype(dbias, x.scalar_type())};
}

}  // namespace anyflash
