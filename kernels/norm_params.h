// Arguments of the layer and RMS norm kernels.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct NormParams {
  int64_t rows;
};

}  // namespace anyflash
