// Global memory for tests, with guard pages.
#pragma once

#include <cstdint>
#include <string>

namespace emu {

constexpr uint64_t kPageBytes = 4096;

struct Allocation {
  uint64_t begin, end;                  // what was asked for
  uint64_t mapping_begin, mapping_end;  // with one guard page before and one behind
};

// The one whose mapping has the address, guard pages included; null if there is none.
const Allocation* find_allocation(uint64_t address);

// "byte 400 of a buffer of 400", or the address.
std::string place(uint64_t address);

}  // namespace emu
