#include "mlp/bias_activation.h"
#include "stable/contiguous_rows.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash::kernel {
namespace {

// What a kernel reads; lives until it has run.
struct Converted {
  Converted(const Tensor& x, const OptionalTensor& bias, BiasActivationCall& call)
      : x(as_matrix(x)), bias(bias ? OptionalTensor(contiguous(*bias)) : bias) {
    call.x = view_of(this->x);
    call.bias = view_of(this->bias);
  }
  Tensor x;
  OptionalTensor bias;
};

int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

}  // namespace

Tensor bias_activation(const Instance& instance, const Tensor& x, const OptionalTensor& bias,
                       BiasActivationCall call) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= inputs_per_output(static_cast<Activation>(call.activation));
  Tensor y = empty(sizes, x, x.scalar_type());
  if (y.numel() == 0) return y;
  const Converted converted(x, bias, call);
  BiasActivationResults results;
  results.y = view_to_write(y);
  const LaunchOn where(x);
  check_status(anyflash_run_bias_activation(&instance, &call, &results, where.get()));
  return y;
}

std::pair<Tensor, OptionalTensor> bias_activation_backward(const Instance& instance,
                                                           const Tensor& dy, const Tensor& x,
                                                           const OptionalTensor& bias,
                                                           BiasActivationCall call) {
  Tensor dx = empty(x.sizes(), x, x.scalar_type());
  OptionalTensor dbias;
  if (bias) dbias = empty({columns_of(x)}, x, x.scalar_type());
  if (x.numel() == 0) {
    if (dbias) fill_(*dbias, 0.0);
    return {dx, dbias};
  }
  const Converted converted(x, bias, call);
  const Tensor gradient = as_matrix(dy);
  call.dy = view_of(gradient);
  BiasActivationResults results;
  results.dx = view_to_write(dx);
  OptionalTensor workspace;
  if (dbias) {
    results.dbias = view_to_write(*dbias);
    const int64_t bytes = anyflash_bias_activation_workspace(
        x.numel() / columns_of(x), columns_of(dy), static_cast<Activation>(call.activation));
    workspace = empty({bytes}, x, ScalarType::Byte);
    results.workspace = workspace->mutable_data_ptr();
  }
  const LaunchOn where(x);
  check_status(anyflash_run_bias_activation(&instance, &call, &results, where.get()));
  return {dx, dbias};
}

}  // namespace anyflash::kernel
