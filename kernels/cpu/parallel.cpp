// The caller's threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu {
namespace {

// The calling thread's scratch memory; kept, since a fresh page costs more than its use. Null if
// there is none.
char* scratch_memory(int64_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = 0;
    const int64_t pages = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(pages))));
    if (memory) size = pages;
  }
  return memory.get();
}

// Workers take the next number from one counter, so that parts of uneven size end together whatever
// the parallel-for does with its range.
struct Job {
  void (*task)(void*, int64_t, char*);
  void* context;
  int64_t count;
  int64_t scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void work() {
    char* scratch = scratch_memory(scratch_bytes);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      task(context, i, scratch);
    }
  }
};

}  // namespace

int32_t run_parallel(const CpuThreads* threads, int64_t max_threads, int64_t count,
                     int64_t scratch_bytes, void (*task)(void* context, int64_t i, char* scratch),
                     void* context) {
  Job job{task, context, count, scratch_bytes + 64};
  int64_t workers = std::min(max_threads, count);
  if (threads == nullptr || threads->parallel_for == nullptr) workers = 1;
  if (threads != nullptr) workers = std::min<int64_t>(workers, threads->num_threads);
  if (workers <= 1) {
    job.work();
  } else {
    const auto body = [](int64_t, int64_t, void* shared) { static_cast<Job*>(shared)->work(); };
    if (threads->parallel_for(0, workers, 1, body, &job) != 0) return kErrorParallelFor;
  }
  return job.out_of_memory ? kErrorNoMemory : 0;
}

}  // namespace anyflash::cpu
