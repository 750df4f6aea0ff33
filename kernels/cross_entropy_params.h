// Arguments of the cross entropy kernels.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct CrossEntropyParams {
  int64_t rows;
};

}  // namespace anyflash
