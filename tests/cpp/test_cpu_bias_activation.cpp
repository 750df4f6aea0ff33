// Runs kernels/cpu/bias_activation.h, every instance of this build that this CPU has, against a
// float64 reference.
#include <cstring>
#include <limits>
#include <vector>

#include "bias_activation_cases.h"
#include "cpu_instances.h"

using namespace bias_activation_cases;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::Instance;

namespace {

int32_t launch(Dtype dtype, const char* arch, Direction direction, const BiasActivationParams& p,
               const anyflash::CpuThreads* threads = nullptr) {
  const Instance* instance = cpu_instance(Family::bias_activation, direction, dtype, arch);
  return instance ? anyflash_launch(instance, &p, const_cast<anyflash::CpuThreads*>(threads)) : -1;
}

template <typename T>
void check_all(Dtype dtype) {
  for (const char* arch : cpu_archs(Family::bias_activation)) {
    CAPTURE(arch);
    for (int activation = 0; activation < kNumActivations; ++activation) {
      for (const Case& c : kCases) {
        check_case<T>(Activation(activation), c,
                      [&](Direction direction, const BiasActivationParams& p) {
                        return launch(dtype, arch, direction, p);
                      });
      }
    }
  }
}

// Results for one tensor of every kind of number.
struct Results {
  std::vector<float> y, dx;
};

Results results_for(const char* arch, Activation activation, const std::vector<float>& x) {
  const bool gated = activation == Activation::silu_gate;
  const auto cols = int64_t(x.size());
  std::vector<float> in(x), ones(x.size(), 1.f);
  if (gated) in.insert(in.begin(), x.size(), 1.f);  // u = 1
  Results results{std::vector<float>(x.size()), std::vector<float>(in.size())};
  BiasActivationParams p{};
  p.x = in.data();
  p.y = results.y.data();
  p.dy = ones.data();
  p.dx = results.dx.data();
  p.rows = 1;
  p.cols = cols;
  p.activation = activation;
  REQUIRE(launch(Dtype::fp32, arch, Direction::forward, p) == 0);
  REQUIRE(launch(Dtype::fp32, arch, Direction::backward, p) == 0);
  if (gated) results.dx.erase(results.dx.begin(), results.dx.begin() + cols);
  return results;
}

}  // namespace

TEST_CASE("cpu bias_activation: fp16", "[cpu]") { check_all<fp16>(Dtype::fp16); }
TEST_CASE("cpu bias_activation: bf16", "[cpu]") { check_all<bf16>(Dtype::bf16); }
TEST_CASE("cpu bias_activation: fp32", "[cpu]") { check_all<fp32>(Dtype::fp32); }

TEST_CASE("cpu bias_activation: precise over the whole range of numbers", "[cpu]") {
  std::vector<float> x;
  for (int i = -160000; i <= 160000; ++i) x.push_back(float(i) / 8000);
  for (const char* arch : cpu_archs(Family::bias_activation)) {
    for (int i = 0; i < kNumActivations; ++i) {
      const auto activation = Activation(i);
      CAPTURE(arch, i);
      const Results results = results_for(arch, activation, x);
      double worst_y = 0, worst_dx = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        const double y = reference_activation(activation, x[j]);
        const double dx = reference_slope(activation, x[j]);
        worst_y = std::max(worst_y, std::abs(results.y[j] - y) / (1 + std::abs(y)));
        worst_dx = std::max(worst_dx, std::abs(results.dx[j] - dx) / (1 + std::abs(dx)));
      }
      CHECK(worst_y < 4e-7);
      CHECK(worst_dx < 1.5e-6);
    }
  }
}

TEST_CASE("cpu bias_activation: extreme values", "[cpu]") {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {-1e15f, -1e4f, -100.f, -20.f, -0.f, 0.f, 1e-30f,
                                20.f,   100.f, 1e4f,   1e15f, kInf, NAN};
  const size_t finite = x.size() - 2;
  for (const char* arch : cpu_archs(Family::bias_activation)) {
    for (int i = 0; i < kNumActivations; ++i) {
      const auto activation = Activation(i);
      CAPTURE(arch, i);
      const Results results = results_for(arch, activation, x);
      for (size_t j = 0; j < finite; ++j) {
        CAPTURE(x[j]);
        CHECK(results.y[j] == Approx(reference_activation(activation, x[j])).margin(1e-6));
        CHECK(results.dx[j] == Approx(reference_slope(activation, x[j])).margin(1e-6));
      }
      CHECK(results.y[finite] == kInf);
      CHECK(std::isnan(results.y[finite + 1]));
    }
  }
}

TEST_CASE("cpu bias_activation: the same bits for any number of threads", "[cpu]") {
  constexpr int64_t kRows = 700, kCols = 300;
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kCols), dy(kRows * kCols);
  for (float& value : x) value = normal(generator);
  for (float& value : dy) value = normal(generator);
  std::vector<float> workspace(
      size_t(anyflash_bias_activation_workspace(kRows, kCols, Activation::gelu_erf) / 4));
  for (const char* arch : cpu_archs(Family::bias_activation)) {
    std::vector<std::vector<float>> results;
    for (const int32_t num_threads : {1, 2, 3, 7}) {
      std::vector<float> y(x.size()), dx(x.size()), dbias(kCols);
      BiasActivationParams p{};
      p.x = x.data();
      p.bias = x.data();
      p.y = y.data();
      p.dy = dy.data();
      p.dx = dx.data();
      p.dbias = dbias.data();
      p.workspace = workspace.data();
      p.rows = kRows;
      p.cols = p.x_row_stride = p.y_row_stride = p.dy_row_stride = p.dx_row_stride = kCols;
      p.activation = Activation::gelu_erf;
      const anyflash::CpuThreads threads{&parallel_for, num_threads};
      REQUIRE(launch(Dtype::fp32, arch, Direction::forward, p, &threads) == 0);
      REQUIRE(launch(Dtype::fp32, arch, Direction::backward, p, &threads) == 0);
      y.insert(y.end(), dx.begin(), dx.end());
      y.insert(y.end(), dbias.begin(), dbias.end());
      results.push_back(y);
    }
    for (const std::vector<float>& result : results) {
      CHECK(std::memcmp(result.data(), results[0].data(), sizeof(float) * result.size()) == 0);
    }
  }
}

TEST_CASE("cpu bias_activation: an unknown activation and a failing parallel-for are errors",
          "[cpu]") {
  std::vector<float> x(1 << 16), y(1 << 16);
  BiasActivationParams p{};
  p.x = p.dy = x.data();
  p.y = p.dx = y.data();
  p.rows = p.cols = 256;
  p.x_row_stride = p.y_row_stride = p.dy_row_stride = p.dx_row_stride = 256;
  const anyflash::CpuThreads failing{
      [](int64_t, int64_t, int64_t, anyflash::RangeBody, void*) { return int32_t{1}; }, 4};
  for (const char* arch : cpu_archs(Family::bias_activation)) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      p.activation = Activation(kNumActivations);
      CHECK(launch(Dtype::fp32, arch, direction, p) == anyflash::kErrorInvalidParams);
      p.activation = Activation::relu;
      CHECK(launch(Dtype::fp32, arch, direction, p, &failing) == anyflash::kErrorParallelFor);
    }
  }
}
