// bar and barrier: the 16 named barriers of a block; and mbarrier.
#pragma once

#include <vector>

#include "emulator/runtime/block.h"

namespace emu {

void begin_block_barriers();
void begin_block_mbarriers();

// An asynchronous copy into shared memory is complete: its bytes arrive, and what was before
// `clock` becomes visible to those who wait.
void mbarrier_complete_tx(uint32_t address, uint32_t bytes, const Clock* clock);
// The asynchronous arrival of cp.async.mbarrier.arrive.
void mbarrier_arrive_by_copy(uint32_t address, const Clock* clock);
void mbarrier_add_pending(uint32_t address, const void* site);
void check_mbarrier(uint32_t address, const void* site);  // it has to be initialised

}  // namespace emu
