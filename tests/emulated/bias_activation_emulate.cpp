// The bias-activation kernels on the emulator: the cases of the CPU's kernels, with the threads of
// a block in three orders.
#include <cstring>
#include <vector>

#include "tests/cpp/bias_activation_cases.h"
#include "tests/emulated/launch.h"

using namespace bias_activation_cases;
using anyflash::emulated::kOrders;

namespace {

int32_t launch(const char* dtype, Direction direction, const BiasActivationParams& params) {
  const char* name = direction == Direction::forward ? "forward_" : "backward_";
  return anyflash::emulated::launch(std::string("bias_activation_") + name + dtype + "_sm75",
                                    &params);
}

template <typename T>
void check(const char* dtype, Activation activation, const Case& c) {
  check_case<T>(activation, c, [=](Direction direction, const BiasActivationParams& params) {
    return launch(dtype, direction, params);
  });
  CHECK(emu::take_result().text() == "");
}

template <typename T>
void check_all(const char* dtype) {
  for (int activation = 0; activation < kNumActivations; ++activation) {
    for (const Case& c : kCases) {
      for (const emu::Order order : kOrders) {
        CAPTURE(int(order));
        emu::options().order = order;
        check<T>(dtype, Activation(activation), c);
      }
    }
  }
}

}  // namespace

TEST_CASE("emulated bias_activation: fp16") { check_all<fp16>("fp16"); }
TEST_CASE("emulated bias_activation: bf16") { check_all<bf16>("bf16"); }
TEST_CASE("emulated bias_activation: fp32") { check_all<fp32>("fp32"); }

TEST_CASE("emulated bias_activation: more row tiles than blocks") {
  check<fp32>("fp32", Activation::gelu_tanh, {256 * 16 + 37, 3});
}

TEST_CASE("emulated bias_activation: extreme values") {
  const float inputs[] = {-1e4f, -100.f, -20.f, -0.f, 0.f, 1e-30f, 20.f, 100.f, 1e4f, NAN};
  constexpr int64_t kCount = sizeof(inputs) / sizeof(float);
  for (int activation = 0; activation < kNumActivations - 1; ++activation) {
    CAPTURE(activation);
    float y[kCount], dx[kCount], dy[kCount];
    for (float& value : dy) value = 1.f;
    BiasActivationParams p{};
    p.x = inputs;
    p.y = y;
    p.dy = dy;
    p.dx = dx;
    p.rows = 1;
    p.cols = kCount;
    p.activation = Activation(activation);
    REQUIRE(launch("fp32", Direction::forward, p) == 0);
    REQUIRE(launch("fp32", Direction::backward, p) == 0);
    CHECK(emu::take_result().text() == "");
    for (int64_t i = 0; i + 1 < kCount; ++i) {
      CHECK(y[i] == Approx(reference_activation(p.activation, inputs[i])).margin(1e-6));
      CHECK(dx[i] == Approx(reference_slope(p.activation, inputs[i])).margin(1e-6));
    }
    CHECK(std::isnan(y[kCount - 1]));
  }
}

TEST_CASE("emulated bias_activation: the bias gradient has the same bits in every order") {
  constexpr int64_t kRows = 200, kCols = 40;
  std::vector<float> x(kRows * kCols), dy(kRows * kCols), dx(kRows * kCols), first;
  std::vector<float> workspace(size_t(bias_activation::num_partials(kRows, kCols) * kCols));
  std::mt19937 generator(3);
  for (float& value : x) value = std::normal_distribution<float>()(generator);
  for (float& value : dy) value = std::normal_distribution<float>()(generator);
  for (const emu::Order order : kOrders) {
    CAPTURE(int(order));
    emu::options().order = order;
    std::vector<float> sum(kCols);
    BiasActivationParams p{};
    p.x = x.data();
    p.dy = dy.data();
    p.dx = dx.data();
    p.dbias = sum.data();
    p.workspace = workspace.data();
    p.rows = kRows;
    p.cols = p.x_row_stride = p.dy_row_stride = p.dx_row_stride = kCols;
    REQUIRE(launch("fp32", Direction::backward, p) == 0);
    if (first.empty()) first = sum;
    CHECK(std::memcmp(first.data(), sum.data(), sizeof(float) * kCols) == 0);
  }
  CHECK(emu::take_result().text() == "");
}

TEST_CASE("emulated bias_activation: an unknown activation is an error") {
  float value = 0;
  BiasActivationParams p{};
  p.x = p.dy = &value;
  p.y = p.dx = &value;
  p.rows = p.cols = 1;
  p.activation = Activation(kNumActivations);
  CHECK(launch("fp32", Direction::forward, p) == anyflash::kErrorInvalidParams);
  CHECK(launch("fp32", Direction::backward, p) == anyflash::kErrorInvalidParams);
}
