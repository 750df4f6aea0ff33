// The CPU kernel for what a call with a cache does before attention.
#pragma once

#include "kernels/launch.h"
#include "kvcache.h"

namespace anyflash::cpu_kernel {

// Appends call.k and call.v. Returns q, turned where call has rotary tables: each row by its own
// position, or all by the first new one.
Tensor append(const Instance& instance, const KVCacheCall& call, bool q_positions_move);

}  // namespace anyflash::cpu_kernel
