#include "core/dispatch.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/dispatch_tables.h"
#include "core/names.h"
#include "kernels/arch.h"
#include "kernels/drivers.h"

namespace anyflash {
namespace {

// The default order takes a kernel that is at no point of the grid slower than this.
constexpr double kSlowest = 0.97;

const char* dtype_name(Dtype dtype) { return name_of(dtype, kDtypeNames, "unknown dtype"); }

std::string device_name(const Problem& problem) {
  if (problem.device == Device::cuda) return "sm_" + std::to_string(problem.sm);
  if (problem.device == Device::other) return "this device";
  return name_of(problem.device, kDeviceNames, "this device");
}

// "fp16, bf16 or fp32"
std::string dtype_list(uint32_t dtypes) {
  std::string list;
  for (const auto& entry : kDtypeNames) {
    const uint32_t bit = uint32_t(entry.value);
    if (!(dtypes & bit)) continue;
    const bool last = dtypes < bit * 2;
    list += list.empty() ? "" : last ? " or " : ", ";
    list += entry.name;
  }
  return list;
}

// "0.97x"
std::string ratio_text(double ratio) {
  const std::string hundredths = std::to_string(int32_t(ratio * 100 + 0.5) % 100 + 100);
  return std::to_string(int32_t(ratio * 100 + 0.5) / 100) + "." + hundredths.substr(1) + "x";
}

std::string version_text(int32_t version) {
  return std::to_string(version / 100) + "." + std::to_string(version % 100);
}

std::string required_sm(int32_t min_sm, int32_t sm) {
  return "needs sm_" + std::to_string(min_sm) + " or newer, this GPU is sm_" + std::to_string(sm);
}

// "R550 (CUDA 12.4)"
std::string driver_text(int32_t cuda) {
  const int32_t branch = driver_branch(cuda);
  return (branch ? "R" + std::to_string(branch) : "of a branch that is not known here") +
         " (CUDA " + std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10) + ")";
}

// Calls obstacle(make_text) for everything that keeps something with these limits from computing
// the problem. The text is only made by who wants it.
template <typename Obstacle>
void visit_limits(const Limits& limits, const Problem& problem, Obstacle obstacle) {
  if (!(limits.dtypes & uint32_t(problem.dtype))) {
    obstacle([&] {
      return "needs " + dtype_list(limits.dtypes) + ", got " + dtype_name(problem.dtype);
    });
  }
  const auto check_head_dim = [&](const char* name, int32_t head_dim) {
    const auto value = [=] { return std::string(name) + " " + std::to_string(head_dim); };
    if (head_dim > limits.max_head_dim) {
      obstacle([&] { return value() + " is above " + std::to_string(limits.max_head_dim); });
    }
    if (head_dim % limits.head_dim_multiple != 0) {
      obstacle([&] {
        return value() + " is not a multiple of " + std::to_string(limits.head_dim_multiple);
      });
    }
  };
  check_head_dim("head_dim", problem.head_dim);
  if (problem.head_dim_v != problem.head_dim) check_head_dim("head_dim_v", problem.head_dim_v);
  const Features missing = problem.features & ~limits.features;
  for (uint32_t i = 0; missing >> i != 0; ++i) {
    if (missing >> i & 1) {
      obstacle([=] { return std::string("does not support ") + kFeatureTexts[i].phrase; });
    }
  }
}

// The same for a route on the problem's device.
template <typename Obstacle>
void visit_obstacles(const RouteRow& row, const Problem& problem, Obstacle obstacle) {
  const bool on_cuda = problem.device == Device::cuda;
  if (!(row.devices & device_bit(problem.device))) {
    obstacle([&] {
      return std::string("runs on ") + (row.devices == column::cpu ? "cpu" : "cuda") + " only";
    });
    return;
  }
  if (on_cuda && problem.sm < row.min_sm) {
    obstacle([&] { return required_sm(row.min_sm, problem.sm); });
  } else if (row.devices == column::cuda && problem.dtype == Dtype::bf16 && problem.sm < 80) {
    obstacle([] { return std::string("bf16 needs sm_80"); });
  }
  if (problem.torch_version < row.min_torch) {
    obstacle([&] {
      return "needs torch " + version_text(row.min_torch) + ", this is " +
             version_text(problem.torch_version);
    });
  }
  visit_limits(row.limits[int32_t(problem.direction)], problem, obstacle);
}

// Calls obstacle(make_text) once if a route has to pass on such a GPU before its back end tries it.
template <typename Obstacle>
void visit_unchecked(const RouteRow& row, const Problem& problem, Obstacle obstacle) {
  if (!row.tried_by.once_checked) return;
  for (const CheckedRow& checked : kChecked) {
    if (checked.route == row.route && checked.sm == problem.sm &&
        checked.min_torch <= problem.torch_version) {
      return;
    }
  }
  obstacle([&] {
    const std::string name = route_name(row.route);
    return "has not been checked on sm_" + std::to_string(problem.sm) + " with torch " +
           version_text(problem.torch_version) + " yet; naming `" + name +
           "` selects it all the same";
  });
}

Limits limits_of(const Instance& instance) {
  return {uint32_t(instance.dtype), instance.max_head_dim, instance.head_dim_multiple,
          instance.features};
}

// "sm_75, sm_80"
std::string code_text(const Instance& instance) {
  std::string text;
  for (const Cubin* cubin = instance.cubins; cubin->data; ++cubin) {
    text += (text.empty() ? "sm_" : ", sm_") + std::to_string(cubin->sm);
  }
  return text;
}

// The same for the machine code of a kernel of the problem's architecture.
template <typename Obstacle>
void visit_code(const Instance& instance, const Problem& problem, Obstacle obstacle) {
  if (problem.device != Device::cuda) return;
  const Cubin* cubin = cubin_for(instance.cubins, problem.sm);
  if (!cubin) {
    return obstacle([&] {
      return "this build has machine code for " + code_text(instance) + ", this GPU is sm_" +
             std::to_string(problem.sm) +
             ": build with ANYFLASH_CUDA_ARCHS=" + std::to_string(problem.sm);
    });
  }
  if (problem.driver != 0 && problem.driver < cubin->min_driver) {
    obstacle([&] {
      return "needs NVIDIA driver " + driver_text(cubin->min_driver) + " or newer, this is " +
             driver_text(problem.driver) + ": update the driver";
    });
  }
}

// The obstacles when no kernel computes the problem: what the architecture lacks, or what is in the
// way of the kernel that comes closest.
template <typename Obstacle>
void visit_missing_kernel(const Problem& problem, InstanceTable table, Obstacle obstacle) {
  const Instance* oldest = nullptr;  // of those for this kind of device
  bool runs_here = false;
  const Instance* closest = nullptr;
  int32_t fewest = INT32_MAX;
  uint32_t dtypes = 0;
  for (int32_t i = 0; i < table.count; ++i) {
    const Instance& instance = table.instances[i];
    if (instance.device != problem.device || instance.family != problem.family) continue;
    if (!oldest || instance.min_sm < oldest->min_sm) oldest = &instance;
    if (problem.sm < instance.min_sm || problem.sm > instance.max_sm) continue;
    runs_here = true;
    if (instance.direction != problem.direction) continue;
    dtypes |= uint32_t(instance.dtype);
    int32_t obstacles = 0;
    const auto count = [&](auto) { ++obstacles; };
    visit_limits(limits_of(instance), problem, count);
    visit_code(instance, problem, count);
    // Of several the newest architecture's, of those the one for the largest head_dim.
    const bool closer = closest && (instance.min_sm != closest->min_sm
                                        ? instance.min_sm > closest->min_sm
                                        : instance.max_head_dim > closest->max_head_dim);
    if (obstacles < fewest || (obstacles == fewest && closer)) {
      fewest = obstacles;
      closest = &instance;
    }
  }
  if (closest) {
    Limits limits = limits_of(*closest);
    limits.dtypes = dtypes;
    visit_limits(limits, problem, obstacle);
    visit_code(*closest, problem, obstacle);
  } else if (oldest && problem.sm < oldest->min_sm) {
    obstacle([&] {
      if (problem.device == Device::cuda) return required_sm(oldest->min_sm, problem.sm);
      return std::string("needs ") + oldest->arch +
             (problem.isa_lowered ? ", ANYFLASH_CPU_ISA allows " : ", this CPU has ") +
             isa_name(problem.sm);
    });
  } else {
    obstacle([&] {
      return std::string("this build has no ") + family_name(problem.family) + " kernel for " +
             (runs_here ? "the backward on " : "") + device_name(problem);
    });
  }
}

// Whether a row is the one of its route that counts for a version of torch: the first that is not
// too new for it, or the last.
bool counts(const RouteRow& row, int32_t torch_version) {
  const RouteRow* found = nullptr;
  for (const RouteRow& other : kRoutes) {
    if (other.route != row.route) continue;
    if (!found || torch_version < found->min_torch) found = &other;
  }
  return found == &row;
}

// Whether a kernel competes with an attention routine of PyTorch's, not with plain operators.
bool has_rival(const Problem& problem) {
  for (const RouteRow& row : kRoutes) {
    if (row.devices == column::any || !counts(row, problem.torch_version)) continue;
    bool runs = true;
    const auto refuse = [&](auto) { runs = false; };
    visit_obstacles(row, problem, refuse);
    visit_unchecked(row, problem, refuse);
    if (runs) return true;
  }
  return false;
}

// Whether the kernel, or the machine code of it that this GPU runs, has passed its tests on such a
// machine.
bool has_passed(const Instance& instance, const Problem& problem) {
  if (instance.device == Device::cpu) return std::strcmp(instance.checked_on, "none") != 0;
  const Cubin* cubin = cubin_for(instance.cubins, problem.sm);
  return cubin && passed_on(*cubin, problem.sm);
}

// Calls obstacle(make_text) once if the default order passes over a kernel that could compute the
// problem.
template <typename Obstacle>
void visit_doubt(const Instance& instance, const Problem& problem, Obstacle obstacle) {
  const auto doubt = [&](auto make_text) {
    obstacle([&] {
      return make_text() + "; naming `kernel` as the first back end selects it all the same";
    });
  };
  const bool on_cpu = instance.device == Device::cpu;
  if (!has_passed(instance, problem)) {
    return doubt([&] {
      return std::string("has not been checked on a ") + (on_cpu ? "CPU" : "GPU") +
             " of its architecture yet";
    });
  }
  if (instance.family != Family::attention || !has_rival(problem)) return;
  const std::optional<Measured> speed = measured(instance, problem);
  if (!speed) {
    doubt([] { return std::string("has not been measured beside PyTorch's attention"); });
  } else if (speed->worst < kSlowest) {
    doubt([&] {
      return "measured " + ratio_text(speed->worst) + " PyTorch's attention at worst, below " +
             ratio_text(kSlowest);
    });
  }
}

// The kernel for the problem, or null after calls of obstacle(make_text).
template <typename Obstacle>
const Instance* find_kernel(const Problem& problem, InstanceTable table, Obstacle obstacle) {
  const Instance* found = nullptr;
  for (int32_t i = 0; i < table.count; ++i) {
    const Instance& instance = table.instances[i];
    if (instance.device != problem.device || instance.family != problem.family ||
        instance.direction != problem.direction || problem.sm < instance.min_sm ||
        problem.sm > instance.max_sm) {
      continue;
    }
    bool computes = true;
    const auto refuse = [&](auto) { computes = false; };
    visit_limits(limits_of(instance), problem, refuse);
    visit_code(instance, problem, refuse);
    // The newest architecture's, of those the one made for the smallest head_dim.
    if (computes &&
        (!found || instance.min_sm > found->min_sm ||
         (instance.min_sm == found->min_sm && instance.max_head_dim < found->max_head_dim))) {
      found = &instance;
    }
  }
  if (!found) {
    visit_missing_kernel(problem, table, obstacle);
    return nullptr;
  }
  if (problem.explicit_order && first_back_end(problem.order) == BackEnd::kernel) return found;
  bool doubted = false;
  visit_doubt(*found, problem, [&](auto make_text) {
    doubted = true;
    obstacle(make_text);
  });
  return doubted ? nullptr : found;
}

// Tries the routes in the order and calls report(route, make_text) for each obstacle on the
// way.
template <typename Report>
Choice walk_order(const Problem& problem, InstanceTable table, Report report) {
  for (Order order = problem.order ? problem.order : kDefaultOrder; order > 0;
       order = rest_of(order)) {
    const BackEnd back_end = first_back_end(order);
    if (back_end == BackEnd::kernel) {
      const Instance* instance =
          find_kernel(problem, table, [&](auto make_text) { report(Route::kernel, make_text); });
      if (instance) return {Route::kernel, instance};
      continue;
    }
    if (problem.family != Family::attention) return {Route::math, nullptr};
    for (const RouteRow& row : kRoutes) {
      const bool is_named = row.own_name == back_end;
      if (row.tried_by.back_end != back_end && !is_named) continue;
      if (!counts(row, problem.torch_version)) continue;
      bool runs = true;
      const auto obstacle = [&](auto make_text) {
        runs = false;
        report(row.route, make_text);
      };
      visit_obstacles(row, problem, obstacle);
      if (runs && !is_named) visit_unchecked(row, problem, obstacle);
      if (runs) return {row.route, nullptr};
    }
  }
  return {};
}

}  // namespace

const char* family_name(Family family) { return name_of(family, kFamilyNames, "unknown family"); }

const char* route_name(Route route) {
  constexpr const char* kNames[] = {"none",           "kernel",   "aten_cudnn", "aten_flash",
                                    "aten_efficient", "aten_cpu", "aten_sdpa",  "math"};
  return kNames[int32_t(route)];
}

InstanceTable built_instances() {
  InstanceTable table{nullptr, 0};
  table.instances = anyflash_instances(&table.count);
  return table;
}

Choice choose(const Problem& problem, InstanceTable table) {
  return walk_order(problem, table, [](Route, auto) {});
}

Decision decide(const Problem& problem, InstanceTable table) {
  Decision decision;
  decision.choice = walk_order(problem, table, [&](Route route, auto make_text) {
    decision.reasons.push_back({route, make_text()});
  });
  return decision;
}

std::optional<Measured> measured(const Instance& instance, const Problem& problem) {
  if (instance.family != Family::attention) return std::nullopt;
  const int32_t level = instance.device == Device::cpu ? instance.min_sm : problem.sm;
  const MeasuredRow* found = nullptr;
  for (const MeasuredRow& row : kMeasured) {
    if (row.level.device == instance.device && row.level.value == level &&
        row.direction == instance.direction && row.dtype == instance.dtype &&
        std::max(problem.head_dim, problem.head_dim_v) <= row.max_head_dim &&
        (!found || row.max_head_dim < found->max_head_dim)) {
      found = &row;
    }
  }
  return found ? std::optional<Measured>(found->measured) : std::nullopt;
}

int32_t parse_isa(const std::string& name) { return value_of("instruction set", kIsaNames, name); }

std::string problem_text(const Problem& problem) {
  std::string text = family_name(problem.family);
  text += problem.direction == Direction::forward ? " forward, " : " backward, ";
  text += dtype_name(problem.dtype);
  if (problem.head_dim > 0) text += ", head_dim " + std::to_string(problem.head_dim);
  if (problem.head_dim_v != problem.head_dim) text += "/" + std::to_string(problem.head_dim_v);
  for (uint32_t i = 0; i < feature_number::count; ++i) {
    if (problem.features >> i & 1) text += std::string(", ") + kFeatureTexts[i].name;
  }
  return text;
}

std::string refusal(const Problem& problem, const Decision& decision) {
  std::string message = "anyflash: no back end of \"" + order_text(problem.order) +
                        "\" can run this " + family_name(problem.family);
  const char* separator = ": ";
  for (const Reason& reason : decision.reasons) {
    message += separator + std::string(route_name(reason.route)) + ": " + reason.text;
    separator = "; ";
  }
  return message;
}

Order parse_order(const std::string& names) {
  Order order = 0;
  int32_t shift = 0;
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    std::string name = names.substr(begin, end - begin);
    begin = end + 1;
    name.erase(0, name.find_first_not_of(" \t"));
    name.erase(name.find_last_not_of(" \t") + 1);
    if (name.empty()) continue;
    Order digits = 0;
    int32_t num_digits = 1;
    if (name == "auto") {
      digits = kDefaultOrder;
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
    order |= digits << shift;
    shift += 4 * num_digits;
  }
  return order;
}

std::string order_text(Order order) {
  std::string names;
  for (; order > 0; order = rest_of(order)) {
    const int32_t digit = int32_t(first_back_end(order));
    names += (names.empty() ? "" : ",") +
             std::string(digit < kNumBackEnds ? kBackEndNames[digit] : "unknown");
  }
  return names;
}

}  // namespace anyflash
