#include "core/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anyflash {

// It is advice: a system without huge pages goes on without.
void ask_for_huge_pages([[maybe_unused]] const TensorView& result) {
#if defined(__linux__)
  constexpr int64_t kLargeBytes = 8 << 20;
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!result.given() || result.device != Device::cpu) return;
  const int64_t bytes = result.numel() * bytes_of(result.dtype);
  if (bytes < kLargeBytes) return;
  const auto first = reinterpret_cast<uintptr_t>(result.data);
  const uintptr_t begin = (first + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace anyflash
