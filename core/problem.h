// What the decision is made of: plain numbers, no tensor, no torch.
#pragma once

#include <cstdint>

#include "kernels/features.h"
#include "kernels/launch.h"

namespace anyflash {

// The digits of an order. `sdpa` stands for all routes of routes.def that belong to it, an aten_*
// name for that route alone.
enum class BackEnd : int32_t {
  unset,
  kernel,
  sdpa,
  math,
  aten_cudnn,
  aten_flash,
  aten_efficient,
  aten_cpu,
  aten_sdpa
};

constexpr const char* kBackEndNames[] = {"unset",          "kernel",     "sdpa",
                                         "math",           "aten_cudnn", "aten_flash",
                                         "aten_efficient", "aten_cpu",   "aten_sdpa"};
constexpr int32_t kNumBackEnds = 9;

// An ordered choice of back ends, one hexadecimal digit each, first choice in the lowest; 0 =
// unset.
using Order = int64_t;

constexpr Order kDefaultOrder = 0x321;  // kernel, sdpa, math

constexpr BackEnd first_back_end(Order order) { return static_cast<BackEnd>(order & 0xF); }
constexpr Order rest_of(Order order) { return order >> 4; }
constexpr Order strict(Order order) { return order & 0xF; }

// One call, without its lengths: dynamic shapes never change the decision.
struct Problem {
  Family family = Family::attention;
  Direction direction = Direction::forward;
  Device device = Device::cpu;
  int32_t sm = 0;  // compute capability, major * 10 + minor; on a CPU the Isa of kernels/arch.h
  int32_t driver =
      0;  // the CUDA that NVIDIA's driver knows, 12040 = 12.4; 0: not known, taken as new
  bool isa_lowered = false;  // by ANYFLASH_CPU_ISA: the CPU itself has more than `sm`
  Dtype dtype = Dtype::fp32;
  int32_t head_dim = 0;  // 0 for families without heads
  int32_t head_dim_v = 0;
  Features features = 0;
  int32_t torch_version = 0;  // 213 = 2.13
  Order order = kDefaultOrder;
  bool explicit_order =
      false;  // the user named the order: by argument, context manager or environment
};

}  // namespace anyflash
