#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/launch.h"
#include "kernels/rotary_params.h"

namespace anyflash::cpu::ANYFLASH_ISA {}  // namespace anyflash::cpu::ANYFLASH_ISA
