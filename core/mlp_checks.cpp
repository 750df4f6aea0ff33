#include <stdexcept>

#include "core/checks.h"
#include "core/mlp.h"

namespace anyflash {
namespace {

constexpr const char* kActivationNames[kNumActivations] = {"gelu_tanh", "gelu_erf", "relu",
                                                           "squared_relu", "silu_gate"};

void check_floating(const TensorView& x) {
  AF_CHECK(is_floating(x.dtype), "x: expected fp16, bf16, fp32 or fp64, got ", dtype_text(x));
}

void check_like_x(const TensorView& tensor, const char* name, const TensorView& x) {
  AF_CHECK(tensor.dtype == x.dtype, name, ": expected x's dtype ", dtype_text(x), ", got ",
           dtype_text(tensor));
  check_same_device(x, "x", tensor, name);
  check_allocated(tensor, name);
}

// x's shape with another last dimension.
bool has_rows_of(const TensorView& x, const TensorView& tensor, int64_t columns) {
  bool same = tensor.rank == x.rank && tensor.size(-1) == columns;
  for (int32_t i = 0; same && i + 1 < x.rank; ++i) same = tensor.sizes[i] == x.sizes[i];
  return same;
}

void check_hidden_bias(const TensorView& bias, const char* name, const TensorView& weight,
                       const char* weight_name, const TensorView& x) {
  if (!bias.given()) return;
  check_like_x(bias, name, x);
  AF_CHECK(has_shape(bias, {weight.size(0)}), name, ": expected (", weight.size(0),
           ",), the rows of ", weight_name, ", got ", shape_text(bias));
}

void check_mlp_gradient(const MlpCall& call) {
  const TensorView &x = call.x, &dout = call.dout, &hidden = call.hidden;
  const int64_t out = call.weight2.size(0), width = call.weight1.size(0);
  check_like_x(dout, "dout", x);
  AF_CHECK(has_rows_of(x, dout, out), "dout: expected x's shape ", shape_text(x),
           " with last dimension ", out, ", got ", shape_text(dout));
  check_like_x(hidden, "hidden", x);
  AF_CHECK(hidden.numel() == 0 || has_rows_of(x, hidden, width), "hidden: expected x's shape ",
           shape_text(x), " with last dimension ", width, ", or an empty tensor, got ",
           shape_text(hidden));
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

void check_bias_activation(const BiasActivationCall& call) {
  const TensorView &x = call.x, &bias = call.bias, &dy = call.dy;
  const int64_t per_output = inputs_per_output(activation_of(call.activation));
  check_floating(x);
  AF_CHECK(x.rank >= 1 && x.rank <= 7, "x: expected (..., columns), 1 to 7 dimensions, got ",
           shape_text(x));
  AF_CHECK(x.size(-1) % per_output == 0,
           "x: silu_gate halves the last dimension, expected an even size, got ", shape_text(x));
  check_allocated(x, "x");
  if (bias.given()) {
    check_like_x(bias, "bias", x);
    AF_CHECK(has_shape(bias, {x.size(-1)}), "bias: expected (", x.size(-1),
             ",), x's last dimension, got ", shape_text(bias));
  }
  if (dy.given()) {
    check_like_x(dy, "dy", x);
    AF_CHECK(has_rows_of(x, dy, x.size(-1) / per_output), "dy: expected the shape of y for x ",
             shape_text(x), ", got ", shape_text(dy));
  }
}

void check_fused_mlp(const MlpCall& call) {
  const TensorView &x = call.x, &weight1 = call.weight1, &weight2 = call.weight2;
  const int64_t per_output = inputs_per_output(activation_of(call.activation));
  check_floating(x);
  AF_CHECK(x.rank >= 1 && x.rank <= 7, "x: expected (..., in_features), 1 to 7 dimensions, got ",
           shape_text(x));
  check_allocated(x, "x");
  check_like_x(weight1, "weight1", x);
  check_like_x(weight2, "weight2", x);
  AF_CHECK(weight1.rank == 2 && weight1.size(1) == x.size(-1), "weight1: expected (hidden, ",
           x.size(-1), ") for x ", shape_text(x), ", got ", shape_text(weight1));
  AF_CHECK(weight1.size(0) % per_output == 0,
           "weight1: silu_gate halves the hidden features, expected an even number of rows, got ",
           shape_text(weight1));
  const int64_t hidden = weight1.size(0) / per_output;
  AF_CHECK(weight2.rank == 2 && weight2.size(1) == hidden, "weight2: expected (out, ", hidden,
           ") for weight1 ", shape_text(weight1), ", got ", shape_text(weight2));
  check_hidden_bias(call.bias1, "bias1", weight1, "weight1", x);
  check_hidden_bias(call.bias2, "bias2", weight2, "weight2", x);
  if (call.dout.given()) check_mlp_gradient(call);
}

}  // namespace anyflash
