#include <functional>
#include <stdexcept>

#include "catch.h"
#include "core/mlp.h"
#include "views.h"

using namespace anyflash;
using Catch::Matchers::StartsWith;

namespace {

constexpr auto kSiluGate = static_cast<int64_t>(Activation::silu_gate);

struct BiasActivationCase {
  const char* message;
  std::function<void(BiasActivationCall&)> change;
};

const BiasActivationCase kBiasActivationCases[] = {
    {"", [](auto&) {}},
    {"", [](auto& call) { call.bias = {}; }},
    {"", [](auto& call) { call.dy = {}; }},
    {"", [](auto& call) { call.x.sizes[0] = call.dy.sizes[0] = 0; }},
    {"activation: expected 0 to 4, got 5", [](auto& call) { call.activation = 5; }},
    {"activation: expected 0 to 4, got -1", [](auto& call) { call.activation = -1; }},
    {"x: expected fp16, bf16, fp32 or fp64, got int32",
     [](auto& call) { call.x.dtype = ElementType::int32; }},
    {"x: expected (..., columns), 1 to 7 dimensions, got ()",
     [](auto& call) { call.x = make_view({}); }},
    {"x: silu_gate halves the last dimension, expected an even size, got (3, 7)",
     [](auto& call) {
       call.x = make_view({3, 7});
       call.activation = kSiluGate;
     }},
    {"x: expected allocated memory, got a tensor of shape (3, 8)",
     [](auto& call) { call.x = freed(call.x); }},
    {"bias: expected x's dtype fp32, got fp16",
     [](auto& call) { call.bias.dtype = ElementType::fp16; }},
    {"bias: expected (8,), x's last dimension, got (5,)",
     [](auto& call) { call.bias = make_view({5}); }},
    {"bias: expected (8,), x's last dimension, got (1, 8)",
     [](auto& call) { call.bias = make_view({1, 8}); }},
    {"bias must be on cpu: expected cpu like x, got cuda:0",
     [](auto& call) { call.bias = on_gpu(call.bias); }},
    {"bias: expected allocated memory", [](auto& call) { call.bias = freed(call.bias); }},
    {"dy: expected x's dtype fp32, got fp64",
     [](auto& call) { call.dy.dtype = ElementType::fp64, call.dy.storage_bytes *= 2; }},
    {"dy: expected the shape of y for x (3, 8), got (3, 4)",
     [](auto& call) { call.dy = make_view({3, 4}); }},
    {"dy: expected the shape of y for x (3, 8), got (3, 8)",
     [](auto& call) { call.activation = kSiluGate; }},
    {"dy: expected allocated memory", [](auto& call) { call.dy = freed(call.dy); }},
};

struct MlpCase {
  const char* message;
  std::function<void(MlpCall&)> change;
};

const MlpCase kMlpCases[] = {
    {"", [](auto&) {}},
    {"", [](auto& call) { call.bias1 = call.bias2 = call.dout = call.hidden = {}; }},
    {"", [](auto& call) { call.hidden = make_view({0}); }},
    {"activation: expected 0 to 4, got 9", [](auto& call) { call.activation = 9; }},
    {"x: expected (..., in_features), 1 to 7 dimensions, got ()",
     [](auto& call) { call.x = make_view({}); }},
    {"weight1: expected x's dtype fp32, got bf16",
     [](auto& call) { call.weight1.dtype = ElementType::bf16; }},
    {"weight1: expected (hidden, 6) for x (3, 6), got (10, 5)",
     [](auto& call) { call.weight1 = make_view({10, 5}); }},
    {"weight1: silu_gate halves the hidden features, expected an even number of rows, got (9, 6)",
     [](auto& call) {
       call.weight1 = make_view({9, 6});
       call.activation = kSiluGate;
     }},
    {"weight2: expected (out, 5) for weight1 (10, 6), got (4, 10)",
     [](auto& call) { call.activation = kSiluGate; }},
    {"bias1: expected (10,), the rows of weight1, got (1,)",
     [](auto& call) { call.bias1 = make_view({1}); }},
    {"bias1: expected allocated memory", [](auto& call) { call.bias1 = freed(call.bias1); }},
    {"bias2: expected (4,), the rows of weight2, got (10,)",
     [](auto& call) { call.bias2 = make_view({10}); }},
    {"dout: expected x's shape (3, 6) with last dimension 4, got (3, 5)",
     [](auto& call) { call.dout = make_view({3, 5}); }},
    {"hidden: expected x's shape (3, 6) with last dimension 10, or an empty tensor, got (10,)",
     [](auto& call) { call.hidden = make_view({10}); }},
};

}  // namespace

TEST_CASE("core: what bias + activation refuses", "[core]") {
  for (const BiasActivationCase& c : kBiasActivationCases) {
    BiasActivationCall call{make_view({3, 8}), make_view({8}), make_view({3, 8}), 0};
    c.change(call);
    const std::string text = raised_by([&] { check_bias_activation(call); });
    INFO(c.message);
    CHECK_THAT(text, StartsWith(c.message));
    CHECK((text.empty() == (*c.message == '\0')));
  }
}

TEST_CASE("core: what the fused MLP refuses", "[core]") {
  for (const MlpCase& c : kMlpCases) {
    MlpCall call{make_view({3, 6}), make_view({10, 6}), make_view({10}),    make_view({4, 10}),
                 make_view({4}),    make_view({3, 4}),  make_view({3, 10}), 0};
    c.change(call);
    const std::string text = raised_by([&] { check_fused_mlp(call); });
    INFO(c.message);
    CHECK_THAT(text, StartsWith(c.message));
    CHECK((text.empty() == (*c.message == '\0')));
  }
}

TEST_CASE("core: activations by name", "[core]") {
  CHECK(activation_of(std::string("silu_gate")) == Activation::silu_gate);
  CHECK_THROWS_AS(activation_of(std::string("swish")), std::invalid_argument);
  CHECK(raised_by([] { activation_of(std::string("swish")); }) ==
        "activation: expected one of gelu_tanh, gelu_erf, relu, squared_relu, silu_gate, got "
        "'swish'");
}
