#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "catch.h"
#include "dispatch_problems.h"
#include "kernels/arch.h"

using namespace anyflash;

namespace {

int32_t never_run(const void*, void*) { return 0; }

constexpr Cubin kCubins[] = {{75, 12000, kCubins, 1},  {80, 12000, kCubins, 1},
                             {90, 12000, kCubins, 1},  {100, 12080, kCubins, 1},
                             {120, 12080, kCubins, 1}, {}};
constexpr int32_t kEvery[] = {75, 80, 90, 100, 120, 0};
constexpr Cubin kPassed[] = {
    {75, 12000, kCubins, 1, nullptr, 0, kEvery},  {80, 12000, kCubins, 1, nullptr, 0, kEvery},
    {90, 12000, kCubins, 1, nullptr, 0, kEvery},  {100, 12080, kCubins, 1, nullptr, 0, kEvery},
    {120, 12080, kCubins, 1, nullptr, 0, kEvery}, {}};

Instance instance(Family family, int32_t min_sm, int32_t max_sm, Direction direction, Dtype dtype,
                  int32_t max_head_dim, const Cubin* cubins) {
  return {"an instance", family, Device::cuda, "sm",   min_sm, max_sm,   direction, dtype,
          max_head_dim,  1,      Feature::lse, "code", cubins, never_run};
}

Instance cpu_instance(const Arch& arch, Direction direction, Dtype dtype, const char* checked_on) {
  using namespace Feature;
  return {"a CPU instance",
          Family::attention,
          arch.device,
          arch.name,
          arch.min_sm,
          arch.max_sm,
          direction,
          dtype,
          512,
          1,
          direction == Direction::forward ? every_forward : every_backward,
          checked_on,
          nullptr,
          never_run};
}

}  // namespace

TEST_CASE("dispatch: devices that are neither a CPU nor NVIDIA's get what all devices have",
          "[dispatch]") {
  using namespace Feature;
  const Features sdpa[] = {
      packed | paged | seqused_k | leftpad_k | causal | window | bias | gqa | unequal_head_dims,
      packed | seqused_k | leftpad_k | causal | window | bias | bias_grad | gqa |
          unequal_head_dims};
  for (const Device device : {Device::hip, Device::mps, Device::xpu, Device::other}) {
    Problem problem = on_gpu(0);
    problem.device = device;
    problem.features = 0;
    CAPTURE(int(device));
    CHECK(route_of(problem) == "aten_sdpa");
    CHECK(reasons(problem, Route::aten_flash) == "runs on cuda only");
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      for (const Direction direction : {Direction::forward, Direction::backward}) {
        problem.features = 1u << i;
        problem.direction = direction;
        if (problem.features == paged && direction == Direction::backward) continue;
        CAPTURE(kFeatureTexts[i].name, int(direction));
        CHECK(route_of(problem) ==
              (sdpa[int(direction)] & problem.features ? "aten_sdpa" : "math"));
      }
    }
    problem.features = 0;
    problem.direction = Direction::forward;
    problem.order = parse_order("kernel,aten_cpu,aten_efficient");
    problem.explicit_order = true;
    CHECK(route_of(problem) == "none");
  }
}

TEST_CASE("dispatch: plain attention on every GPU", "[dispatch]") {
  for (const int32_t sm : kGpus) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      CAPTURE(sm, int(direction));
      CHECK(route_of(on_gpu(sm, 0, direction)) == (sm >= 80 ? "aten_flash" : "aten_efficient"));
      Problem bf16 = on_gpu(sm, 0, direction);
      bf16.dtype = Dtype::bf16;
      CHECK(route_of(bf16) == (sm >= 80 ? "aten_flash" : "math"));
      Problem fp32 = on_gpu(sm, 0, direction);
      fp32.dtype = Dtype::fp32;
      CHECK(route_of(fp32) == "aten_efficient");
      Problem fp64 = on_gpu(sm, 0, direction);
      fp64.dtype = Dtype::fp64;
      CHECK(route_of(fp64) == "math");
    }
  }
}

TEST_CASE("dispatch: every GPU and feature ends on a route that lists the feature", "[dispatch]") {
  using namespace Feature;
  const Features flash[] = {packed | seqused_k | causal | window | alibi | gqa | lse,
                            packed | causal | window | gqa | lse};
  const Features efficient = packed | causal | bias | gqa | unequal_head_dims | lse;
  for (const int32_t sm : kGpus) {
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      for (const Direction direction : {Direction::forward, Direction::backward}) {
        const Features feature = 1u << i;
        const bool caches = feature == paged;  // no gradient
        if (caches && direction == Direction::backward) continue;
        CAPTURE(sm, kFeatureTexts[i].name, int(direction));
        const std::string expected = sm >= 80 && (flash[int(direction)] & feature) ? "aten_flash"
                                     : efficient & feature ? "aten_efficient"
                                                           : "math";
        CHECK(route_of(on_gpu(sm, feature, direction)) == expected);
      }
    }
  }
}

TEST_CASE("dispatch: every feature on the CPU", "[dispatch]") {
  using namespace Feature;
  const Features cpu[] = {
      packed | paged | seqused_k | leftpad_k | causal | window | bias | gqa | lse,
      packed | seqused_k | leftpad_k | causal | window | bias | gqa | lse | deterministic};
  for (uint32_t i = 0; i < feature_number::count; ++i) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      const Features feature = 1u << i;
      if (feature == paged && direction == Direction::backward) continue;
      CAPTURE(kFeatureTexts[i].name, int(direction));
      CHECK(route_of(on_cpu(feature, direction)) ==
            (cpu[int(direction)] & feature ? "aten_cpu" : "math"));
    }
  }
}

TEST_CASE("dispatch: a paged cache has no backward", "[dispatch]") {
  const Problem problem = on_cpu(Feature::paged, Direction::backward);
  CHECK(route_of(problem) == "none");
  CHECK(reasons(problem, Route::math) == "does not support a paged key/value cache (block_table)");
}

TEST_CASE("dispatch: the quick choice is the explained one", "[dispatch]") {
  for (const int32_t sm : kGpus) {
    for (Features features = 0; features < 1u << feature_number::count; features += 37) {
      for (const Dtype dtype : {Dtype::fp16, Dtype::bf16, Dtype::fp32, Dtype::fp64}) {
        Problem problem = on_gpu(sm, features);
        problem.dtype = dtype;
        const Decision decision = decide(problem, kNoKernels);
        if (choose(problem, kNoKernels).route != decision.choice.route)
          FAIL("sm_" << sm << ", features " << features);
      }
    }
  }
}

TEST_CASE("dispatch: reasons", "[dispatch]") {
  CHECK(reasons(on_gpu(75), Route::aten_flash) == "needs sm_80 or newer, this GPU is sm_75");
  CHECK(reasons(on_gpu(75), Route::kernel) == "this build has no attention kernel for sm_75");
  CHECK(reasons(on_cpu(), Route::kernel) == "this build has no attention kernel for cpu");
  CHECK(reasons(on_cpu(), Route::aten_flash) == "runs on cuda only");

  Problem problem = on_gpu(90);
  problem.dtype = Dtype::fp32;
  CHECK(reasons(problem, Route::aten_flash) == "needs fp16 or bf16, got fp32");
  problem.dtype = Dtype::fp64;
  CHECK(reasons(problem, Route::aten_efficient) == "needs fp16, bf16 or fp32, got fp64");

  problem = on_gpu(75);
  problem.dtype = Dtype::bf16;
  CHECK(reasons(problem, Route::aten_efficient) == "bf16 needs sm_80");

  problem = on_gpu(90);
  problem.head_dim = problem.head_dim_v = 264;
  CHECK(reasons(problem, Route::aten_flash) == "head_dim 264 is above 256");
  problem.head_dim = problem.head_dim_v = 60;
  CHECK(reasons(problem, Route::aten_flash) == "head_dim 60 is not a multiple of 8");
  problem.head_dim = 64;
  problem.head_dim_v = 300;
  problem.features = Feature::unequal_head_dims;
  CHECK(reasons(problem, Route::aten_flash) ==
        "head_dim_v 300 is above 256; head_dim_v 300 is not a multiple of 8; does not support "
        "head_dim of v different from q and k");

  problem = on_gpu(90, Feature::softcap);
  problem.torch_version = 204;
  CHECK(reasons(problem, Route::aten_flash) ==
        "needs torch 2.5, this is 2.4; does not support softcap");
  CHECK(route_of(problem) == "math");
}

TEST_CASE("dispatch: memory-efficient attention of each torch", "[dispatch]") {
  using namespace Feature;
  const auto on = [](int32_t sm, int32_t torch_version, Features features = 0) {
    Problem problem = on_gpu(sm, features);
    problem.torch_version = torch_version;
    return problem;
  };
  const Features dense = causal | gqa | unequal_head_dims | lse;
  for (const int32_t version : {200, 201, 202, 203, 204, 205, kTorch}) {
    const Features features = version == 200 ? dense : dense | packed | bias;
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      CAPTURE(version, int(direction));
      for (uint32_t i = 0; i < feature_number::count; ++i) {
        const Features feature = 1u << i;
        if (feature == paged && direction == Direction::backward) continue;
        CAPTURE(kFeatureTexts[i].name);
        Problem problem = on(75, version, feature);
        problem.direction = direction;
        CHECK(route_of(problem) == (features & feature ? "aten_efficient" : "math"));
      }
      Problem wide = on(75, version, dense);
      wide.direction = direction;
      wide.head_dim = wide.head_dim_v = 128;
      CHECK(route_of(wide) == "aten_efficient");
      wide.head_dim_v = 136;
      CHECK(route_of(wide) == (version < 204 ? "math" : "aten_efficient"));
    }
    CHECK(route_of(on(60, version)) == (version == 200 ? "math" : "aten_efficient"));
    CHECK(route_of(on(80, version)) == (version < 205 ? "aten_efficient" : "aten_flash"));
  }
  // Every reason is that of one row.
  CHECK(reasons(on(75, 200, packed | bias), Route::aten_efficient) ==
        "does not support packed sequences (cu_seqlens); does not support an additive bias or "
        "boolean mask");
  CHECK(reasons(on(60, 200), Route::aten_efficient) == "needs sm_70 or newer, this GPU is sm_60");
  CHECK(reasons(on(75, 113), Route::aten_efficient) == "needs torch 2.0, this is 1.13");
  Problem wide = on(75, 203);
  wide.head_dim = wide.head_dim_v = 256;
  CHECK(reasons(wide, Route::aten_efficient) == "head_dim 256 is above 128");
}

TEST_CASE("dispatch: nothing in the order can run", "[dispatch]") {
  Problem problem = on_cpu();
  problem.order = parse_order("kernel");
  CHECK(refusal(problem, decide(problem, kNoKernels)) ==
        "anyflash: no back end of \"kernel\" can run this attention: kernel: this build has no "
        "attention kernel for cpu");
  problem = on_gpu(75, Feature::softcap);
  problem.order = parse_order("aten_flash,aten_efficient");
  CHECK(refusal(problem, decide(problem, kNoKernels)) ==
        "anyflash: no back end of \"aten_flash,aten_efficient\" can run this attention: "
        "aten_flash: needs sm_80 or newer, this GPU is sm_75; aten_flash: does not support "
        "softcap; aten_efficient: does not support softcap");
}

TEST_CASE("dispatch: an aten route by its own name", "[dispatch]") {
  Problem problem = on_gpu(90);
  problem.order = parse_order("aten_efficient");
  CHECK(route_of(problem) == "aten_efficient");
  problem.order = parse_order("math,sdpa");
  CHECK(route_of(problem) == "math");
}

TEST_CASE("dispatch: an unset order is the default", "[dispatch]") {
  Problem problem = on_gpu(90);
  problem.order = 0;
  CHECK(route_of(problem) == "aten_flash");
}

TEST_CASE("dispatch: digits that are no back end choose nothing", "[dispatch]") {
  Problem problem = on_gpu(90);
  for (const Order order : {Order{0xF}, Order{0x20}, Order{-1}}) {
    problem.order = order;
    CHECK(route_of(problem) == (order == 0x20 ? "aten_flash" : "none"));
    CHECK_FALSE(refusal(problem, decide(problem, kNoKernels)).empty());
  }
}

TEST_CASE("dispatch: kernels of the table", "[dispatch]") {
  const Instance instances[] = {
      instance(Family::attention, 80, 9999, Direction::forward, Dtype::fp16, 64, kPassed),
      instance(Family::attention, 90, 90, Direction::forward, Dtype::fp16, 64, kPassed),
      instance(Family::attention, 80, 9999, Direction::forward, Dtype::fp16, 128, kCubins),
  };
  const InstanceTable table{instances, 3};
  CHECK(route_of(on_gpu(75), table) == "aten_efficient");
  for (const auto& [sm, best] : {std::pair(80, 0), std::pair(90, 1), std::pair(120, 0)}) {
    Problem named = on_gpu(sm);
    named.explicit_order = true;
    CHECK(choose(named, table).instance == &instances[best]);
  }
  CHECK(route_of(on_cpu(), table) == "aten_cpu");

  CHECK(reasons(on_gpu(75), Route::kernel, table) == "needs sm_80 or newer, this GPU is sm_75");
  Problem problem = on_gpu(80);
  problem.dtype = Dtype::bf16;
  CHECK(reasons(problem, Route::kernel, table) == "needs fp16, got bf16");
  CHECK(reasons(on_gpu(80, 0, Direction::backward), Route::kernel, table) ==
        "this build has no attention kernel for the backward on sm_80");
  CHECK(reasons(on_gpu(80, Feature::softcap), Route::kernel, table) == "does not support softcap");

  problem = on_gpu(80);
  problem.head_dim = problem.head_dim_v = 128;
  CHECK(route_of(problem, table) == "aten_flash");
  CHECK(reasons(problem, Route::kernel, table) ==
        "has not been checked on a GPU of its architecture yet; naming `kernel` as the first back "
        "end selects it all the same");
  problem.explicit_order = true;
  CHECK(choose(problem, table).instance == &instances[2]);
  problem.order = parse_order("sdpa,kernel");
  CHECK(route_of(problem, table) == "aten_flash");
  problem.order = kDefaultOrder;
  problem.head_dim_v = 129;
  CHECK(reasons(problem, Route::kernel, table) == "head_dim_v 129 is above 128");
  problem.head_dim_v = 64;
  problem.head_dim = 65;  // both fit into the kernel for 128
  CHECK(choose(problem, table).instance == &instances[2]);
}

TEST_CASE("dispatch: kernels of a CPU", "[dispatch]") {
  const Instance instances[] = {
      cpu_instance(kAvx2, Direction::forward, Dtype::fp32, "zen4"),
      cpu_instance(kAvx2, Direction::forward, Dtype::bf16, "zen4"),
      cpu_instance(kAvx512, Direction::forward, Dtype::fp32, "zen4"),
      cpu_instance(kAvx512Bf16, Direction::forward, Dtype::bf16, "zen4"),
      cpu_instance(kNeon, Direction::forward, Dtype::fp32, "none"),
      cpu_instance(kAmx, Direction::forward, Dtype::bf16, "emeraldrapids"),
  };
  const InstanceTable table{instances, 6};
  const auto on = [](int32_t isa, Dtype dtype = Dtype::fp32, Features features = 0) {
    Problem problem = on_cpu(features);
    problem.sm = isa;
    problem.dtype = dtype;
    return problem;
  };
  CHECK(choose(on(Isa::avx2), table).instance == &instances[0]);
  CHECK(choose(on(Isa::avx512), table).instance == &instances[2]);
  CHECK(choose(on(Isa::avx512bf16), table).instance == &instances[2]);
  CHECK(choose(on(Isa::avx512bf16, Dtype::bf16), table).instance == &instances[3]);
  CHECK(choose(on(Isa::amx), table).instance == &instances[2]);
  CHECK(choose(on(Isa::amx, Dtype::bf16), table).instance == &instances[5]);
  CHECK(choose(on(Isa::avx512, Dtype::bf16, Feature::every_forward), table).instance ==
        &instances[1]);
  CHECK(reasons(on(Isa::none), Route::kernel, table) == "needs avx2, this CPU has none");
  Problem lowered = on(Isa::none);
  lowered.isa_lowered = true;
  CHECK(reasons(lowered, Route::kernel, table) == "needs avx2, ANYFLASH_CPU_ISA allows none");
  CHECK(reasons(on(Isa::avx512, Dtype::fp64), Route::kernel, table) ==
        "needs bf16 or fp32, got fp64");
  CHECK(reasons(on(Isa::avx2, Dtype::fp16), Route::kernel, table) ==
        "needs bf16 or fp32, got fp16");

  Problem neon = on(Isa::neon);
  CHECK(reasons(neon, Route::kernel, table) ==
        "has not been checked on a CPU of its architecture yet; naming `kernel` as the first back "
        "end selects it all the same");
  neon.explicit_order = true;
  CHECK(choose(neon, table).instance == &instances[4]);
}

TEST_CASE("dispatch: bias_activation", "[dispatch]") {
  const Instance instances[] = {
      instance(Family::bias_activation, 75, 9999, Direction::forward, Dtype::fp16, 0, kCubins),
      instance(Family::bias_activation, 75, 9999, Direction::forward, Dtype::bf16, 0, kPassed),
  };
  const InstanceTable table{instances, 2};
  Problem problem = on_gpu(90);
  problem.family = Family::bias_activation;
  problem.features = 0;
  problem.head_dim = problem.head_dim_v = 0;
  CHECK(route_of(problem, table) == "math");
  problem.dtype = Dtype::bf16;
  CHECK(route_of(problem, table) == "kernel");
  problem.dtype = Dtype::fp16;
  problem.explicit_order = true;
  CHECK(route_of(problem, table) == "kernel");
  problem.order = parse_order("sdpa");
  CHECK(route_of(problem, table) == "math");
  problem.order = parse_order("kernel");
  problem.sm = 70;
  CHECK(refusal(problem, decide(problem, table)) ==
        "anyflash: no back end of \"kernel\" can run this bias_activation: kernel: needs sm_75 or "
        "newer, this GPU is sm_70");
  problem.device = Device::cpu;
  problem.order = kDefaultOrder;
  CHECK(route_of(problem, table) == "math");
}

TEST_CASE("dispatch: the built table serves bias_activation where asked for", "[dispatch]") {
  const InstanceTable built = built_instances();
  const Instance* const end = built.instances + built.count;
  const Instance* on_gpus = std::find_if(built.instances, end, [](const Instance& instance) {
    return instance.device == Device::cuda && instance.family == Family::bias_activation;
  });
  if (on_gpus == end) return;
  for (const int32_t sm : kGpus) {
    Problem problem = on_gpu(sm);
    problem.family = Family::bias_activation;
    problem.features = 0;
    problem.head_dim = problem.head_dim_v = 0;
    problem.explicit_order = true;
    CAPTURE(sm);
    CHECK(route_of(problem, built) == (cubin_for(on_gpus->cubins, sm) ? "kernel" : "math"));
  }
}

TEST_CASE("instruction sets: names and what contains what", "[dispatch]") {
  CHECK(parse_isa("avx512bf16") == Isa::avx512bf16);
  CHECK(std::string(isa_name(Isa::amx)) == "amx");
  CHECK(contains(Isa::avx512, Isa::avx2));
  CHECK(contains(Isa::none, Isa::none));
  CHECK_FALSE(contains(Isa::avx2, Isa::avx512));
  CHECK_FALSE(contains(Isa::neon, Isa::avx2));
  CHECK_THROWS_WITH(parse_isa("sse"),
                    "unknown instruction set 'sse'; known: none, avx2, avx512, avx512bf16, amx, "
                    "neon");
}

TEST_CASE("orders: names and numbers", "[dispatch]") {
  CHECK(parse_order("kernel,sdpa,math") == 0x321);
  CHECK(parse_order("auto") == kDefaultOrder);
  CHECK(parse_order(" aten_flash , auto") == 0x3215);
  CHECK(parse_order("") == 0);
  CHECK(parse_order("aten_cudnn,aten_flash,aten_efficient,aten_cpu") == 0x7654);
  CHECK(order_text(0x321) == "kernel,sdpa,math");
  CHECK(order_text(parse_order("math")) == "math");
  CHECK(strict(parse_order("sdpa,math")) == parse_order("sdpa"));
  CHECK_THROWS_WITH(parse_order("sdpa,foo"),
                    "unknown back end 'foo'; known: auto, kernel, sdpa, math, aten_cudnn, "
                    "aten_flash, aten_efficient, aten_cpu, aten_sdpa");
  CHECK_THROWS_AS(parse_order("auto,auto,auto,auto,auto,auto"), std::invalid_argument);
}

TEST_CASE("dispatch: PyTorch's public attention where nobody asks for the log-sum-exp",
          "[dispatch]") {
  const auto without_lse = [](Problem problem, Features features = 0) {
    problem.features = features;
    return route_of(problem);
  };
  CHECK(without_lse(on_gpu(75), Feature::window) == "aten_sdpa");
  CHECK(without_lse(on_gpu(90), Feature::paged) == "aten_sdpa");
  CHECK(without_lse(on_gpu(75), Feature::causal) == "aten_efficient");
  CHECK(without_lse(on_gpu(90), Feature::softcap) == "math");
  Problem bf16 = on_gpu(75);
  bf16.dtype = Dtype::bf16;
  CHECK(without_lse(bf16) == "aten_sdpa");
  CHECK(route_of(bf16) == "math");
  CHECK(reasons(bf16, Route::aten_sdpa) == "does not support the log-sum-exp beside the output");
  Problem old = on_cpu();
  old.torch_version = 200;
  CHECK(without_lse(old) == "aten_sdpa");
}
