#include "rowwise/output.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace anyflash {
namespace {

// It is advice: a system without huge pages goes on without.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor empty_output(Sizes sizes, const Tensor& like, ScalarType dtype) {
  constexpr int64_t kLargeBytes = 8 << 20;
  Tensor output = empty(sizes, like, dtype);
  const int64_t bytes = output.numel() * static_cast<int64_t>(output.element_size());
  if (bytes >= kLargeBytes && output.is_cpu()) ask_for_huge_pages(output.mutable_data_ptr(), bytes);
  return output;
}

}  // namespace anyflash
