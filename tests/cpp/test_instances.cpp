#include <fstream>
#include <regex>
#include <set>
#include <string>

#include "catch.h"
#include "kernels/arch.h"
#include "kernels/launch.h"

using anyflash::Activation;
using anyflash::BiasActivationParams;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::Instance;

namespace {

struct Table {
  Table() { begin_ = anyflash_instances(&count_); }
  const Instance* begin() const { return begin_; }
  const Instance* end() const { return begin_ + count_; }
  int32_t size() const { return count_; }

 private:
  const Instance* begin_;
  int32_t count_ = 0;
};

bool has_gpu() { return std::ifstream("/dev/nvidiactl").good(); }

}  // namespace

TEST_CASE("instances: the table holds the lines of instances.def, or none without CUDA",
          "[instances]") {
  int32_t lines = 0;
#define BIAS_ACTIVATION(arch, direction, dtype, checked_on) ++lines;
#include "kernels/instances.def"
#undef BIAS_ACTIVATION
  CHECK(Table().size() == (anyflash_build_cuda_version() > 0 ? lines : 0));
}

TEST_CASE("instances: names are unique and found", "[instances]") {
  std::set<std::string> names;
  for (const Instance& instance : Table()) {
    CAPTURE(instance.name);
    CHECK(names.insert(instance.name).second);
    CHECK(anyflash_find_instance(instance.name) == &instance);
    CHECK(std::regex_match(
        instance.name,
        std::regex(
            "(attention|bias_activation)_(forward|backward)_(fp16|bf16|fp32)(_\\d+)?_sm\\d+a?")));
  }
  CHECK(anyflash_find_instance("no such kernel") == nullptr);
}

TEST_CASE("instances: what can be chosen for a problem is unique", "[instances]") {
  std::set<std::string> keys;
  for (const Instance& instance : Table()) {
    const std::string key = std::to_string(int(instance.family)) + instance.arch +
                            std::to_string(int(instance.direction)) + "/" +
                            std::to_string(int(instance.dtype)) + "/" +
                            std::to_string(instance.head_dim);
    CHECK(keys.insert(key).second);
  }
}

TEST_CASE("instances: each names the GPU it was checked on, or none", "[instances]") {
  for (const Instance& instance : Table()) {
    CHECK(!std::string(instance.checked_on).empty());
    CHECK(instance.min_sm <= instance.max_sm);
    CHECK(instance.run != nullptr);
  }
}

TEST_CASE("instances: architectures", "[instances]") {
  CHECK(!anyflash::kSm75.runs_on(70));
  for (const int32_t sm : {75, 80, 86, 89, 90, 100, 103, 110, 120, 121})
    CHECK(anyflash::kSm75.runs_on(sm));
}

TEST_CASE("launch: null arguments are an error", "[launch]") {
  CHECK(anyflash_launch(nullptr, nullptr, nullptr) == anyflash::kErrorInvalidParams);
  CHECK(std::string(anyflash_error_string(anyflash::kErrorInvalidParams)) ==
        "invalid kernel parameters");
  CHECK(!std::string(anyflash_error_string(0)).empty());
}

TEST_CASE("launch: nothing to compute needs no GPU", "[launch]") {
  for (const Instance& instance : Table()) {
    if (instance.family != Family::bias_activation) continue;
    BiasActivationParams params{};
    params.activation = Activation::silu_gate;
    CAPTURE(instance.name);
    CHECK(instance.run(&params, nullptr) == 0);
  }
}

TEST_CASE("launch: without a driver, an error with a text", "[launch]") {
  if (has_gpu()) {
    WARN("skipped: this machine has a GPU");
    return;
  }
  CHECK(anyflash_device_sm(0) == anyflash::kErrorNoCuda);
  CHECK(std::string(anyflash_error_string(anyflash::kErrorNoCuda)) == "no CUDA device");
  float x[4] = {}, y[4] = {};
  for (const Instance& instance : Table()) {
    if (instance.family != Family::bias_activation) continue;
    BiasActivationParams params{};
    params.x = params.dy = x;
    params.y = params.dx = y;
    params.rows = params.cols = 1;
    CAPTURE(instance.name);
    const int32_t code = anyflash_launch(&instance, &params, nullptr);
    CHECK(code > 0);
    CHECK_THAT(std::string(anyflash_error_string(code)), ContainsSubstring("driver"));
  }
}

TEST_CASE("launch: workspace of the bias gradient", "[launch]") {
  CHECK(anyflash_bias_activation_workspace(0, 100, Activation::relu) == 0);
  CHECK(anyflash_bias_activation_workspace(1, 100, Activation::relu) == 400);
  CHECK(anyflash_bias_activation_workspace(16, 100, Activation::silu_gate) == 800);
  CHECK(anyflash_bias_activation_workspace(8192, 4096, Activation::gelu_tanh) == 128 * 4096 * 4);
  CHECK(anyflash_bias_activation_workspace(1 << 30, 1, Activation::gelu_tanh) == 256 * 4);
  const int64_t wide = int64_t{1} << 31;
  CHECK(anyflash_bias_activation_workspace(17, wide, Activation::relu) == wide * 4);
}
