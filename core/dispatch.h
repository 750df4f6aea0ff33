// The decision: which route computes a problem, and why not the others. A pure function of values;
// no torch, no environment.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/problem.h"

namespace anyflash {

// A way to compute; the aten_* routes and math are those of routes.def.
enum class Route : int32_t {
  none,
  kernel,
  aten_cudnn,
  aten_flash,
  aten_efficient,
  aten_cpu,
  aten_sdpa,
  math
};

const char* route_name(Route route);
const char* family_name(Family family);

// How fast a kernel is beside PyTorch's own attention: a row of measured.def.
struct Measured {
  double worst;  // over the benchmark grid: 1.02 = never slower
  double median;
};

struct Choice {
  Route route = Route::none;
  const Instance* instance = nullptr;  // for Route::kernel
};

// Why a route was passed over. A route has one entry per obstacle.
struct Reason {
  Route route;
  std::string text;
};

struct Decision {
  Choice choice;
  std::vector<Reason> reasons;  // in the order in which the routes were tried
};

struct InstanceTable {
  const Instance* instances;
  int32_t count;
};

InstanceTable built_instances();

// The first route of the problem's order that supports it: tens of nanoseconds, no allocation, for
// every call.
//
// Attention tries, per back end of the order: `kernel` the instances (the newest architecture
// first), `sdpa` its routes in the order of routes.def, any other name the route of that name.
// Bias-activation has a kernel or plain operators: every name but `kernel` means Route::math there.
Choice choose(const Problem& problem, InstanceTable table = built_instances());

// The same choice with the reasons against every route that comes before it (all routes of the
// order if there is none).
Decision decide(const Problem& problem, InstanceTable table = built_instances());

// Where the kernel has been measured for the problem.
std::optional<Measured> measured(const Instance& instance, const Problem& problem);

// The Isa of a name of arch.h. Throws std::invalid_argument: `unknown instruction set 'sse'; known:
// none, avx2, ...`.
int32_t parse_isa(const std::string& name);

// `attention forward, bf16, head_dim 128, causal, gqa`
std::string problem_text(const Problem& problem);

// `anyflash: no back end of "kernel" can run this attention: kernel: this build has no attention
// kernel for cpu`
std::string refusal(const Problem& problem, const Decision& decision);

// "kernel,sdpa,math" -> 0x321; "auto" -> kDefaultOrder. Throws std::invalid_argument: `unknown back
// end 'foo'; known: auto, kernel, ...`.
Order parse_order(const std::string& names);

std::string order_text(Order order);

}  // namespace anyflash
