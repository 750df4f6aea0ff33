// The kernels without torch: find one for this machine, fill its arguments, launch it.
//
//   #include <anyflash/kernels.h>
//   using namespace anyflash;
//   const Instance* kernel = anyflash_find_kernel(Family::attention, Direction::forward,
//                                                 Dtype::fp32, Device::cpu, head_dim);
//   AttentionParams params{};  // kernels/params.h, of every family
//   int32_t error = anyflash_launch(kernel, &params, nullptr);
//
// Nothing here throws.
#pragma once

#include "kernels/arch.h"
#include "kernels/cross_entropy_params.h"
#include "kernels/features.h"
#include "kernels/launch.h"
#include "kernels/norm_params.h"
#include "kernels/params.h"
#include "kernels/rotary_params.h"

extern "C" {

// The best kernel for this machine: of the instruction set that its CPU has and ANYFLASH_CPU_ISA
// allows, or of the compute capability of `device_index`. `head_dim` is the larger one of q and of
// v, 0 where the family has none; `features` a set of features.h. It may be one that nobody has run
// on such a machine yet (Instance::checked_on). Null where there is none: anyflash_text() says why.
ANYFLASH_EXPORT const anyflash::Instance* anyflash_find_kernel(
    anyflash::Family family, anyflash::Direction direction, anyflash::Dtype dtype,
    anyflash::Device device, int32_t head_dim = 0, uint32_t features = 0, int32_t device_index = 0);

// Why the last call of this thread found nothing; valid until the next.
ANYFLASH_EXPORT const char* anyflash_text(void);

}  // extern "C"
