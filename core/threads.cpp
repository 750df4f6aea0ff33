// Torch's threads where torch has no function to call: its OpenMP runtime.
#include <algorithm>
#include <atomic>

#include "core/interface.h"

namespace anyflash {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads,
                              unsigned flags);

std::atomic<GompParallel> gomp_parallel{nullptr};

// Threads take the next part from one counter: OpenMP may start fewer of them than asked for, as it
// does inside of a parallel region.
struct Parts {
  RangeBody body;
  void* context;
  int64_t end;
  int64_t grain_size;
  std::atomic<int64_t> next;

  static void work(void* data) {
    auto& parts = *static_cast<Parts*>(data);
    for (;;) {
      const int64_t begin = parts.next.fetch_add(parts.grain_size, std::memory_order_relaxed);
      if (begin >= parts.end) return;
      parts.body(begin, std::min(begin + parts.grain_size, parts.end), parts.context);
    }
  }
};

int32_t parallel_for(int64_t begin, int64_t end, int64_t grain_size, RangeBody body,
                     void* context) {
  Parts parts{body, context, end, std::max<int64_t>(grain_size, 1), {begin}};
  const int64_t count = (end - begin + parts.grain_size - 1) / parts.grain_size;
  gomp_parallel.load()(&Parts::work, &parts, static_cast<unsigned>(count), 0);
  return 0;
}

}  // namespace
}  // namespace anyflash

anyflash::ParallelFor anyflash_parallel_for_by_openmp(void* gomp_parallel) {
  anyflash::gomp_parallel = reinterpret_cast<anyflash::GompParallel>(gomp_parallel);
  return gomp_parallel == nullptr ? nullptr : &anyflash::parallel_for;
}
