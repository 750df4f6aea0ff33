// Parallel-fors on std::thread, as obedient and as odd as callers' may be.
#pragma once

#include <algorithm>
#include <iterator>
#include <thread>
#include <vector>

#include "kernels/params.h"

namespace anyflash::fuzz {

// One thread per index.
inline int32_t thread_each(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// Two threads with unequal shares.
inline int32_t two_threads(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
  const int64_t middle = begin + (end - begin + 2) / 3;
  std::thread first(body, begin, middle, context);
  if (middle < end) body(middle, end, context);
  first.join();
  return 0;
}

// Everything on the calling thread, as parallel regions inside of others run.
inline int32_t calling_thread(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) {
  body(begin, end, context);
  return 0;
}

constexpr ParallelFor kParallelFors[] = {thread_each, two_threads, calling_thread};

}  // namespace anyflash::fuzz
