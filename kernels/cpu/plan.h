// What planning the forward and the backward has in common; for code that runs on any CPU.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "kernels/launch.h"
#include "kernels/params.h"

namespace anyflash::cpu {

// A thread is worth waking for this many multiplications (some microseconds).
constexpr int64_t kWorthAThread = 1 << 18;

// With fewer items than this, work is cut finer: the processors may have many cores.
constexpr int64_t kEnoughItems = 64;

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline bool sensible(const AttentionParams& p) {
  return p.heads_k > 0 && p.heads % p.heads_k == 0 && p.head_dim > 0 && p.head_dim_v > 0;
}

}  // namespace anyflash::cpu
