// The caller's threads, and what this CPU is.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "kernels/arch.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

int32_t anyflash_cpu_isa(void) {
  namespace Isa = anyflash::Isa;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kF16c = 1u << 29, kAmxBf16 = 1u << 22;  // CPUID 1 ECX, CPUID 7.0 EDX
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return Isa::none;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0;
  return amx ? Isa::amx : Isa::avx512bf16;
#elif defined(__aarch64__)
  return Isa::neon;
#else
  return Isa::none;
#endif
}
