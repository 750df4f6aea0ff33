// The decision with records of GPUs that nobody has seen: those of tests/cpp/records/core.
#include <string>

#include "catch.h"
#include "dispatch_problems.h"

using namespace anyflash;

extern "C" const Instance* anyflash_instances(int32_t* count) {
  *count = 0;
  return nullptr;
}

namespace {

int32_t never_run(const void*, void*) { return 0; }

constexpr int32_t kPassed[] = {80, 103, 120, 0};
constexpr Cubin kCubins[] = {{80, 12000, kCubins, 1, nullptr, 0, kPassed},
                             {100, 12080, kCubins, 1, nullptr, 0, kPassed},
                             {120, 12080, kCubins, 1, nullptr, 0, kPassed},
                             {}};

Instance instance(Family family, Direction direction, Dtype dtype) {
  using namespace Feature;
  const Features features = direction == Direction::forward ? every_forward : every_backward;
  return {"a kernel", family, Device::cuda, "sm80", 80,      9999,     direction, dtype,
          256,        1,      features,     "code", kCubins, never_run};
}

// Kernels that have passed on these GPUs.
const Instance kInstances[] = {
    instance(Family::attention, Direction::forward, Dtype::fp16),
    instance(Family::attention, Direction::forward, Dtype::bf16),
    instance(Family::attention, Direction::backward, Dtype::fp16),
    instance(Family::kvcache_append, Direction::forward, Dtype::fp16),
};
constexpr InstanceTable kTable{kInstances, 4};

Problem with(Problem problem, Dtype dtype, int32_t head_dim) {
  problem.dtype = dtype;
  problem.head_dim = problem.head_dim_v = head_dim;
  return problem;
}

}  // namespace

TEST_CASE("records: a route that has passed comes first on such a GPU", "[dispatch]") {
  constexpr struct {
    int32_t sm, torch_version;
    const char* route;
  } kCases[] = {{90, 211, "aten_cudnn"},  {90, 213, "aten_cudnn"},    {90, 210, "aten_flash"},
                {100, 211, "aten_flash"}, {103, 211, "aten_flash"},   {120, 211, "aten_flash"},
                {80, 211, "aten_flash"},  {75, 211, "aten_efficient"}};
  for (const auto& [sm, torch_version, route] : kCases) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      Problem problem = on_gpu(sm, 0, direction);
      problem.torch_version = torch_version;
      CAPTURE(sm, torch_version, int(direction));
      for (const char* order : {"kernel,sdpa,math", "sdpa"}) {
        problem.order = parse_order(order);
        CHECK(route_of(problem) == route);
      }
      problem.order = parse_order("aten_flash,sdpa");  // what is named comes first all the same
      CHECK(route_of(problem) == (sm < 80 ? "aten_efficient" : "aten_flash"));
      problem.order = parse_order("aten_cudnn");  // by name wherever it runs
      CHECK(route_of(problem) == (sm < 90 ? "none" : "aten_cudnn"));
    }
  }
}

TEST_CASE("records: what is said against a route that has not passed", "[dispatch]") {
  const auto against = [](int32_t sm, int32_t torch_version, Features features = 0) {
    Problem problem = on_gpu(sm, features);
    problem.torch_version = torch_version;
    return reasons(problem, Route::aten_cudnn);
  };
  CHECK(against(90, 211) == "");
  CHECK(against(90, 210) ==
        "has not been checked on sm_90 with torch 2.10 yet; naming `aten_cudnn` selects it all the "
        "same");
  CHECK(against(100, 213) ==
        "has not been checked on sm_100 with torch 2.13 yet; naming `aten_cudnn` selects it all "
        "the same");
  // What it cannot do is the reason that counts.
  CHECK(against(80, 211) == "needs sm_90 or newer, this GPU is sm_80");
  CHECK(against(90, 208) == "needs torch 2.9, this is 2.8");
  CHECK(against(90, 211, Feature::causal) == "does not support a causal mask");
  CHECK(against(100, 211, Feature::causal) == "does not support a causal mask");
}

TEST_CASE("records: a kernel for GPUs is chosen where it is measured as no slower", "[dispatch]") {
  constexpr struct {
    int32_t sm;
    Dtype dtype;
    int32_t head_dim;
    const char* doubt;  // null: chosen
  } kCases[] = {
      {80, Dtype::fp16, 64, nullptr},
      {80, Dtype::fp16, 72, "measured 0.96x PyTorch's attention at worst, below 0.97x"},
      {80, Dtype::fp16, 192, "has not been measured beside PyTorch's attention"},
      {80, Dtype::bf16, 64, nullptr},
      {80, Dtype::bf16, 256, nullptr},
      {86, Dtype::bf16, 64, "has not been checked on a GPU of its architecture yet"},
      // Numbers of instruction sets and GPUs are two things.
      {103, Dtype::fp16, 64, "has not been measured beside PyTorch's attention"},
      {120, Dtype::bf16, 64, nullptr},
  };
  for (const auto& [sm, dtype, head_dim, doubt] : kCases) {
    CAPTURE(sm, int(dtype), head_dim);
    const Problem problem = with(on_gpu(sm), dtype, head_dim);
    CHECK(route_of(problem, kTable) == (doubt ? "aten_flash" : "kernel"));
    CHECK(reasons(problem, Route::kernel, kTable) ==
          (doubt ? doubt + std::string("; naming `kernel` as the first back end selects it all the "
                                       "same")
                 : ""));
  }
  CHECK(reasons(on_gpu(80, 0, Direction::backward), Route::kernel, kTable) ==
        "measured 0.50x PyTorch's attention at worst, below 0.97x; naming `kernel` as the first "
        "back end selects it all the same");
  const auto speed = measured(kInstances[0], with(on_gpu(80), Dtype::fp16, 128));
  REQUIRE(speed.has_value());
  CHECK(speed->worst == 0.96);
  CHECK(speed->median == 1.5);
}

TEST_CASE("records: what none of PyTorch's routines does needs no measurement", "[dispatch]") {
  Problem problem = with(on_gpu(80, Feature::softcap), Dtype::fp16, 192);
  CHECK(route_of(problem, kTable) == "kernel");
  problem.features = Feature::paged;  // its public attention, without a log-sum-exp
  CHECK(route_of(problem, kTable) == "kernel");
  problem.sm = 86;
  CHECK(route_of(problem, kTable) == "aten_sdpa");
  // cuDNN's route could, but has not passed there.
  problem = on_gpu(103, Feature::deterministic, Direction::backward);
  CHECK(route_of(problem, kTable) == "kernel");
  problem = on_gpu(80);
  problem.family = Family::kvcache_append;
  problem.features = 0;
  CHECK(route_of(problem, kTable) == "kernel");
}
