// What the user said in the environment, read once per process.
#pragma once

#include "core/problem.h"

namespace anyflash {

struct Environment {
  Chain chain;   // ANYFLASH_BACKEND, cut to its first name by ANYFLASH_STRICT=1
  bool verbose;  // ANYFLASH_VERBOSE=1: say what runs also where all is well
};

// Raises std::invalid_argument (ValueError in Python), on every call, while ANYFLASH_BACKEND names
// an unknown back end.
const Environment& environment();

// ANYFLASH_CHECK=1: also check what costs a device synchronisation.
bool checks_values();

struct AllowedIsa {
  int32_t isa;   // an Isa of kernels/arch.h
  bool lowered;  // this machine has more
};

// The instruction set that CPU kernels may use: this machine's, or what ANYFLASH_CPU_ISA says.
// Raises std::invalid_argument, on every call, while that names an unknown one or one that this
// machine does not have.
AllowedIsa cpu_isa();

}  // namespace anyflash
