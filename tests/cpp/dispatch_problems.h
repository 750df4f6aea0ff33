// Problems as the tests of the decision ask them, and the answers in words.
#pragma once

#include <string>

#include "core/dispatch.h"

namespace anyflash {

constexpr InstanceTable kNoKernels{nullptr, 0};
constexpr int32_t kTorch = 208;  // has no route that waits for records (checked_routes.def)
constexpr int32_t kGpus[] = {50, 60, 61, 70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121};

// As an operator asks, which returns or takes the log-sum-exp.
inline Problem on_gpu(int32_t sm, Features features = 0, Direction direction = Direction::forward) {
  Problem problem;
  problem.direction = direction;
  problem.device = Device::cuda;
  problem.sm = sm;
  problem.dtype = Dtype::fp16;
  problem.head_dim = problem.head_dim_v = 64;
  problem.features = features | Feature::lse;
  problem.torch_version = kTorch;
  return problem;
}

inline Problem on_cpu(Features features = 0, Direction direction = Direction::forward) {
  Problem problem = on_gpu(0, features, direction);
  problem.device = Device::cpu;
  problem.dtype = Dtype::fp32;
  return problem;
}

inline std::string route_of(const Problem& problem, InstanceTable table = kNoKernels) {
  return route_name(choose(problem, table).route);
}

// The reasons against one route, joined by "; ".
inline std::string reasons(const Problem& problem, Route route, InstanceTable table = kNoKernels) {
  std::string joined;
  for (const Reason& reason : decide(problem, table).reasons) {
    if (reason.route == route) joined += (joined.empty() ? "" : "; ") + reason.text;
  }
  return joined;
}

}  // namespace anyflash
