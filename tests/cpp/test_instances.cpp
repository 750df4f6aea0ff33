#include <algorithm>
#include <fstream>
#include <regex>
#include <set>
#include <string>

#include "anyflash/kernels.h"
#include "catch.h"
#include "kernels/driver.h"

using anyflash::Activation;
using anyflash::Arch;
using anyflash::AttentionParams;
using anyflash::BiasActivationParams;
using anyflash::CrossEntropyParams;
using anyflash::Cubin;
using anyflash::Device;
using anyflash::Direction;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::Instance;
using anyflash::KvcacheAppendParams;
using anyflash::NormParams;
using anyflash::RotaryParams;

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

#if defined(__x86_64__)
constexpr bool kBuildsForX86 = true, kBuildsForArm = false;
#elif defined(__aarch64__)
constexpr bool kBuildsForX86 = false, kBuildsForArm = true;
#else
constexpr bool kBuildsForX86 = false, kBuildsForArm = false;
#endif

bool has_gpu() { return std::ifstream("/dev/nvidiactl").good(); }

}  // namespace

TEST_CASE("instances: the table holds the lines of instances.def for this build's devices",
          "[instances]") {
  const int32_t family = kBuildsForX86 ? 100 : kBuildsForArm ? 200 : -1;
  // A build with CUDA has plain kernels, and those for newer GPUs where their code was asked for.
  const auto is_there = [](const Arch& arch) {
    const Table table;
    return std::any_of(table.begin(), table.end(), [&](const Instance& instance) {
      return std::string(instance.arch) == arch.name;
    });
  };
  CHECK(is_there(anyflash::kSm75) == (std::string(anyflash_build_nvrtc()) != ""));
  const auto is_built = [&](const Arch& arch) {
    return arch.device == Device::cuda ? is_there(arch) : arch.min_sm / 100 * 100 == family;
  };
  int32_t lines = 0;
#define BIAS_ACTIVATION(arch_name, direction, dtype, checked_on) \
  lines += is_built(anyflash::arch::arch_name);
#define ATTENTION(arch_name, ...) lines += is_built(anyflash::arch::arch_name);
#define KVCACHE_APPEND(arch_name, ...) lines += is_built(anyflash::arch::arch_name);
#define ROWWISE(arch_name, ...) lines += is_built(anyflash::arch::arch_name);
#include "kernels/instances.def"
#undef ROWWISE
#undef KVCACHE_APPEND
#undef ATTENTION
#undef BIAS_ACTIVATION
  CHECK(Table().size() == lines);
}

TEST_CASE("instances: names are unique and found", "[instances]") {
  std::set<std::string> names;
  for (const Instance& instance : Table()) {
    CAPTURE(instance.name);
    CHECK(names.insert(instance.name).second);
    CHECK(anyflash_find_instance(instance.name) == &instance);
    CHECK(std::regex_match(instance.name,
                           std::regex("(attention|bias_activation|kvcache_append|rotary|norm|"
                                      "cross_entropy)_(forward|backward)_(fp16|bf16|fp32)(_d\\d+)?_"
                                      "(sm\\d+a?|avx2|avx512|avx512bf16|amx|neon)")));
  }
  CHECK(anyflash_find_instance("no such kernel") == nullptr);
}

TEST_CASE("instances: what can be chosen for a problem is unique", "[instances]") {
  std::set<std::string> keys;
  for (const Instance& instance : Table()) {
    const std::string key = std::to_string(int(instance.family)) + instance.arch +
                            std::to_string(int(instance.direction)) + "/" +
                            std::to_string(int(instance.dtype)) + "/" +
                            std::to_string(instance.max_head_dim);
    CHECK(keys.insert(key).second);
  }
}

TEST_CASE("instances: each names the device it was checked on, or none", "[instances]") {
  for (const Instance& instance : Table()) {
    CHECK(!std::string(instance.checked_on).empty());
    CHECK(instance.min_sm <= instance.max_sm);
    CHECK(instance.head_dim_multiple > 0);
    CHECK(instance.run != nullptr);
  }
}

TEST_CASE("instances: those for GPUs have code for ever newer ones, then an end", "[instances]") {
  for (const Instance& instance : Table()) {
    CAPTURE(instance.name);
    REQUIRE((instance.cubins != nullptr) == (instance.device == Device::cuda));
    if (!instance.cubins) continue;
    CHECK(instance.cubins->data != nullptr);
    int32_t last = instance.min_sm - 1;
    for (const Cubin* cubin = instance.cubins; cubin->data; last = cubin++->sm) {
      CHECK(cubin->sm > last);
      CHECK(cubin->bytes > 0);
      CHECK(cubin->min_driver >= anyflash::driver::kOldestVersion);
    }
  }
}

TEST_CASE("instances: architectures", "[instances]") {
  CHECK(!anyflash::kSm75.runs_on(70));
  CHECK(!anyflash::kSm80.runs_on(75));
  CHECK(anyflash::kSm75.runs_on(75));
  for (const int32_t sm : {80, 86, 89, 90, 100, 103, 110, 120, 121}) {
    CHECK(anyflash::kSm75.runs_on(sm));
    CHECK(anyflash::kSm80.runs_on(sm));
  }
}

TEST_CASE("launch: null arguments are an error", "[launch]") {
  CHECK(anyflash_launch(nullptr, nullptr, nullptr) == anyflash::kErrorInvalidParams);
  CHECK(std::string(anyflash_error_string(anyflash::kErrorNoMemory)) == "out of memory");
  CHECK(std::string(anyflash_error_string(anyflash::kErrorInvalidParams)) ==
        "invalid kernel parameters");
  CHECK(!std::string(anyflash_error_string(0)).empty());
}

TEST_CASE("launch: nothing to compute needs no GPU", "[launch]") {
  BiasActivationParams bias_activation{};
  bias_activation.activation = Activation::silu_gate;
  const KvcacheAppendParams kvcache_append{};
  AttentionParams attention{};
  attention.heads = attention.heads_k = 1;
  attention.head_dim = attention.head_dim_v = 8;
  const RotaryParams rotary{};
  const NormParams norm{};
  const CrossEntropyParams cross_entropy{};
  const void* const params[] = {&attention, &bias_activation, &kvcache_append, &rotary,
                                &norm,      &cross_entropy};  // by Family
  for (const Instance& instance : Table()) {
    CAPTURE(instance.name);
    CHECK(instance.run(params[int(instance.family)], nullptr) == 0);
  }
}

TEST_CASE("launch: without a driver, an error with a text", "[launch]") {
  if (has_gpu()) {
    WARN("skipped: this machine has a GPU");
    return;
  }
  CHECK(anyflash_device_sm(0) == anyflash::kErrorNoCuda);
  CHECK_THAT(std::string(anyflash_error_string(anyflash::kErrorNoCuda)),
             ContainsSubstring("no NVIDIA driver: libcuda.so.1"));
  alignas(16) float x[4] = {}, y[4] = {};
  BiasActivationParams bias_activation{};
  bias_activation.x = bias_activation.dy = x;
  bias_activation.y = bias_activation.dx = y;
  bias_activation.rows = bias_activation.cols = 1;
  KvcacheAppendParams kvcache_append{};
  kvcache_append.batch = kvcache_append.seqlen_new = kvcache_append.page_size = 1;
  kvcache_append.head_dim = kvcache_append.head_dim_v = 8;
  AttentionParams attention{};
  attention.batch = attention.heads = attention.heads_k = 1;
  attention.seqlen_q = attention.seqlen_k = 1;
  attention.head_dim = attention.head_dim_v = 8;
  attention.workspace = x;  // which nobody comes to
  const void* const params[] = {&attention, &bias_activation, &kvcache_append};  // by Family
  for (const Instance& instance : Table()) {
    if (instance.device != Device::cuda) continue;
    CAPTURE(instance.name);
    const int32_t code = anyflash_launch(&instance, params[int(instance.family)], nullptr);
    CHECK(code == anyflash::kErrorNoCuda);
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

TEST_CASE("find_kernel: the best that the machine runs, or the reason", "[instances]") {
  const auto find = [](Dtype dtype, int32_t head_dim) {
    return anyflash_find_kernel(Family::attention, Direction::forward, dtype, Device::cpu,
                                head_dim);
  };
  const int32_t isa = anyflash_cpu_isa();
  for (const Instance& instance : Table()) {
    if (instance.device != Device::cpu || !anyflash::contains(isa, instance.min_sm)) continue;
    CAPTURE(instance.name);
    const Instance* found =
        anyflash_find_kernel(instance.family, instance.direction, instance.dtype, Device::cpu);
    REQUIRE(found != nullptr);
    CHECK(found->family == instance.family);
    CHECK(found->direction == instance.direction);
    CHECK(found->dtype == instance.dtype);
    CHECK(found->min_sm >= instance.min_sm);
    CHECK(anyflash::contains(isa, found->min_sm));
  }
  if (isa == anyflash::Isa::none) return;
  CHECK(find(Dtype::fp32, 512) != nullptr);
  CHECK(find(Dtype::fp32, 513) == nullptr);
  CHECK(std::string(anyflash_text()).find("head_dim") != std::string::npos);
  CHECK(find(Dtype::fp64, 64) == nullptr);
  CHECK(std::string(anyflash_text()).find("fp64") != std::string::npos);
}
