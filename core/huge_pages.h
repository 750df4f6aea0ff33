// Memory that a CPU kernel is the first to touch.
#pragma once

#include "core/tensor_view.h"

namespace anyflash {

// Asks the system for huge pages for the memory of a new result, where it is large: PyTorch gets
// large memory fresh from the system, and to touch 64 MiB for the first time takes 23 ms in pages
// of 4 KiB, 8 ms in huge ones (measured), where a kernel needs 3 ms.
void ask_for_huge_pages(const TensorView& result);

}  // namespace anyflash
