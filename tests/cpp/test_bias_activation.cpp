// Executes kernels/elementwise/bias_activation.cuh, launchers included, on the CPU (simt.h) against
// a float64 reference.
#include <cstring>
#include <vector>

#include "bias_activation_cases.h"
#include "kernels/elementwise/bias_activation.cuh"

using namespace bias_activation_cases;

namespace {

template <typename T>
int32_t launch(Direction direction, const BiasActivationParams& params) {
  return direction == Direction::forward ? bias_activation::launch_forward<T>(params, nullptr)
                                         : bias_activation::launch_backward<T>(params, nullptr);
}

template <typename T>
void check_all(bool reverse_order) {
  simt::reverse_order = reverse_order;
  for (int activation = 0; activation < kNumActivations; ++activation) {
    for (const Case& c : kCases) check_case<T>(Activation(activation), c, launch<T>);
  }
  simt::reverse_order = false;
}

}  // namespace

TEST_CASE("bias_activation: fp16 on the CPU", "[bias_activation]") { check_all<fp16>(false); }
TEST_CASE("bias_activation: bf16 on the CPU", "[bias_activation]") { check_all<bf16>(false); }
TEST_CASE("bias_activation: fp32 on the CPU", "[bias_activation]") { check_all<fp32>(false); }
TEST_CASE("bias_activation: threads in reverse order", "[bias_activation]") {
  check_all<bf16>(true);
}

TEST_CASE("bias_activation: more row tiles than blocks", "[bias_activation]") {
  check_case<fp32>(Activation::gelu_tanh, {256 * 16 + 37, 3}, launch<fp32>);
}

TEST_CASE("bias_activation: extreme values", "[bias_activation]") {
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
    REQUIRE(bias_activation::launch_forward<fp32>(p, nullptr) == 0);
    REQUIRE(bias_activation::launch_backward<fp32>(p, nullptr) == 0);
    for (int64_t i = 0; i + 1 < kCount; ++i) {
      CHECK(y[i] == Approx(reference_activation(p.activation, inputs[i])).margin(1e-6));
      CHECK(dx[i] == Approx(reference_slope(p.activation, inputs[i])).margin(1e-6));
    }
    CHECK(std::isnan(y[kCount - 1]));
  }
}

TEST_CASE("bias_activation: the bias gradient has the same bits in every run",
          "[bias_activation]") {
  constexpr int64_t kRows = 200, kCols = 40;
  std::vector<float> x(kRows * kCols), dy(kRows * kCols), dx(kRows * kCols), first(kCols),
      again(kCols);
  std::vector<float> workspace(size_t(bias_activation::num_partials(kRows, kCols) * kCols));
  std::mt19937 generator(3);
  for (float& value : x) value = std::normal_distribution<float>()(generator);
  for (float& value : dy) value = std::normal_distribution<float>()(generator);
  for (std::vector<float>* sum : {&first, &again}) {
    simt::reverse_order = sum == &again;
    BiasActivationParams p{};
    p.x = x.data();
    p.dy = dy.data();
    p.dx = dx.data();
    p.dbias = sum->data();
    p.workspace = workspace.data();
    p.rows = kRows;
    p.cols = p.x_row_stride = p.dy_row_stride = p.dx_row_stride = kCols;
    REQUIRE(bias_activation::launch_backward<fp32>(p, nullptr) == 0);
  }
  simt::reverse_order = false;
  CHECK(std::memcmp(first.data(), again.data(), sizeof(float) * kCols) == 0);
}

TEST_CASE("bias_activation: an unknown activation is an error", "[bias_activation]") {
  float value = 0;
  BiasActivationParams p{};
  p.x = p.dy = &value;
  p.y = p.dx = &value;
  p.rows = p.cols = 1;
  p.activation = Activation(kNumActivations);
  CHECK(bias_activation::launch_forward<fp32>(p, nullptr) == anyflash::kErrorInvalidParams);
  CHECK(bias_activation::launch_backward<fp32>(p, nullptr) == anyflash::kErrorInvalidParams);
}

TEST_CASE(
    "bias_activation: the shared-memory stand-in notices a barrier that not all threads reach",
    "[bias_activation]") {
  struct Nothing {};
  const auto diverging = +[](Nothing) {
    if (threadIdx.x == 0) __syncthreads();
  };
  CHECK_THROWS_WITH(anyflash::launch_kernel(diverging, {1, 1, 32}, Nothing{}, nullptr),
                    ContainsSubstring("part of the block"));
}
