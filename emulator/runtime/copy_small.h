// memcpy of 1, 2, 4, 8 or 16 bytes without a call.
#pragma once

#include <cstring>

namespace emu {

inline void copy_small(void* to, const void* from, int bytes) {
  switch (bytes) {
    case 4:
      std::memcpy(to, from, 4);
      break;
    case 16:
      std::memcpy(to, from, 16);
      break;
    case 8:
      std::memcpy(to, from, 8);
      break;
    default:
      std::memcpy(to, from, size_t(bytes));
  }
}

}  // namespace emu
