#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace anyflash {
namespace {

// What the columns of routes.def mean.
namespace column {
using namespace Feature;
constexpr uint32_t fp16 = uint32_t(Dtype::fp16), bf16 = uint32_t(Dtype::bf16),
                   fp32 = uint32_t(Dtype::fp32), fp64 = uint32_t(Dtype::fp64);
constexpr uint32_t cpu = 1, cuda = 2, any = cpu | cuda;
constexpr BackEnd named = BackEnd::unset, sdpa = BackEnd::sdpa, math = BackEnd::math;
}  // namespace column

struct RouteRow {
  Route route;
  BackEnd own_name;
  BackEnd chain;     // unset: tried under its own name only
  uint32_t devices;  // column::cpu | column::cuda
  int32_t min_sm;
  uint32_t dtypes;
  int32_t max_head_dim;
  int32_t head_dim_multiple;
  int32_t min_torch;
  Features features[2];  // by Direction
};

constexpr RouteRow kRoutes[] = {
#define FEATURE(name, phrase)
#define ROUTE(name, chain, device, min_sm, dtypes, max_head_dim, multiple, min_torch, forward, \
              backward)                                                                        \
  [] {                                                                                         \
    using namespace column;                                                                    \
    return RouteRow{                                                                           \
        Route::name, BackEnd::name, column::chain, device,    min_sm,                          \
        dtypes,      max_head_dim,  multiple,      min_torch, {(forward), (backward)}};        \
  }(),
#include "routes.def"
#undef ROUTE
#undef FEATURE
};

constexpr const char* kFeaturePhrases[] = {
#define FEATURE(name, phrase) phrase,
#define ROUTE(...)
#include "routes.def"
#undef ROUTE
#undef FEATURE
};

constexpr struct {
  Dtype dtype;
  const char* name;
} kDtypes[] = {
    {Dtype::fp16, "fp16"}, {Dtype::bf16, "bf16"}, {Dtype::fp32, "fp32"}, {Dtype::fp64, "fp64"}};

const char* dtype_name(Dtype dtype) {
  for (const auto& entry : kDtypes) {
    if (entry.dtype == dtype) return entry.name;
  }
  return "unknown dtype";
}

const char* family_name(Family family) {
  return family == Family::attention ? "attention" : "bias_activation";
}

std::string device_name(const Problem& problem) {
  return problem.device == Device::cpu ? "cpu" : "sm_" + std::to_string(problem.sm);
}

// "fp16, bf16 or fp32"
std::string dtype_list(uint32_t dtypes) {
  std::string list;
  for (const auto& entry : kDtypes) {
    const uint32_t bit = uint32_t(entry.dtype);
    if (!(dtypes & bit)) continue;
    const bool last = dtypes < bit * 2;
    list += list.empty() ? "" : last ? " or " : ", ";
    list += entry.name;
  }
  return list;
}

std::string version_text(int32_t version) {
  return std::to_string(version / 100) + "." + std::to_string(version % 100);
}

// Calls obstacle(make_text) for everything that keeps the route from computing the problem. The
// text is only made by who wants it.
template <typename Obstacle>
void visit_obstacles(const RouteRow& row, const Problem& problem, Obstacle obstacle) {
  const bool on_cuda = problem.device == Device::cuda;
  if (!(row.devices & (on_cuda ? column::cuda : column::cpu))) {
    obstacle([&] { return std::string("runs on ") + (on_cuda ? "cpu" : "cuda") + " only"; });
    return;
  }
  if (on_cuda && problem.sm < row.min_sm) {
    obstacle([&] {
      return "needs sm_" + std::to_string(row.min_sm) + " or newer, this GPU is sm_" +
             std::to_string(problem.sm);
    });
  } else if (row.devices == column::cuda && problem.dtype == Dtype::bf16 && problem.sm < 80) {
    obstacle([] { return std::string("bf16 needs sm_80"); });
  }
  if (!(row.dtypes & uint32_t(problem.dtype))) {
    obstacle(
        [&] { return "needs " + dtype_list(row.dtypes) + ", got " + dtype_name(problem.dtype); });
  }
  const auto check_head_dim = [&](const char* name, int32_t head_dim) {
    const auto value = [=] { return std::string(name) + " " + std::to_string(head_dim); };
    if (head_dim > row.max_head_dim) {
      obstacle([&] { return value() + " is above " + std::to_string(row.max_head_dim); });
    }
    if (head_dim % row.head_dim_multiple != 0) {
      obstacle([&] {
        return value() + " is not a multiple of " + std::to_string(row.head_dim_multiple);
      });
    }
  };
  check_head_dim("head_dim", problem.head_dim);
  if (problem.head_dim_v != problem.head_dim) check_head_dim("head_dim_v", problem.head_dim_v);
  if (problem.torch_version < row.min_torch) {
    obstacle([&] {
      return "needs torch " + version_text(row.min_torch) + ", this is " +
             version_text(problem.torch_version);
    });
  }
  const Features missing = problem.features & ~row.features[int32_t(problem.direction)];
  for (uint32_t i = 0; missing >> i != 0; ++i) {
    if (missing >> i & 1) {
      obstacle([=] { return std::string("does not support ") + kFeaturePhrases[i]; });
    }
  }
}

// The kernel for the problem, or null after one call of obstacle(make_text).
template <typename Obstacle>
const Instance* find_kernel(const Problem& problem, InstanceTable table, Obstacle obstacle) {
  bool for_this_gpu = false;
  const Instance* found = nullptr;
  for (int32_t i = 0; i < table.count; ++i) {
    const Instance& instance = table.instances[i];
    if (problem.device != Device::cuda || instance.family != problem.family) continue;
    if (problem.sm < instance.min_sm || problem.sm > instance.max_sm) continue;
    for_this_gpu = true;
    if (instance.direction != problem.direction || instance.dtype != problem.dtype ||
        instance.head_dim != problem.head_dim)
      continue;
    if (!found || instance.min_sm > found->min_sm) found = &instance;  // the newest architecture's
  }
  if (!found) {
    obstacle([&] {
      const std::string kernel =
          std::string("this build has no ") + family_name(problem.family) + " kernel for ";
      if (!for_this_gpu) return kernel + device_name(problem);
      return kernel + (problem.direction == Direction::backward ? "the backward in " : "") +
             dtype_name(problem.dtype) +
             (problem.head_dim ? " with head_dim " + std::to_string(problem.head_dim) : "");
    });
    return nullptr;
  }
  const bool asked_for = problem.explicit_chain && first_back_end(problem.chain) == BackEnd::kernel;
  if (!asked_for && std::strcmp(found->checked_on, "none") == 0) {
    obstacle([] {
      return std::string(
          "has not been checked on a GPU yet; naming `kernel` as the first back end selects it all "
          "the same");
    });
    return nullptr;
  }
  return found;
}

// Tries the routes in the chain's order and calls report(route, make_text) for each obstacle on the
// way.
template <typename Report>
Choice walk_chain(const Problem& problem, InstanceTable table, Report report) {
  for (Chain chain = problem.chain ? problem.chain : kDefaultChain; chain > 0;
       chain = rest_of(chain)) {
    const BackEnd back_end = first_back_end(chain);
    if (back_end == BackEnd::kernel) {
      const Instance* instance =
          find_kernel(problem, table, [&](auto make_text) { report(Route::kernel, make_text); });
      if (instance) return {Route::kernel, instance};
      continue;
    }
    if (problem.family != Family::attention) return {Route::math, nullptr};
    for (const RouteRow& row : kRoutes) {
      if (back_end == BackEnd::unset || (row.chain != back_end && row.own_name != back_end))
        continue;
      bool runs = true;
      visit_obstacles(row, problem, [&](auto make_text) {
        runs = false;
        report(row.route, make_text);
      });
      if (runs) return {row.route, nullptr};
    }
  }
  return {};
}

}  // namespace

const char* route_name(Route route) {
  constexpr const char* kNames[] = {"none",           "kernel",   "aten_cudnn", "aten_flash",
                                    "aten_efficient", "aten_cpu", "math"};
  return kNames[int32_t(route)];
}

InstanceTable built_instances() {
  InstanceTable table{nullptr, 0};
  table.instances = anyflash_instances(&table.count);
  return table;
}

Choice choose(const Problem& problem, InstanceTable table) {
  return walk_chain(problem, table, [](Route, auto) {});
}

Decision decide(const Problem& problem, InstanceTable table) {
  Decision decision;
  decision.choice = walk_chain(problem, table, [&](Route route, auto make_text) {
    decision.reasons.push_back({route, make_text()});
  });
  return decision;
}

std::string refusal(const Problem& problem, const Decision& decision) {
  std::string message = "anyflash: no back end of \"" + chain_text(problem.chain) +
                        "\" can run this " + family_name(problem.family);
  const char* separator = ": ";
  for (const Reason& reason : decision.reasons) {
    message += separator + std::string(route_name(reason.route)) + ": " + reason.text;
    separator = "; ";
  }
  return message;
}

Chain parse_chain(const std::string& names) {
  Chain chain = 0;
  int32_t shift = 0;
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    std::string name = names.substr(begin, end - begin);
    begin = end + 1;
    name.erase(0, name.find_first_not_of(" \t"));
    name.erase(name.find_last_not_of(" \t") + 1);
    if (name.empty()) continue;
    Chain digits = 0;
    int32_t num_digits = 1;
    if (name == "auto") {
      digits = kDefaultChain;
      num_digits = 3;
    }
    std::string known = "auto";
    for (int32_t i = 1; i < kNumBackEnds; ++i) {
      if (name == kBackEndNames[i]) digits = i;
      known += std::string(", ") + kBackEndNames[i];
    }
    if (digits == 0)
      throw std::invalid_argument("unknown back end '" + name + "'; known: " + known);
    if (shift + 4 * num_digits > 60)
      throw std::invalid_argument("back ends: at most 15 names, got '" + names + "'");
    chain |= digits << shift;
    shift += 4 * num_digits;
  }
  return chain;
}

std::string chain_text(Chain chain) {
  std::string names;
  for (; chain > 0; chain = rest_of(chain)) {
    const int32_t digit = int32_t(first_back_end(chain));
    names += (names.empty() ? "" : ",") +
             std::string(digit < kNumBackEnds ? kBackEndNames[digit] : "unknown");
  }
  return names;
}

}  // namespace anyflash
