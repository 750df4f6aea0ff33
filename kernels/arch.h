// The architectures that kernels are written for, and the GPUs or CPUs that run each of them.
#pragma once

#include "kernels/launch.h"

namespace anyflash {

// Compute capabilities are written as major * 10 + minor. An Arch covers an interval of them: GPUs
// that can run its source, where there is machine code for them (cubin.h).
struct Arch {
  const char* name;
  Device device;
  int32_t min_sm;
  int32_t max_sm;

  constexpr bool runs_on(int32_t sm) const { return min_sm <= sm && sm <= max_sm; }
};

constexpr int32_t kAnyLaterSm = 9999;

constexpr Arch kSm75{"sm75", Device::cuda, 75, kAnyLaterSm};  // plain CUDA
constexpr Arch kSm80{"sm80", Device::cuda, 80, kAnyLaterSm};  // bf16, cp.async, mma.m16n8k16

// On a CPU the instruction set takes the place of the compute capability. Those of one processor
// family contain each other; the families are a hundred apart.
namespace Isa {
constexpr int32_t none = 0;
constexpr int32_t avx2 = 101;        // with FMA and F16C
constexpr int32_t avx512 = 102;      // F, BW, VL, DQ
constexpr int32_t avx512bf16 = 103;  // and BF16
constexpr int32_t amx = 104;         // and AMX-BF16, tiles that the system lets the process use
constexpr int32_t neon = 201;        // aarch64
}  // namespace Isa

constexpr Arch kAvx2{"avx2", Device::cpu, Isa::avx2, 199};
constexpr Arch kAvx512{"avx512", Device::cpu, Isa::avx512, 199};
constexpr Arch kAvx512Bf16{"avx512bf16", Device::cpu, Isa::avx512bf16, 199};
constexpr Arch kAmx{"amx", Device::cpu, Isa::amx, 199};
constexpr Arch kNeon{"neon", Device::cpu, Isa::neon, 299};

// By the names of instances.def.
namespace arch {
constexpr Arch sm75 = kSm75, sm80 = kSm80, avx2 = kAvx2, avx512 = kAvx512, avx512bf16 = kAvx512Bf16,
               amx = kAmx, neon = kNeon;
}

struct IsaName {
  const char* name;
  int32_t value;
};

constexpr IsaName kIsaNames[] = {{"none", Isa::none},     {"avx2", Isa::avx2},
                                 {"avx512", Isa::avx512}, {"avx512bf16", Isa::avx512bf16},
                                 {"amx", Isa::amx},       {"neon", Isa::neon}};

constexpr const char* isa_name(int32_t isa) {
  for (const IsaName& entry : kIsaNames) {
    if (entry.value == isa) return entry.name;
  }
  return "an unknown instruction set";
}

// Whether a CPU of instruction set `isa` also has `wanted`.
constexpr bool contains(int32_t isa, int32_t wanted) {
  return wanted == Isa::none || (isa / 100 == wanted / 100 && wanted <= isa);
}

}  // namespace anyflash
