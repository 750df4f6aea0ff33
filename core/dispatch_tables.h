// routes.def, checked_routes.def and measured.def as tables, for dispatch.cpp.
#pragma once

#include "core/dispatch.h"
#include "kernels/arch.h"

namespace anyflash {

constexpr uint32_t device_bit(Device device) { return 1u << int32_t(device); }

// The back end of the order that tries a route.
struct TriedBy {
  BackEnd back_end;
  bool once_checked = false;
};

// What the columns of routes.def and checked_routes.def mean.
namespace column {
using namespace Feature;
constexpr uint32_t fp16 = uint32_t(Dtype::fp16), bf16 = uint32_t(Dtype::bf16),
                   fp32 = uint32_t(Dtype::fp32), fp64 = uint32_t(Dtype::fp64);
constexpr uint32_t cpu = device_bit(Device::cpu), cuda = device_bit(Device::cuda), any = ~0u;
constexpr TriedBy sdpa{BackEnd::sdpa}, sdpa_once_checked{BackEnd::sdpa, true}, math{BackEnd::math};
constexpr int32_t none = INT32_MAX;  // no torch
}  // namespace column

// What a route or a kernel can compute on a device that runs it.
struct Limits {
  uint32_t dtypes;
  int32_t max_head_dim;
  int32_t head_dim_multiple;
  Features features;
};

struct RouteRow {
  Route route;
  BackEnd own_name;
  TriedBy tried_by;
  uint32_t devices;  // device_bit of each
  int32_t min_sm;
  int32_t min_torch;
  Limits limits[2];  // by Direction
};

constexpr RouteRow kRoutes[] = {
#define ROUTE(name, back_end, device, min_sm, dtypes, max_head_dim, multiple, min_torch, forward, \
              backward)                                                                           \
  [] {                                                                                            \
    using namespace column;                                                                       \
    return RouteRow{Route::name,                                                                  \
                    BackEnd::name,                                                                \
                    column::back_end,                                                             \
                    device,                                                                       \
                    min_sm,                                                                       \
                    min_torch,                                                                    \
                    {{dtypes, max_head_dim, multiple, (forward)},                                 \
                     {dtypes, max_head_dim, multiple, (backward)}}};                              \
  }(),
#include "core/routes.def"
#undef ROUTE
};

struct CheckedRow {
  Route route;
  int32_t sm;
  int32_t min_torch;
};

constexpr CheckedRow kChecked[] = {
#define CHECKED(route, sm, torch)               \
  [] {                                          \
    using namespace column;                     \
    return CheckedRow{Route::route, sm, torch}; \
  }(),
#include "core/checked_routes.def"
#undef CHECKED
};

// Where a kernel was measured: the compute capability of the GPU, or the kernel's architecture.
struct Level {
  constexpr Level(int32_t sm) : device(Device::cuda), value(sm) {}
  constexpr Level(const Arch& arch) : device(arch.device), value(arch.min_sm) {}
  Device device;
  int32_t value;
};

struct MeasuredRow {
  Level level;
  Direction direction;
  Dtype dtype;
  int32_t max_head_dim;
  Measured measured;
};

constexpr MeasuredRow kMeasured[] = {
#define MEASURED(level, direction, dtype, max_head_dim, worst, median)                            \
  [] {                                                                                            \
    using namespace arch;                                                                         \
    return MeasuredRow{level, Direction::direction, Dtype::dtype, max_head_dim, {worst, median}}; \
  }(),
#include "core/measured.def"
#undef MEASURED
};

}  // namespace anyflash
