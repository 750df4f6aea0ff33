// What planning the forward and the backward has in common; for code that runs on any CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "kernels/launch.h"
#include "kernels/params.h"

namespace anyflash::cpu {

// A thread is worth waking for this many multiplications (some microseconds).
constexpr int64_t kWorthAThread = 1 << 18;

// Plans are cut for as many threads as get a share of so many multiplications (most of a
// millisecond) and for this many at most. Finer cuts would slow those with few threads.
constexpr int64_t kShare = 512 * kWorthAThread;
constexpr int64_t kManyThreads = 128;

// A plan that keeps its threads this busy is cut no finer.
constexpr double kBusyEnough = 0.9;

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t round_up_to(int64_t x, int64_t multiple) {
  return ceil_div(x, multiple) * multiple;
}

// The threads that get such shares of `work`: a power of two.
int64_t busy_threads(int64_t work);

// How much of the time until the last is done the threads work, if each takes the next of these
// items when it is free (run_parallel): 1 is all of it. Where it is enough it may be more than what
// is returned.
double busy_part(const std::vector<int64_t>& costs, int64_t threads);

}  // namespace anyflash::cpu
