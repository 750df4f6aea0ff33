// Memory that a CPU kernel fills.
#pragma once

#include "stable/aten.h"

namespace anyflash {

// As empty(). Large tensors ask for huge pages: PyTorch gets large memory fresh from the system,
// and to touch 64 MiB for the first time takes 23 ms in pages of 4 KiB, 8 ms in huge ones
// (measured), where a kernel needs 3 ms.
Tensor empty_output(Sizes sizes, const Tensor& like, ScalarType dtype);

}  // namespace anyflash
