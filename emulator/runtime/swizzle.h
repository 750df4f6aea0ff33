// The swizzle of shared-memory addresses by TMA and wgmma.
#pragma once

#include <cstdint>

namespace emu {

// `swizzle`: bytes of a row, 128, 64 or 32; 0 for none. The pattern repeats every eight rows.
inline uint32_t swizzled(uint32_t address, uint32_t swizzle) {
  if (swizzle == 0) return address;
  const uint32_t mask = swizzle / 16 - 1;  // 16-byte pieces in a row, less one
  return address ^ ((address >> 7 & mask) << 4);
}

}  // namespace emu
