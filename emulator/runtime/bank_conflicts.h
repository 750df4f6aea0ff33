// Bank conflicts of ld.shared and st.shared. Lanes come to an instruction one by one: accesses are
// logged, and put together when the lanes of the warp meet.
#pragma once

#include "emulator/runtime/block.h"

namespace emu {

// Wavefronts for one access of up to 32 four-byte words: most different words in one bank.
int wavefronts(const uint32_t* words, int count);
// An ld.shared or st.shared of the running thread.
void log_shared_access(const void* site, uint32_t offset, int bytes);
// Counts those of a warp since the last time.
void count_bank_conflicts(Warp& warp);

void begin_block_bank_conflicts();

}  // namespace emu
