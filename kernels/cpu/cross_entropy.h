#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cross_entropy_params.h"
#include "kernels/launch.h"

namespace anyflash::cpu::ANYFLASH_ISA {}  // namespace anyflash::cpu::ANYFLASH_ISA
