// What the decision is made of: plain numbers, no tensor, no torch.
#pragma once

#include <cstdint>

#include "kernels/features.h"
#include "kernels/launch.h"

namespace anyflash {

// The digits of a chain. `sdpa` stands for all routes of routes.def that belong to it, an aten_*
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
using Chain = int64_t;

constexpr Chain kDefaultChain = 0x321;  // kernel, sdpa, math

constexpr BackEnd first_back_end(Chain chain) { return static_cast<BackEnd>(chain & 0xF); }
constexpr Chain rest_of(Chain chain) { return chain >> 4; }
constexpr Chain strict(Chain chain) { return chain & 0xF; }

// One call, without its lengths: dynamic shapes never change the decision.
struct Problem {
  Family family = Family::attention;
  Direction direction = Direction::forward;
  Device device = Device::cpu;
  int32_t sm = 0;  // compute capability, major * 10 + minor; on a CPU the Isa of kernels/arch.h
  bool isa_lowered = false;  // by ANYFLASH_CPU_ISA: the CPU itself has more than `sm`
  Dtype dtype = Dtype::fp32;
  int32_t head_dim = 0;  // 0 for families without heads
  int32_t head_dim_v = 0;
  Features features = 0;
  int32_t torch_version = 0;  // 213 = 2.13
  Chain chain = kDefaultChain;
  bool explicit_chain =
      false;  // the user named the chain: by argument, context manager or environment
};

}  // namespace anyflash
