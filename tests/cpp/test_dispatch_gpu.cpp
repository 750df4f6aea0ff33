// The kernels for GPUs in instances.def, chosen for every GPU without one.
#include <algorithm>
#include <string>
#include <vector>

#include "catch.h"
#include "dispatch_problems.h"
#include "kernels/arch.h"

using namespace anyflash;

namespace {

int32_t never_run(const void*, void*) { return 0; }

// Code for every generation, as it ships.
constexpr Cubin kCubins[] = {{75, 12000, kCubins, 1},  {80, 12000, kCubins, 1},
                             {90, 12000, kCubins, 1},  {100, 12080, kCubins, 1},
                             {120, 12080, kCubins, 1}, {}};

// The lines of instances.def for GPUs, in this build or not.
const std::vector<Instance>& gpu_instances() {
  static const std::vector<Instance> instances = [] {
    using namespace Feature;
    std::vector<Instance> all;
    const auto add = [&](const char* name, Family family, const Arch& arch, Direction direction,
                         Dtype dtype, int32_t max_head_dim, int32_t multiple, Features features,
                         const char* checked_on) {
      if (arch.device != Device::cuda) return;
      all.push_back({name, family, arch.device, arch.name, arch.min_sm, arch.max_sm, direction,
                     dtype, max_head_dim, multiple, features, checked_on, kCubins, never_run});
    };
#define BIAS_ACTIVATION(...)
#define ROWWISE(...)
#define ATTENTION(arch_name, direction, dtype, max_head_dim, multiple, features, checked_on)   \
  add("attention_" #direction "_" #dtype "_d" #max_head_dim "_" #arch_name, Family::attention, \
      arch::arch_name, Direction::direction, Dtype::dtype, max_head_dim, multiple, features,   \
      #checked_on);
#define KVCACHE_APPEND(arch_name, dtype, checked_on)                                         \
  add("kvcache_append_" #dtype, Family::kvcache_append, arch::arch_name, Direction::forward, \
      Dtype::dtype, 512, 1, 0, #checked_on);
#include "kernels/instances.def"
#undef KVCACHE_APPEND
#undef ROWWISE
#undef ATTENTION
#undef BIAS_ACTIVATION
    return all;
  }();
  return instances;
}

InstanceTable gpu_table() { return {gpu_instances().data(), int32_t(gpu_instances().size())}; }

// The kernel for the problem when `kernel` is named, or the route that runs instead.
std::string kernel_for(Problem problem) {
  problem.order = parse_order("kernel,math");
  problem.explicit_order = true;
  const Choice choice = choose(problem, gpu_table());
  return choice.instance ? choice.instance->name : route_name(choice.route);
}

std::string reasons_against_kernel(Problem problem) {
  problem.order = parse_order("kernel");
  problem.explicit_order = true;
  return reasons(problem, Route::kernel, gpu_table());
}

}  // namespace

TEST_CASE("dispatch: the attention kernels for GPUs, where named", "[dispatch]") {
  for (const int32_t sm : kGpus) {
    for (const Dtype dtype : {Dtype::fp16, Dtype::bf16, Dtype::fp32, Dtype::fp64}) {
      Problem problem = on_gpu(sm);
      problem.dtype = dtype;
      CAPTURE(sm, int(dtype));
      if (sm < 75) {
        CHECK(kernel_for(problem) == "math");
        CHECK(reasons_against_kernel(problem) ==
              "needs sm_75 or newer, this GPU is sm_" + std::to_string(sm));
      } else if (sm < 80 && dtype == Dtype::fp16) {
        CHECK(kernel_for(problem) == "attention_forward_fp16_d64_sm75");
      } else if (sm < 80) {
        CHECK(kernel_for(problem) == "math");
        CHECK(reasons_against_kernel(problem) ==
              std::string("needs fp16, got ") + (dtype == Dtype::bf16   ? "bf16"
                                                 : dtype == Dtype::fp32 ? "fp32"
                                                                        : "fp64"));
      } else if (!cubin_for(kCubins, sm)) {
        CHECK(kernel_for(problem) == "math");
      } else if (dtype == Dtype::fp16 || dtype == Dtype::bf16) {
        const std::string name = dtype == Dtype::fp16 ? "fp16" : "bf16";
        CHECK(kernel_for(problem) == "attention_forward_" + name + "_d64_sm80");
      } else {
        CHECK(kernel_for(problem) == "math");
        CHECK(reasons_against_kernel(problem) ==
              std::string("needs fp16 or bf16, got ") + (dtype == Dtype::fp32 ? "fp32" : "fp64"));
      }
    }
  }
}

TEST_CASE("dispatch: a kernel for GPUs is chosen by itself where its very code has passed",
          "[dispatch]") {
  // sm_80's code on A100, but not on RTX 30; sm_90's.
  constexpr int32_t kOn80[] = {80, 0}, kOn90[] = {90, 0};
  const Cubin kSome[] = {{75, 12000, kCubins, 1},
                         {80, 12000, kCubins, 1, nullptr, 0, kOn80},
                         {90, 12000, kCubins, 1, nullptr, 0, kOn90},
                         {}};
  std::vector<Instance> instances = gpu_instances();
  for (Instance& instance : instances) instance.cubins = kSome;
  for (const int32_t sm : kGpus) {
    CAPTURE(sm);
    const Problem problem = on_gpu(sm, Feature::softcap);  // no routine of PyTorch's does it
    CHECK(choose(problem, gpu_table()).route == Route::math);
    const Choice choice = choose(problem, {instances.data(), int32_t(instances.size())});
    CHECK(choice.route == (sm == 80 || sm == 90 ? Route::kernel : Route::math));
  }
}

TEST_CASE("dispatch: the attention kernel for a GPU that fits head_dim and head_dim_v best",
          "[dispatch]") {
  constexpr struct {
    int32_t head_dim, head_dim_v;
    const char* name;
  } kBest[] = {{1, 1, "d64"},      {20, 20, "d64"},    {64, 64, "d64"},    {65, 65, "d96"},
               {80, 80, "d96"},    {96, 96, "d96"},    {97, 97, "d128"},   {128, 128, "d128"},
               {129, 129, "d192"}, {192, 192, "d192"}, {193, 193, "d256"}, {256, 256, "d256"},
               {64, 128, "d128"},  {192, 128, "d192"}, {40, 256, "d256"}};
  for (const int32_t sm : {80, 86, 89, 90, 100, 120}) {
    for (const auto& best : kBest) {
      Problem problem =
          on_gpu(sm, best.head_dim == best.head_dim_v ? 0 : Feature::unequal_head_dims);
      problem.head_dim = best.head_dim;
      problem.head_dim_v = best.head_dim_v;
      CAPTURE(sm, best.head_dim, best.head_dim_v);
      CHECK(kernel_for(problem) == std::string("attention_forward_fp16_") + best.name + "_sm80");
    }
  }
  for (const auto& best : kBest) {  // sm_75: the next of fewer sizes
    const int32_t largest = std::max(best.head_dim, best.head_dim_v);
    Problem problem = on_gpu(75, best.head_dim == best.head_dim_v ? 0 : Feature::unequal_head_dims);
    problem.head_dim = best.head_dim;
    problem.head_dim_v = best.head_dim_v;
    CAPTURE(best.head_dim, best.head_dim_v);
    CHECK(kernel_for(problem) == std::string("attention_forward_fp16_d") +
                                     (largest <= 64    ? "64"
                                      : largest <= 128 ? "128"
                                                       : "256") +
                                     "_sm75");
  }
}

TEST_CASE("dispatch: what the attention kernels for GPUs compute, and what not", "[dispatch]") {
  using namespace Feature;
  const Features computed = packed | paged | seqused_k | leftpad_k | causal | window | softcap |
                            alibi | bias | sinks | dropout | gqa | unequal_head_dims;
  for (const int32_t sm : {80, 90, 120}) {
    CAPTURE(sm);
    CHECK(kernel_for(on_gpu(sm, computed)) == "attention_forward_fp16_d64_sm80");
    CHECK(kernel_for(on_gpu(sm, (computed & ~paged) | bias_grad | lse_grad | deterministic,
                            Direction::backward)) == "attention_backward_fp16_d64_sm80");
    CHECK(reasons_against_kernel(
              on_gpu(sm, bias | bias_grad | deterministic_bias_grad, Direction::backward)) ==
          "does not support a deterministic gradient for a bias that broadcasts");
    Problem problem = on_gpu(sm, unequal_head_dims);
    problem.head_dim_v = 257;
    CHECK(reasons_against_kernel(problem) == "head_dim_v 257 is above 256");
    problem.head_dim = 264;
    CHECK(reasons_against_kernel(problem) ==
          "head_dim 264 is above 256; head_dim_v 257 is above 256");
  }
}

TEST_CASE("dispatch: the backward on sm_75", "[dispatch]") {
  Problem problem = on_gpu(75, Feature::lse_grad, Direction::backward);
  CHECK(kernel_for(problem) == "attention_backward_fp16_d64_sm75");
  problem.head_dim = problem.head_dim_v = 65;
  CHECK(kernel_for(problem) == "attention_backward_fp16_d128_sm75");
  problem.head_dim = problem.head_dim_v = 129;
  CHECK(reasons_against_kernel(problem) == "head_dim 129 is above 128");
  problem = on_gpu(75, 0, Direction::backward);
  problem.dtype = Dtype::bf16;
  CHECK(reasons_against_kernel(problem) == "needs fp16, got bf16");
}

TEST_CASE("dispatch: a GPU that a build has no machine code for", "[dispatch]") {
  for (const int32_t sm : kGpus) {
    CHECK((cubin_for(kCubins, sm) == nullptr) == (sm < 75 || sm == 87 || sm == 110));
  }
  CHECK(cubin_for(kCubins, 89)->sm == 80);
  CHECK(cubin_for(kCubins, 103)->sm == 100);
  CHECK(cubin_for(nullptr, 80) == nullptr);
  CHECK(reasons_against_kernel(on_gpu(110)) ==
        "this build has machine code for sm_75, sm_80, sm_90, sm_100, sm_120, this GPU is sm_110: "
        "build with ANYFLASH_CUDA_ARCHS=110");
}

TEST_CASE("dispatch: a driver that is too old for the kernels for GPUs", "[dispatch]") {
  constexpr struct {
    int32_t driver;
    const char* refusal;  // null: it runs them
  } kDrivers[] = {
      {0, nullptr},  // not known
      {11040,
       "needs NVIDIA driver R525 (CUDA 12.0) or newer, this is R470 (CUDA 11.4): update the "
       "driver"},
      {11990,
       "needs NVIDIA driver R525 (CUDA 12.0) or newer, this is of a branch that is not known here "
       "(CUDA 11.99): update the driver"},
      {12000, nullptr},
      {12040, nullptr},
      {13000, nullptr},
      {99000, nullptr},
  };
  for (const auto& [driver, refusal] : kDrivers) {
    CAPTURE(driver);
    for (const int32_t sm : {80, 90}) {
      Problem problem = on_gpu(sm);
      problem.driver = driver;
      CHECK(kernel_for(problem) == (refusal ? "math" : "attention_forward_fp16_d64_sm80"));
      if (refusal) CHECK(reasons_against_kernel(problem) == refusal);
    }
  }
  Problem blackwell = on_gpu(120);
  blackwell.driver = 12060;
  CHECK(
      reasons_against_kernel(blackwell) ==
      "needs NVIDIA driver R570 (CUDA 12.8) or newer, this is R560 (CUDA 12.6): update the driver");
  Problem problem = on_gpu(80);  // beside what else is in the way
  problem.head_dim = 264;
  problem.driver = 11040;
  CHECK(reasons_against_kernel(problem) ==
        "head_dim 264 is above 256; needs NVIDIA driver R525 (CUDA 12.0) or newer, this is R470 "
        "(CUDA 11.4): update the driver");
}

TEST_CASE("dispatch: the kernels for GPUs that append to a cache", "[dispatch]") {
  for (const int32_t sm : kGpus) {
    for (const Dtype dtype : {Dtype::fp16, Dtype::bf16, Dtype::fp32}) {
      Problem problem = on_gpu(sm);
      problem.family = Family::kvcache_append;
      problem.features = 0;
      problem.dtype = dtype;
      CAPTURE(sm, int(dtype));
      const std::string found = kernel_for(problem);
      CHECK((found == "math") == !cubin_for(kCubins, sm));
      CHECK(route_of(problem, gpu_table()) == "math");  // not by itself
    }
  }
  Problem problem = on_gpu(90);
  problem.family = Family::kvcache_append;
  problem.features = 0;
  problem.dtype = Dtype::fp64;
  CHECK(reasons_against_kernel(problem) == "needs fp16, bf16 or fp32, got fp64");
}
