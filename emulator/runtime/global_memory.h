// The shadow of global memory: who accessed it last. Global memory itself is the host's.
#pragma once

#include "emulator/runtime/block.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

// Checks bounds and races of an access of at most 16 bytes, of any alignment.
void track_global(uint64_t address, uint32_t bytes, Access access, const Actor& actor,
                  const void* site);
extern const void* last_global_site;  // of the last such access

bool is_written_in_launch(uint64_t address);

void forget_accesses(uint64_t begin, uint64_t end);  // to these pages
void forget_all_accesses();

}  // namespace emu
