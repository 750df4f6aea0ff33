// Shared memory and its shadow: who wrote and read what last, which bytes were ever written, which
// copies are under way.
#pragma once

#include <algorithm>

#include "emulator/runtime/block.h"

namespace emu {

enum class Access { read, write, atomic };
// Threads use the generic proxy; TMA, bulk copies and wgmma the asynchronous one.
enum class Proxy { generic, async };

// Calls visit(word, mask of its bytes) for the words of [offset, offset + bytes).
template <typename Visit>
void for_each_word(uint32_t offset, uint32_t bytes, Visit&& visit) {
  const uint32_t end = offset + bytes;
  if ((offset | bytes) % 4 == 0) {
    for (uint32_t i = offset / 4; i < end / 4; ++i) visit(i, 0xF);
    return;
  }
  for (uint32_t i = offset / 4; i * 4 < end; ++i) {
    const uint32_t from = i * 4 < offset ? offset - i * 4 : 0;
    const uint32_t to = std::min(4u, end - i * 4);
    visit(i, uint8_t((1u << to) - (1u << from)));
  }
}

// Checks an access of `bytes` bytes at `offset` and enters it in the shadow.
void track_shared(uint32_t offset, uint32_t bytes, Access access, const Actor& actor,
                  const void* site, Proxy proxy = Proxy::generic);

// Offset in shared memory of an address, which has to be aligned and inside; else the launch ends.
uint32_t shared_offset(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what,
                       const void* site);

// An asynchronous copy writes 16 bytes or fewer: from now on their value is NaN, then `value`.
void begin_fill(uint32_t offset, uint32_t bytes);
void end_fill(uint32_t offset, const void* value, uint32_t bytes);
// The fill counts as a write of this actor at that time instead of the issue's.
void end_fill_by(uint32_t offset, const void* value, uint32_t bytes, int actor, Clock time);
// An asynchronous reader (wgmma, bulk store) uses the bytes.
void begin_drain(uint32_t offset, uint32_t bytes);
void end_drain(uint32_t offset, uint32_t bytes);

void shape_shared_memory();  // for the block's size
void begin_block_shared_memory();

}  // namespace emu
