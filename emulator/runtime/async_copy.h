// Copies between global and shared memory that go on beside the threads: cp.async, and the bulk
// copies of TMA.
#pragma once

#include <functional>

#include "emulator/runtime/block.h"

namespace emu {

void begin_block_copies();
void end_thread_copies();  // reports copies that the running thread did not wait for
void end_block_copies();   // and bulk copies that nobody did

// One scheduler round of the copies under way. True while there are any.
bool advance_copies();

// Calls `complete` a few rounds from now.
void complete_later(std::function<void()> complete);

void begin_block_cp_async();
void end_thread_cp_async();

}  // namespace emu
